//! Tokens chosen on the GPU against `engine::Sampler`.

use std::sync::Arc;

use engine::{Sampler, SamplerError, SamplerParams};
use gguf::Dtype;
use model::{Chosen, Lane};
use quant::fixed::Activations;

use super::{NEEDS, model, normal, place, random, same, shape};
use crate::compile::{Compiler, KernelFiles};
use crate::driver::{Device, Memory, Module};
use crate::kernels::units;
use crate::launch::sample::{Feed, RING, Sampling, UNIT};

/// Places for the history of each.
const HISTORY: usize = 3000;
/// Draws that every sequence may make.
const DRAWS: usize = 20;

/// The sampler alone: no model's stage is needed.
struct Rig {
    sampling: Sampling,
    device: Arc<Device>,
    _module: Module,
}

impl Rig {
    fn new(vocab: usize, rows: usize) -> Rig {
        let ready = || {
            let device = Device::open(place())?;
            let model = model(&shape(32, vocab, 0, 0), Dtype::F32);
            let unit = units(&model, Activations::A16).into_iter().find(|u| u.name == UNIT.0);
            let image = Compiler::of(&device.gpu, &KernelFiles::default())?
                .image(&unit.expect("a unit of every model"))?;
            let module = Module::load(&device, &image)?;
            let get = |name: &'static str| module.function(name).expect("one of NAMES");
            let sampling = Sampling::new(&device, get, vocab, rows, rows * HISTORY)?;
            Ok::<_, crate::Error>(Rig { sampling, device, _module: module })
        };
        ready().unwrap_or_else(|error| panic!("{NEEDS}: {error}"))
    }

    /// Takes up `rows`, each with its place and the history before that, for as many draws as may be under way.
    fn start(&mut self, rows: &[(SamplerParams, u32)], histories: &[Vec<u32>]) {
        let lane = |((params, position), history): (&(SamplerParams, u32), &Vec<u32>)| Lane {
            position: *position,
            table: Vec::new(),
            choice: params.choice(),
            adjustment: params.adjustment(history),
        };
        let lanes: Vec<Lane> = rows.iter().zip(histories).map(lane).collect();
        self.sampling.start(&lanes, DRAWS).expect(NEEDS);
    }

    fn launch(&mut self, logits: &Memory<f32>, feed: Feed) {
        self.sampling.launch(&self.device, logits.ptr(), feed).expect(NEEDS);
        self.sampling.note();
    }

    fn collect(&mut self) -> Vec<Chosen> {
        self.sampling.collect(&self.device).expect(NEEDS)
    }

    /// Draws twice from `logits` (a row for each of `rows`) and compares both draws.
    fn check(&mut self, what: &str, logits: &[Vec<f32>], rows: &[(SamplerParams, u32)]) {
        self.check_after(what, logits, rows, &vec![Vec::new(); rows.len()], 2);
    }

    /// Draws from `logits` again and again, after these histories. The logits are then what they were.
    fn check_after(
        &mut self,
        what: &str,
        logits: &[Vec<f32>],
        rows: &[(SamplerParams, u32)],
        histories: &[Vec<u32>],
        draws: u64,
    ) {
        assert_eq!(logits.len(), rows.len());
        let on_device = self.device.upload(&logits.concat()).expect(NEEDS);
        self.start(rows, histories);
        let mut histories = histories.to_vec();
        for later in 0..draws {
            self.launch(&on_device, Feed::NOWHERE);
            for (row, got) in self.collect().into_iter().enumerate() {
                let (params, position) = &rows[row];
                let want = host(params, &logits[row], &histories[row], u64::from(*position) + later);
                assert_eq!(got, want, "{what}: row {row}, {params:?}, position {position} + {later}");
                if let Chosen::Token(token) = got {
                    histories[row].push(token);
                }
            }
        }
        let mut after = vec![0.0; on_device.len()];
        on_device.read(0, &mut after).expect(NEEDS);
        same(what, &logits.concat(), &after);
    }
}

/// What the host's sampler chooses.
fn host(params: &SamplerParams, logits: &[f32], history: &[u32], position: u64) -> Chosen {
    match Sampler::new(params.clone()).expect("parameters in range").sample(logits, history, position) {
        Ok(token) => Chosen::Token(token),
        Err(SamplerError::NonFinite { nan, infinite, first, .. }) => {
            let [nan, infinite, first] = [nan, infinite, first].map(|n| n as u32);
            Chosen::NonFinite { nan, infinite, first }
        }
        Err(other) => panic!("{other}"),
    }
}

