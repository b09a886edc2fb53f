//! Generation is the same whether the host chooses the tokens or the backend does.

#[allow(dead_code, reason = "the server's tests use the rest")]
mod over_cpu;

use std::ops::ControlFlow;
use std::sync::Arc;

use cpu::{Cpu, Options};
use engine::{Engine, Finish, Sampler, SamplerParams, Session};
use model::{Backend, Model};
use over_cpu::Ahead;
use quant::{Mix, MixContext};
use synth::Shape;

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
        let ahead = Ahead::new(cpu(context), 1, Arc::default());
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
