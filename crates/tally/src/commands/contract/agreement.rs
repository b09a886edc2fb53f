//! Checks that two ways to the same logits give the same bits: two devices, one device in several ways of running, and
//! with somebody watching.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use contract::{Figures, Miss, Parameters, Verdict};
use gguf::Dtype;
use model::{BLOCK, Backend, Config, Ffn, Model, Moe, Row, Spec, Stage, Step};
use parity::scenario::Limits;
use parity::{Comparison, Filter, Run, Scenario, Trace, argmax};
use synth::Shape;

use super::forward::{count, device, table};
use super::lab::{Lab, Room, broke, logits, tokens};
use super::planted::{Wrong, broken, misread};

/// What was compared, and how far apart it was at the worst.
#[derive(Default)]
struct Tally {
    comparisons: usize,
    values: usize,
    least_cosine: Option<f64>,
}

impl Tally {
    /// Fails where bits differ or a value is no number.
    fn compare(&mut self, place: &str, left: &[f32], right: &[f32]) -> Result<(), Miss> {
        if left.is_empty() || left.len() != right.len() {
            return Err(Miss::failed(format!("{place}: {} logits against {}", left.len(), right.len())));
        }
        let found = Comparison::of(left, right);
        let cosine = found.apart.and_then(|apart| apart.cosine);
        self.least_cosine = [self.least_cosine, cosine].into_iter().flatten().reduce(f64::min);
        let why = match found.first {
            _ if !found.finite() => {
                let bad = [found.left, found.right].map(|side| side.total - side.finite);
                format!("{place}: {} and {} of {} logits are no numbers", bad[0], bad[1], left.len())
            }
            Some(at) => {
                let (index, total) = (at.index, left.len());
                let bits = [at.left, at.right].map(f32::to_bits);
                format!(
                    "{place}: {} of {total} logits differ, the first at {index}: {:08x} and {:08x}, cosine {}",
                    found.differing,
                    bits[0],
                    bits[1],
                    cosine.map_or("undefined".into(), |c| c.to_string())
                )
            }
            None => {
                self.comparisons += 1;
                self.values += left.len();
                return Ok(());
            }
        };
        Err(Miss::Failed { why, figures: std::mem::take(self).figures() })
    }

    fn figures(self) -> Figures {
        Figures::from_iter([
            ("comparisons".into(), self.comparisons.into()),
            ("logits".into(), self.values.into()),
            ("least_cosine".into(), self.least_cosine.into()),
        ])
    }

    fn done(self) -> Verdict {
        if self.comparisons == 0 { Err(Miss::failed("nothing was compared")) } else { Ok(self.figures()) }
    }
}

/// Two devices: a prompt, then tokens one at a time, each the left's likeliest.
pub(super) fn same_bits(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let (left, right) = (parameters.text("left").unwrap_or("cpu"), parameters.text("right").unwrap_or("gpu"));
    let generate = parameters.integer("generate").unwrap_or(0) as usize; // of a contract: a few
    let model = lab.model();
    let misread = match fault {
        Some("type-misread") => {
            misread(&model).ok_or_else(|| Miss::unable("every layer has the same types"))?
        }
        _ => model.clone(),
    };
    let mut tally = Tally::default();
    let mut lengths = parameters.integers("tokens");
    lengths.sort_unstable();
    for n in lengths {
        let n = n.clamp(1, 1 << 16) as usize;
        let room = Room::of(n + generate);
        let mut pair = [
            Run::new(lab.place(&model, left, room)?.backend),
            Run::new(faulty(lab.place(&misread, right, room)?.backend, fault == Some("ulp"), Wrong::Ulp)),
        ];
        let mut fed = tokens(n as u64, n, model.config.vocab);
        for step in 0..=generate {
            let [l, r] = &mut pair;
            let (l, r) = (l.feed(&fed).map_err(broke)?, r.feed(&fed).map_err(broke)?);
            tally.compare(&format!("{left} and {right}, {n} tokens, generated {step}"), l, r)?;
            fed = vec![argmax(l).map_or(0, |(token, _)| token)];
        }
    }
    tally.done()
}

fn faulty(backend: Box<dyn Backend>, planted: bool, wrong: Wrong) -> Box<dyn Backend> {
    if planted { broken(backend, wrong) } else { backend }
}