/// Logits of many shapes: what a model gives, flat and steep, ties, extremes, both zeros.
fn logits(vocab: usize, seed: u64) -> Vec<(&'static str, Vec<f32>)> {
    let of = |f: &dyn Fn(usize) -> f32| (0..vocab).map(f).collect::<Vec<f32>>();
    let n = |i: usize| normal(seed, i);
    vec![
        ("normal", of(&|i| n(i) * 2.5)),
        ("flat", of(&|i| n(i) * 1e-3)),
        ("steep", of(&|i| n(i) * 40.0)),
        ("one likely", of(&|i| n(i) + if i == vocab / 3 { 30.0 } else { 0.0 })),
        ("equal", of(&|_| -1.5)),
        ("few values", of(&|i| (n(i) * 2.0).round())),
        ("two values", of(&|i| (random(seed, i) % 2) as f32 * 0.5)),
        ("zeros of both signs", of(&|i| if random(seed, i).is_multiple_of(2) { 0.0 } else { -0.0 })),
        ("all below zero", of(&|i| n(i) * 3.0 - 100.0)),
        ("huge", of(&|i| n(i) * 1e38 / 6.0)),
        ("from end to end", of(&|i| [f32::MIN, f32::MAX, 0.0, 1.0][random(seed, i) as usize % 4])),
        ("tiny", of(&|i| n(i) * 1e-40)),
    ]
}

/// Every truncation alone and with the others, at cold, usual and hot temperatures.
fn parameters(vocab: usize) -> Vec<SamplerParams> {
    let mut all = vec![SamplerParams::greedy()];
    let base = SamplerParams::default();
    for temperature in [1e-30, 0.3, 1.0, 100.0] {
        for top_k in [0, 1, 40, 1000, vocab / 2, vocab, vocab + 7] {
            for (top_p, min_p) in
                [(1.0, 0.0), (0.95, 0.0), (0.5, 0.1), (1e-6, 0.0), (0.999_999_9, 0.0), (1.0, 0.02)]
            {
                all.push(SamplerParams { temperature, top_k, top_p, min_p, ..base.clone() });
            }
        }
    }
    all
}

fn check_vocabulary(vocab: usize, rows: usize, batches: usize) {
    let mut rig = Rig::new(vocab, rows);
    let (kinds, parameters) = (logits(vocab, vocab as u64), parameters(vocab));
    for batch in 0..batches {
        // Rows of a batch have nothing in common.
        let pick = |i: usize, len: usize| random(batch as u64, i) as usize % len;
        let logits: Vec<Vec<f32>> = (0..rows).map(|r| kinds[pick(r, kinds.len())].1.clone()).collect();
        let rows: Vec<_> = (0..rows)
            .map(|r| {
                let seed = random(99, batch * 1000 + r);
                let params = &parameters[pick(r + 500, parameters.len())];
                (SamplerParams { seed, ..params.clone() }, pick(r + 900, 100_000) as u32)
            })
            .collect();
        rig.check(&format!("{vocab} tokens, batch {batch}"), &logits, &rows);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn tokens_are_the_host_samplers() {
    check_vocabulary(151_936, 16, 6);
    check_vocabulary(8193, 64, 20);
    check_vocabulary(300, 5, 100);
    check_vocabulary(1, 1, 2);
}

/// Every kind of logits with the parameters that people use, alone.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn usual_parameters_on_every_kind_of_logits() {
    let vocab = 151_936;
    let mut rig = Rig::new(vocab, 1);
    let base = SamplerParams { seed: 7, ..SamplerParams::default() };
    for (kind, logits) in logits(vocab, 1) {
        for params in [
            SamplerParams::greedy(),
            base.clone(),
            SamplerParams { temperature: 0.7, top_k: 20, top_p: 0.8, ..base.clone() },
            SamplerParams { top_p: 0.9, ..base.clone() },
            SamplerParams { min_p: 0.05, ..base.clone() },
        ] {
            rig.check(kind, std::slice::from_ref(&logits), &[(params, 11)]);
        }
    }
}

/// Faults are counted as the host counts them, and leave nothing behind for the next draw.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn logits_that_are_not_finite() {
    let vocab = 10_000;
    let mut rig = Rig::new(vocab, 3);
    let good: Vec<f32> = (0..vocab).map(|i| normal(2, i)).collect();
    let mut bad = good.clone();
    (bad[9000], bad[77], bad[4096], bad[9999]) = (f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY);
    let params = SamplerParams { top_k: 50, top_p: 0.9, ..SamplerParams::default() };
    let rows = [(params.clone(), 0), (SamplerParams::greedy(), 1), (params, 2)];
    rig.check("some rows", &[bad.clone(), bad.clone(), good.clone()], &rows);
    rig.check("no rows", &[good.clone(), good.clone(), good], &rows);
    rig.check("all", &[vec![f32::NAN; vocab], vec![f32::INFINITY; vocab], bad], &rows);
}

