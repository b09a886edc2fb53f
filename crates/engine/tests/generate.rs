//! Generation is the same whether the host chooses the tokens or the backend does.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use cpu::{Cpu, Options};
use engine::{Engine, Finish, Sampler, SamplerParams, Session};
use model::{Backend, Buffer, Choice, Chooser, Chosen, Fault, Lane, Model, Site, Step, forward};
use quant::{Mix, MixContext};
use synth::Shape;

/// The CPU backend as one that chooses tokens itself, a step ahead of who collects them, as a GPU does.
struct Ahead {
    cpu: Cpu,
    lane: Option<Lane>,
    chosen: VecDeque<Chosen>,
}

impl Backend for Ahead {
    fn model(&self) -> &Model {
        self.cpu.model()
    }
    fn max_rows(&self) -> usize {
        self.cpu.max_rows()
    }
    fn context(&self) -> usize {
        self.cpu.context()
    }
    fn kv_blocks(&self) -> usize {
        self.cpu.kv_blocks()
    }
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.cpu.begin(step)
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.cpu.run(site)
    }
    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        self.cpu.read(buffer)
    }
    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        self.cpu.write(buffer, values)
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.cpu.logits()
    }
    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        Some(self)
    }
}

fn params(choice: &Choice) -> SamplerParams {
    SamplerParams {
        temperature: choice.inverse_temperature.map_or(0.0, |t| 1.0 / t),
        top_k: choice.top_k as usize,
        top_p: choice.top_p,
        min_p: choice.min_p,
        seed: choice.seed,
        ..SamplerParams::default()
    }
}

impl Chooser for Ahead {
    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault> {
        let [lane] = lanes else { panic!("one sequence") };
        self.chosen.clear();
        self.lane = Some(lane.clone());
        Ok(())
    }

    fn advance(&mut self) -> Result<(), Fault> {
        let lane = self.lane.as_mut().expect("started");
        let mut sampler = Sampler::new(params(&lane.choice)).unwrap();
        let token = sampler.sample(self.cpu.logits()?, &[], u64::from(lane.position)).unwrap();
        self.chosen.push_back(Chosen::Token(token));
        // The token after the last that fits is chosen, never fed.
        if (lane.position as usize) < self.cpu.context() && (lane.position as usize) < lane.table.len() * 64 {
            forward(&mut self.cpu, &Step::prefill(&[token], lane.position, lane.table.clone()))?;
        }
        lane.position += 1;
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Chosen>, Fault> {
        Ok(vec![self.chosen.pop_front().expect("no more is collected than was asked for")])
    }
}

fn model() -> Arc<Model> {
    let shape = Shape::named("tiny-moe").unwrap();
    let context = MixContext { n_layers: shape.config.layers, n_experts: 4, tied: shape.tied };
    Arc::new(synth::model(&shape, 1, |s| Mix::Q8_0.tensor_type(&context, &s.name, &s.dims)))
}

struct Ran {
    tokens: Vec<u32>,
    finish: Finish,
    session: Vec<u32>,
    blocks: usize,
}

fn generate<B: Backend>(
    backend: B,
    params: &SamplerParams,
    eos: &[u32],
    max: usize,
    stop_after: usize,
) -> Ran {
    let mut engine = Engine::new(backend);
    let mut session = Session::default();
    let _ = engine.feed(&mut session, &[1, 2, 3, 4, 5], |_| ControlFlow::Continue(())).unwrap();
    let (mut sampler, mut tokens) = (Sampler::new(params.clone()).unwrap(), Vec::new());
    let each = |token| {
        tokens.push(token);
        if tokens.len() == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let finish = engine.generate(&mut session, &mut sampler, eos, max, each).unwrap();
    Ran { tokens, finish, session: session.tokens().to_vec(), blocks: session.blocks() }
}

#[test]
fn host_and_backend_choose_the_same() {
    let model = model();
    let cpu =
        |context| Cpu::new(model.clone(), &Options { threads: 1, ..Options::for_context(context) }).unwrap();
    let greedy = SamplerParams::greedy();
    let drawn =
        SamplerParams { temperature: 0.5, top_k: 40, top_p: 0.9, min_p: 0.01, seed: 7, ..greedy.clone() };
    let probe = generate(cpu(256), &drawn, &[], 20, 0).tokens;
    let check = |params: &SamplerParams, context, eos: &[u32], max, stop_after, want: Finish| {
        let host = generate(cpu(context), params, eos, max, stop_after);
        let ahead = Ahead { cpu: cpu(context), lane: None, chosen: VecDeque::new() };
        let backend = generate(ahead, params, eos, max, stop_after);
        assert_eq!(host.finish, want);
        assert_eq!(backend.finish, want);
        assert_eq!(backend.tokens, host.tokens, "{want:?}");
        assert_eq!(backend.session, host.session, "{want:?}");
        assert_eq!(backend.blocks, host.blocks, "{want:?}: blocks beyond the end were kept");
    };
    check(&greedy, 256, &[], 100, 0, Finish::Length);
    check(&drawn, 256, &[], 100, 0, Finish::Length);
    check(&drawn, 256, &[], 1, 0, Finish::Length);
    check(&drawn, 256, &[], 0, 0, Finish::Length);
    check(&drawn, 70, &[], 100, 0, Finish::ContextFull);
    check(&drawn, 70, &[], 66, 0, Finish::Length);
    check(&drawn, 256, &[], 100, 9, Finish::Stopped);
    check(&drawn, 256, &[probe[12]], 100, 0, Finish::EndOfText);
}
