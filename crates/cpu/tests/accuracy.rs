//! Is the arithmetic good enough? The CPU backend against the oracle (weights dequantised, f64 throughout).

use std::sync::Arc;

use cpu::{Cpu, Options};
use gguf::{Dtype, File};
use model::{BLOCK, Backend, Model, Spec, Step, forward};
use oracle::Oracle;
use quant::fixed::Activations;
use synth::Shape;

fn run(backend: &mut dyn Backend, tokens: &[u32]) -> Vec<f64> {
    let mut step = Step::prefill(tokens, 0, (0..tokens.len().div_ceil(BLOCK) as u32).collect());
    step.logits = (0..tokens.len() as u32).collect();
    forward(backend, &step).unwrap();
    backend.logits().unwrap().iter().map(|&v| f64::from(v)).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Largest and second largest, with the index of the first.
fn top(x: &[f64]) -> (usize, f64, f64) {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    (order[0], x[order[0]], x[order[1]])
}

struct Report {
    cosine: f64,
    /// Largest error of a logit, relative to the deviation of its position's logits.
    error: f64,
    /// Positions whose top-1 differs though the oracle's margin exceeds `bound` deviations.
    flips: usize,
}

fn report(model: &Arc<Model>, activations: Activations, tokens: &[u32], bound: f64) -> Report {
    let blocks = tokens.len().div_ceil(BLOCK);
    let options = Options { activations, ..Options::for_context(blocks * BLOCK) };
    let got = run(&mut Cpu::new(model.clone(), &options).unwrap(), tokens);
    let want = run(&mut Oracle::new(model.clone(), tokens.len(), blocks), tokens);
    let mut report = Report { cosine: 1.0, error: 0.0, flips: 0 };
    for (got, want) in got.chunks_exact(model.config.vocab).zip(want.chunks_exact(model.config.vocab)) {
        let mean = want.iter().sum::<f64>() / want.len() as f64;
        let deviation = (want.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / want.len() as f64).sqrt();
        let error = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max) / deviation;
        let (best, first, second) = top(want);
        report.cosine = report.cosine.min(cosine(got, want));
        report.error = report.error.max(error);
        report.flips += usize::from(top(got).0 != best && (first - second) / deviation > bound);
    }
    report
}

/// The Q4_K_M mix in spirit: sensitive tensors Q6_K in some layers, Q4_K elsewhere.
fn q4_k_m(spec: &Spec) -> Dtype {
    let sensitive = spec.name.contains("attn_v") || spec.name.contains("ffn_down");
    match spec.layer {
        _ if spec.dims.len() == 1 || spec.name.contains("gate_inp") => Dtype::F32,
        None => Dtype::Q6K,
        Some(layer) if sensitive && layer % 3 == 0 => Dtype::Q6K,
        Some(_) => Dtype::Q4K,
    }
}

/// The error that the rules predict, in deviations of the logits. A product with A16 activations is off by at most
/// 1.2e-4 of its result and attention by 5.1e-4 (ARCHITECTURE.md, accuracy); with eight products a layer these meet as
/// independent errors: sqrt(8 * 1.2e-4^2 + 5.1e-4^2) = 6.1e-4 a layer, growing with the square root of the layers; and
/// the largest of thousands of logits lies about four deviations of the error out.
fn predicted(layers: usize) -> f64 {
    6.1e-4 * (layers as f64).sqrt() * 4.0
}

fn check(name: &str, model: Model, tokens: &[u32]) {
    let model = Arc::new(model);
    let bound = predicted(model.config.layers);
    let a16 = report(&model, Activations::A16, tokens, bound);
    assert!(a16.cosine >= 0.9999, "{name}: cosine {}", a16.cosine);
    assert!(a16.error <= bound, "{name}: error {} exceeds the predicted {bound}", a16.error);
    assert_eq!(a16.flips, 0, "{name}: another top-1 beyond the bound");
    // One plane is two hundred times coarser; if that does not show, nothing would.
    let a8 = report(&model, Activations::A8, tokens, bound);
    assert!(a8.error > 10.0 * a16.error, "{name}: a8 is off by {}, a16 by {}", a8.error, a16.error);
    println!(
        "{name}: a16 cosine {:.9} error {:.2e}; a8 cosine {:.6} error {:.2e}",
        a16.cosine, a16.error, a8.cosine, a8.error
    );
}

fn tokens(n: u32, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| (i * i * 31 + i * 7 + 3) % vocab as u32).collect()
}

#[test]
fn random_models_are_within_the_predicted_error() {
    for name in ["tiny-moe", "tiny-dense"] {
        let shape = Shape::named(name).unwrap();
        check(name, synth::model(&shape, 7, q4_k_m), &tokens(100, shape.config.vocab));
    }
}

#[test]
fn the_shipped_model_is_within_the_predicted_error() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tally-rust-Q4_K_M.gguf");
    let model = Model::load(&File::open(path.as_ref()).unwrap()).unwrap();
    let tokens = tokens(150, model.config.vocab);
    check("tally-rust", model, &tokens);
}