/// Tokens and positions reach the rows of the step that they belong to, and the host may be as far behind as it may.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn tokens_feed_the_next_step() {
    let vocab = 5000;
    let mut rig = Rig::new(vocab, 2);
    let logits: Vec<Vec<f32>> = (0..2).map(|r| (0..vocab).map(|i| normal(r, i) * 3.0).collect()).collect();
    let rows = [
        (SamplerParams { seed: 3, ..SamplerParams::default() }, 40),
        (SamplerParams { seed: 4, top_p: 0.9, ..SamplerParams::default() }, 7),
    ];
    let on_device = rig.device.upload(&logits.concat()).expect(NEEDS);
    let (token, position) =
        (rig.device.zeros::<u32>(3).expect(NEEDS), rig.device.zeros::<u32>(3).expect(NEEDS));
    let wanted = rig.device.upload(&[2u32, 0]).expect(NEEDS);
    let feed = Feed { token: token.ptr(), position: position.ptr(), wanted: wanted.ptr() };
    for _ in 0..2 {
        // Started over, with draws on their way that nobody asks for any more.
        rig.start(&rows, &[vec![], vec![]]);
        (0..RING).for_each(|_| rig.launch(&on_device, feed));
        for step in 0..u64::from(RING) - 1 {
            let want = |r: usize| host(&rows[r].0, &logits[r], &[], u64::from(rows[r].1) + step);
            assert_eq!(rig.collect(), [want(0), want(1)], "step {step}");
        }
        let (mut tokens, mut positions) = ([0; 3], [0; 3]);
        token.read(0, &mut tokens).expect(NEEDS);
        position.read(0, &mut positions).expect(NEEDS);
        assert_eq!(positions, [7 + RING - 1, 0, 40 + RING - 1]);
        let fed = |r: usize| host(&rows[r].0, &logits[r], &[], u64::from(rows[r].1 + RING - 1));
        assert_eq!([Chosen::Token(tokens[2]), Chosen::Token(tokens[0])], [fed(0), fed(1)]);
    }
}

/// Penalties and biases of every kind, in every order of magnitude, with and without a window that is shorter than the
/// history; beside rows that have none.
fn adjustments(vocab: usize) -> Vec<SamplerParams> {
    let base = SamplerParams { penalty_window: usize::MAX, ..SamplerParams::default() };
    let bias = |value: f32| (0..40).map(|i| (random(41, i) as u32 % vocab as u32, value)).collect();
    vec![
        SamplerParams { repeat_penalty: 1.05, ..base.clone() },
        SamplerParams { repeat_penalty: 1.3, penalty_window: 64, ..base.clone() },
        SamplerParams { repeat_penalty: 0.5, penalty_window: 5, ..base.clone() },
        SamplerParams { presence_penalty: 1.5, penalty_window: 1, ..base.clone() },
        SamplerParams { frequency_penalty: 0.3, ..base.clone() },
        SamplerParams { frequency_penalty: -0.7, penalty_window: 7, ..base.clone() },
        SamplerParams {
            repeat_penalty: 1e38,
            presence_penalty: -2.0,
            frequency_penalty: 1e37,
            ..base.clone()
        },
        SamplerParams { frequency_penalty: f32::MAX, presence_penalty: f32::MIN, ..base.clone() },
        SamplerParams { logit_bias: bias(4.0), ..base.clone() },
        SamplerParams { logit_bias: bias(f32::MIN), presence_penalty: 0.5, ..base.clone() },
        SamplerParams { logit_bias: bias(-100.0), repeat_penalty: 1.1, penalty_window: 30, ..base.clone() },
        base,
    ]
}