/// One device: a prompt whole, in chunks, token by token, and beside another sequence.
pub(super) fn ways(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let n = count(parameters, "tokens");
    let ids = tokens(5, n, lab.model().config.vocab);
    let mut tally = Tally::default();
    let mut whole = None;
    for scenario in [Scenario::Whole, Scenario::Chunked, Scenario::Decode, Scenario::Batch] {
        let room = Room { context: n.next_multiple_of(BLOCK), sequences: 2 };
        let mut backend = lab.backend(device(parameters), room, fault.map(|_| Wrong::UlpInCompany))?;
        let limits = Limits { max_rows: backend.max_rows(), kv_blocks: backend.kv_blocks() };
        let steps = scenario.steps(&ids, limits).map_err(|why| Miss::unable(format!("{scenario}: {why}")))?;
        let mut last = Vec::new();
        for step in &steps {
            last = logits(&mut *backend, step)?;
        }
        let want = whole.get_or_insert_with(|| last.clone());
        tally.compare(&format!("whole and {scenario}, {n} tokens"), want, &last)?;
    }
    tally.done()
}

/// One device: sequences alone, and the same in one step.
pub(super) fn batch(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let n = count(parameters, "tokens");
    let vocab = lab.model().config.vocab;
    let mut tally = Tally::default();
    for streams in parameters.integers("streams") {
        let streams = streams.clamp(1, 256) as usize;
        let blocks = n.div_ceil(BLOCK) as u32; // prompts of checks are short
        let room = Room { context: n, sequences: streams };
        let mut backend = lab.backend(device(parameters), room, fault.map(|_| Wrong::UlpInCompany))?;
        // Of different lengths, each with blocks of its own.
        let prompts: Vec<_> =
            (0..streams).map(|s| tokens(s as u64, 1 + (n - 1) * (s + 1) / streams, vocab)).collect();
        let tables: Vec<Vec<u32>> =
            (0..streams as u32).map(|s| (s * blocks..(s + 1) * blocks).collect()).collect();
        let mut alone = Vec::new();
        let mut together = Step { tables: tables.clone(), ..Step::default() };
        for (s, (prompt, table)) in prompts.iter().zip(tables).enumerate() {
            alone.extend(logits(&mut *backend, &Step::prefill(prompt, 0, table))?);
            // All but the last token are in the cache already: the step is one of decoding.
            let last = prompt.len() - 1;
            together.rows.push(Row { token: prompt[last], position: last as u32, sequence: s as u32 });
            together.logits.push(s as u32);
        }
        let got = logits(&mut *backend, &together)?;
        for (s, (alone, got)) in alone.chunks(vocab).zip(got.chunks(vocab)).enumerate() {
            tally.compare(&format!("sequence {s} alone and among {streams}"), alone, got)?;
        }
    }
    tally.done()
}

/// One device: the same step again and again.
pub(super) fn repeats(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let repeats = count(parameters, "repeats");
    let vocab = lab.model().config.vocab;
    let mut tally = Tally::default();
    for n in parameters.integers("tokens") {
        let n = n.clamp(1, 1 << 16) as usize;
        let wrong = fault.map(|_| Wrong::UlpInThirdStep);
        let mut backend = lab.backend(device(parameters), Room::of(n), wrong)?;
        let step = Step::prefill(&tokens(1, n, vocab), 0, table(n));
        let first = logits(&mut *backend, &step)?;
        for repeat in 1..repeats {
            let again = logits(&mut *backend, &step)?;
            tally.compare(&format!("{n} tokens, repeat {repeat}"), &first, &again)?;
        }
    }
    tally.done()
}

