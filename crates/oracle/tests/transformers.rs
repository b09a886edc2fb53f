//! The oracle against Hugging Face transformers: is it the right network at all?
//!
//! The fixtures (random weights, random norms, six configurations) are made by tools/fixtures/transformers_logits.py.

use std::path::PathBuf;
use std::sync::Arc;

use gguf::File;
use model::{BLOCK, Backend, Ffn, Model, Step, forward};
use oracle::Oracle;
use safetensors::SafeTensors;

const CASES: [&str; 6] =
    ["moe-top2-norm", "moe-top8-of-16", "dense-tied", "dense-untied-head64", "dense-yarn", "moe-yarn-beta"];

struct Fixture {
    model: Model,
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// transformers in f32, `[positions, V]`.
    f32: Vec<f64>,
    /// The independent f64 forward, likewise.
    f64: Vec<f64>,
}

fn fixture(name: &str) -> Fixture {
    let path = |ext: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/{name}.{ext}"));
    let bytes = std::fs::read(path("safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
    let ints = |name: &str| data(name).as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let singles = |name: &str| -> Vec<f64> {
        data(name).as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
    };
    let doubles = |name: &str| -> Vec<f64> {
        data(name).as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
    };
    Fixture {
        model: Model::load(&File::open(&path("gguf")).unwrap()).unwrap(),
        ids: ints("ids"),
        positions: ints("positions"),
        f32: singles("logits_f32"),
        f64: doubles("logits_f64"),
    }
}

/// The oracle's logits at the fixture's positions.
fn logits(fixture: &Fixture, model: Model) -> Vec<f64> {
    let blocks = fixture.ids.len().div_ceil(BLOCK);
    let mut oracle = Oracle::new(Arc::new(model), fixture.ids.len(), blocks);
    let mut step = Step::prefill(&fixture.ids, 0, (0..blocks as u32).collect());
    step.logits = fixture.positions.clone();
    forward(&mut oracle, &step).unwrap();
    oracle.logits().unwrap().iter().map(|&v| f64::from(v)).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Smallest cosine of a position, and largest absolute error.
fn compare(got: &[f64], want: &[f64], vocab: usize) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    let rows = got.chunks_exact(vocab).zip(want.chunks_exact(vocab));
    let worst = rows.map(|(g, w)| cosine(g, w)).fold(1.0, f64::min);
    (worst, got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max))
}

/// What may lie between two f64 forwards: the read-out is rounded to f32 (half a unit of the largest logit), and the
/// file's epsilon and rotary base were (as much again).
fn rounding(fixture: &Fixture) -> f64 {
    f64::from(f32::EPSILON) * fixture.f64.iter().fold(0.0, |m, v| v.abs().max(m))
}

#[test]
fn the_oracle_is_the_network_of_transformers() {
    for name in CASES {
        let fixture = fixture(name);
        let got = logits(&fixture, fixture.model.clone());
        let vocab = fixture.model.config.vocab;

        let (worst, error) = compare(&got, &fixture.f32, vocab);
        assert!(worst >= 0.999_999, "{name}: cosine {worst} to transformers");
        // transformers' own rounding: the manifest records 1e-5 to 5e-5 against f64 for logits of deviation 2 to 12.
        assert!(error <= 1e-4, "{name}: off by {error} from transformers in f32");

        let (_, error) = compare(&got, &fixture.f64, vocab);
        let bound = rounding(&fixture);
        assert!(error <= bound, "{name}: off by {error} from f64, more than {bound}");
    }
}

/// Each planted fault must be seen, or the test above proves nothing about it.
#[test]
fn a_wrong_network_is_noticed() {
    type Fault = fn(&mut Model);
    let faults: [(&str, &str, Fault); 7] = [
        ("dense-yarn", "YaRN ignored", |m| m.config.rope.scaling = model::rope::Scaling::None),
        ("dense-tied", "another rotary base", |m| m.config.rope.base *= 1.01),
        ("moe-top2-norm", "weights not renormalised", |m| {
            if let Ffn::Moe(moe) = &mut m.config.ffn {
                moe.renormalise = false;
            }
        }),
        ("moe-top8-of-16", "one expert too few", |m| {
            if let Ffn::Moe(moe) = &mut m.config.ffn {
                moe.used -= 1;
            }
        }),
        ("dense-tied", "the head norms swapped", |m| {
            let layer = &mut m.weights.layers[1];
            std::mem::swap(&mut layer.attn_q_norm, &mut layer.attn_k_norm);
        }),
        ("dense-untied-head64", "the head tied", |m| m.weights.output = m.weights.token_embd.clone()),
        ("moe-yarn-beta", "the epsilon a thousand times larger", |m| m.config.rms_eps *= 1000.0),
    ];
    for (name, what, plant) in faults {
        let fixture = fixture(name);
        let mut model = fixture.model.clone();
        plant(&mut model);
        let (_, error) = compare(&logits(&fixture, model), &fixture.f64, fixture.model.config.vocab);
        assert!(error > 10.0 * rounding(&fixture), "{name}: {what} went unnoticed ({error})");
    }
}
