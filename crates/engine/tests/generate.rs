//! Generation is the same whether the host chooses the tokens or the backend does.

mod over_cpu;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cpu::{Cpu, Options};
use engine::{Engine, Finish, Sampler, SamplerParams, Session};
use model::{Backend, Model};
use over_cpu::{Ahead, Asked};
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
    // Prompt and answer are the history of penalties; what is chosen on the backend becomes part of it there.
    for params in [&greedy, &drawn] {
        let qwen = SamplerParams { repeat_penalty: 1.05, penalty_window: usize::MAX, ..params.clone() };
        let short =
            SamplerParams { repeat_penalty: 1.5, presence_penalty: 0.5, penalty_window: 7, ..qwen.clone() };
        let counted = SamplerParams { frequency_penalty: 0.4, ..qwen.clone() };
        let biased = SamplerParams { logit_bias: [(3, 2.0), (250, -9.0)].into(), ids: 280, ..params.clone() };
        for params in [qwen, short, counted, biased] {
            check(&params, 256, &[], 100, 0, Finish::Length);
            check(&params, 70, &[], 100, 0, Finish::ContextFull);
        }
    }
}

/// Who chooses: the backend, unless a history is longer than what it has room for.
#[test]
fn a_history_that_does_not_fit_is_the_hosts() {
    let model = model();
    let check = |places: usize, window: usize, on_host: bool| {
        let asked = Arc::new(Asked::default());
        let cpu = Cpu::new(model.clone(), &Options { threads: 1, ..Options::for_context(256) }).unwrap();
        let backend = Ahead::new(cpu, 1, asked.clone()).remembering(places);
        let params = SamplerParams { repeat_penalty: 1.3, penalty_window: window, ..SamplerParams::greedy() };
        generate(backend, &params, &[], 20, 0);
        let rows = asked.logits.load(Ordering::Relaxed);
        assert_eq!(rows, if on_host { 20 } else { 0 }, "{places} places, a window of {window}");
    };
    // 5 tokens of the prompt, 20 to choose, and up to a block more.
    check(5 + 20 + model::BLOCK, usize::MAX, false);
    check(5 + 20 + model::BLOCK - 1, usize::MAX, true);
    check(3 + 20 + model::BLOCK, 3, false);
    check(0, 0, false);
}

#[test]
fn a_bias_on_no_token_is_an_error_on_either() {
    let model = model();
    let cpu = || Cpu::new(model.clone(), &Options { threads: 1, ..Options::for_context(256) }).unwrap();
    let check = |backend: Box<dyn Backend>| {
        let mut engine = Engine::new(backend);
        let mut session = Session::default();
        let _ = engine.feed(&mut session, &[1, 2], |_| ControlFlow::Continue(())).unwrap();
        let params = SamplerParams { logit_bias: [(1 << 20, 1.0)].into(), ..SamplerParams::greedy() };
        let mut sampler = Sampler::new(params).unwrap();
        let got = engine.generate(&mut session, &mut sampler, &[], 3, |_| ControlFlow::Continue(()));
        let error = got.unwrap_err().to_string();
        assert!(error.starts_with("logit_bias: token id 1048576 is outside"), "{error}");
    };
    check(Box::new(cpu()));
    check(Box::new(Ahead::new(cpu(), 1, Arc::default())));
}