/// Every stage of a prompt is captured, and capturing changes no bit.
pub(super) fn observed(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    lab.of_shape(parameters)?;
    let n = count(parameters, "tokens");
    let config = lab.model().config;
    let step = Step::prefill(&tokens(7, n, config.vocab), 0, table(n));
    let on = device(parameters);
    let mut backend =
        lab.backend(on, Room::of(n), fault.filter(|f| *f == "disturbed").map(|_| Wrong::UlpWhenObserved))?;
    let plain = logits(&mut *backend, &step)?;
    let filter = match fault {
        // A harness that forgets a stage.
        Some("stage-missed") => {
            let stages: BTreeSet<Stage> =
                Stage::ALL.into_iter().filter(|&stage| stage != Stage::Attend).collect();
            Filter { stages: Some(stages), ..Filter::default() }
        }
        _ => Filter::default(),
    };
    let start = Instant::now();
    let mut traced = Trace::watch(backend, filter, true);
    let watched = logits(&mut traced, &step)?;
    let trace = Trace::of(traced);
    let seconds = start.elapsed().as_secs_f64();
    let mut tally = Tally::default();
    tally.compare("plain and observed", &plain, &watched)?;
    let (want, got) = (captures(&config, trace.inside), trace.entries.len());
    if got != want {
        return Err(Miss::failed(format!("{got} buffers were captured, of {want}")));
    }
    if let Some(most) = parameters.number("seconds_at_most").filter(|&most| seconds > most) {
        return Err(Miss::failed(format!("{seconds:.1} s, more than {most}")));
    }
    let mut figures = tally.figures();
    figures.insert("buffers".into(), got.into());
    figures.insert("inside".into(), trace.inside.into());
    figures.insert("seconds".into(), ((seconds * 1e3).round() / 1e3).into());
    Ok(figures)
}

/// Buffers that a whole forward writes, `inside` stages too if that can be seen.
fn captures(config: &Config, inside: bool) -> usize {
    let of = |stage: Stage| stage.writes().len() + if inside { stage.inside().len() } else { 0 };
    let ffn: &[Stage] = match config.ffn {
        Ffn::Dense { .. } => &[Stage::FeedForward],
        Ffn::Moe(_) => &[Stage::Route, Stage::ExpertsUp, Stage::ExpertsDown],
    };
    let attention = [Stage::Qkv, Stage::RopeStore, Stage::Attend, Stage::AttnOut];
    let layer: usize = attention.iter().chain(ffn).map(|&stage| of(stage)).sum();
    of(Stage::Embed) + config.layers * layer + of(Stage::Head)
}

/// The CPU and a device on models in which any two types meet within a layer: the widths of the model at
/// hand, few experts.
pub(super) fn types(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let names = parameters.texts("types");
    let types: Result<Vec<Dtype>, _> = names.iter().map(|name| name.parse::<Dtype>()).collect();
    let types = types.map_err(|error| Miss::unable(error.to_string()))?;
    let n = count(parameters, "tokens");
    let right = device(parameters).to_owned();
    let mut tally = Tally::default();
    for &first in &types {
        for &second in &types {
            let model = of_types(&lab.model().config, &types, first, second);
            let place = format!("{first} and {second}");
            let other = match fault {
                Some(_) => misread(&model).unwrap_or_else(|| model.clone()),
                None => model.clone(),
            };
            let mut pair =
                [lab.place(&model, "cpu", Room::of(n + 1))?, lab.place(&other, &right, Room::of(n + 1))?];
            let ids = tokens(3, n + 1, model.config.vocab);
            // A prompt and a token by itself: two kinds of kernels.
            let steps =
                [Step::prefill(&ids[..n], 0, table(n + 1)), Step::prefill(&ids[n..], n as u32, table(n + 1))];
            for step in &steps {
                let [left, right] = &mut pair;
                let (l, r) = (logits(&mut *left.backend, step)?, logits(&mut *right.backend, step)?);
                tally.compare(&format!("{place}, {} tokens", step.rows.len()), &l, &r)?;
            }
        }
    }
    tally.done()
}

/// A model of `like`'s widths whose `attn_v` and down projections are `second` in layer 0 and `first` in layer 1, and
/// everything else the other way round. Layer 2 has all of `types`, one matrix each and in turn: so all models of one
/// list have the same types, and one set of compiled kernels serves them.
fn of_types(like: &Config, types: &[Dtype], first: Dtype, second: Dtype) -> Arc<Model> {
    let ffn = match like.ffn {
        Ffn::Moe(moe) => Ffn::Moe(Moe { experts: moe.used.max(4), ..moe }),
        dense @ Ffn::Dense { .. } => dense,
    };
    let shape = Shape { config: Config { layers: 3, vocab: 300, ffn, ..*like }, tied: false };
    let next = Cell::new(0);
    let dtype = |spec: &Spec| {
        if spec.dims.len() == 1 || spec.name.contains("gate_inp") {
            return Dtype::F32;
        }
        if spec.layer == Some(2) {
            return types[next.replace(next.get() + 1) % types.len()];
        }
        let sensitive = spec.name.contains("attn_v") || spec.name.contains("ffn_down");
        if sensitive == (spec.layer == Some(0)) { second } else { first }
    };
    Arc::new(synth::model(&shape, 11, dtype))
}