fn check_adjusted(vocab: usize, rows: usize, batches: usize) {
    let mut rig = Rig::new(vocab, rows);
    let (kinds, adjustments) = (logits(vocab, vocab as u64), adjustments(vocab));
    let base = SamplerParams::default();
    let choices = [
        SamplerParams::greedy(),
        SamplerParams { temperature: 0.7, top_k: 20, top_p: 0.8, ..base.clone() },
        SamplerParams { top_p: 0.95, ..base.clone() },
        SamplerParams { temperature: 1.5, min_p: 0.02, ..base },
    ];
    for batch in 0..batches {
        let pick = |i: usize, len: usize| random(batch as u64 + 7000, i) as usize % len;
        // A few tokens again and again, most of which are likely; some are beyond the vocabulary.
        let history = |r: usize| {
            let words = 1 + pick(r + 2000, 50);
            let word = |i: usize| random(3, random(r as u64, i) as usize % words) as u32 % (vocab as u32 + 5);
            (0..pick(r + 100, 2900)).map(word).collect::<Vec<u32>>()
        };
        let histories: Vec<Vec<u32>> = (0..rows).map(history).collect();
        let logits: Vec<Vec<f32>> = (0..rows)
            .map(|r| {
                let mut logits = kinds[pick(r, kinds.len())].1.clone();
                for &id in histories[r].iter().take(20).filter(|&&id| (id as usize) < vocab) {
                    logits[id as usize] = (logits[id as usize].abs() * 1.1).min(f32::MAX);
                }
                logits
            })
            .collect();
        let rows: Vec<_> = (0..rows)
            .map(|r| {
                let choice = choices[pick(r + 300, choices.len())].clone();
                let SamplerParams { temperature, top_k, top_p, min_p, .. } = choice;
                let adjusted = adjustments[pick(r + 400, adjustments.len())].clone();
                let seed = random(98, batch * 1000 + r);
                (
                    SamplerParams { temperature, top_k, top_p, min_p, seed, ..adjusted },
                    histories[r].len() as u32,
                )
            })
            .collect();
        rig.check_after(&format!("{vocab} tokens, batch {batch}"), &logits, &rows, &histories, DRAWS as u64);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn tokens_after_penalties_are_the_host_samplers() {
    check_adjusted(151_936, 16, 3);
    check_adjusted(8193, 64, 5);
    check_adjusted(300, 5, 40);
    check_adjusted(1, 1, 2);
}

/// What is not finite is counted as without penalties, also where a penalised token's logit is.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn penalised_logits_that_are_not_finite() {
    let vocab = 10_000;
    let mut rig = Rig::new(vocab, 2);
    let good: Vec<f32> = (0..vocab).map(|i| normal(2, i)).collect();
    let mut bad = good.clone();
    (bad[77], bad[9000]) = (f32::INFINITY, f32::NAN);
    let params = SamplerParams { repeat_penalty: 1.2, frequency_penalty: 0.1, ..SamplerParams::greedy() };
    let rows = [(params.clone(), 0), (params, 0)];
    rig.check_after("one row", &[bad, good], &rows, &[vec![77, 9000, 5], vec![5, 6, 7]], 3);
}

/// Rows of a head beyond the tokens are never chosen, likely as they may be; what is not finite there counts.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn a_head_with_more_rows_than_tokens() {
    for (vocab, ids) in [(10_000, 9_733), (10_000, 4_096), (10_000, 1), (300, 257), (9000, 8999)] {
        let mut rig = Rig::new(vocab, 5);
        let base = SamplerParams { seed: 5, ids: ids as u32, ..SamplerParams::default() };
        let rows: Vec<_> = [
            SamplerParams { temperature: 0.0, ..base.clone() },
            SamplerParams { top_k: 20, top_p: 0.8, ..base.clone() },
            SamplerParams { top_p: 0.99, ..base.clone() },
            SamplerParams { min_p: 0.01, ..base.clone() },
            SamplerParams { top_k: ids / 2 + 1, repeat_penalty: 1.3, ..base },
        ]
        .map(|params| (params, 9))
        .to_vec();
        for (kind, mut logits) in logits(vocab, 11) {
            logits[ids..].iter_mut().for_each(|logit| *logit = (logit.abs() * 2.0).min(f32::MAX));
            rig.check(&format!("{kind}, {ids} of {vocab}"), &vec![logits.clone(); rows.len()], &rows);
            let last = vocab - 1;
            logits[last] = f32::NAN;
            rig.check("no number beyond the tokens", &vec![logits.clone(); rows.len()], &rows);
        }
    }
}
