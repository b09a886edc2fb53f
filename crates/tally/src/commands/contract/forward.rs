//! Checks of one run of the forward: shape and finiteness, the router, and agreement with other implementations.

use std::sync::Arc;

use contract::{Figures, Miss, Parameters, Verdict};
use gguf::File;
use model::{BLOCK, Buffer, Config, Ffn, Model, Site, Stage, Step, forward};
use parity::{Comparison, Filter, Trace};
use safetensors::SafeTensors;

use super::lab::{Lab, Room, broke, logits, tokens};
use super::planted::Wrong;
use crate::device::Placed;

/// KV blocks from the first, for `n` positions.
pub(super) fn table(n: usize) -> Vec<u32> {
    // Far below 2^32: prompts of checks are short.
    (0..n.div_ceil(BLOCK) as u32).collect()
}

/// The device that a contract names; the CPU where it names none.
pub(super) fn device(parameters: &Parameters) -> &str {
    parameters.text("device").unwrap_or("cpu")
}

/// How many tokens a contract asks for.
pub(super) fn count(parameters: &Parameters, name: &str) -> usize {
    // Clamped to what any check can use, so that a slip in a contract does not ask for all memory.
    parameters.integer(name).unwrap_or(1).clamp(1, 1 << 16) as usize
}

/// Every buffer of a prompt, and its logits.
fn watched(
    lab: &mut Lab,
    parameters: &Parameters,
    wrong: Option<Wrong>,
) -> Result<(Trace, Vec<f32>, Config), Miss> {
    let n = count(parameters, "tokens");
    let config = lab.model().config;
    let mut traced =
        Trace::watch(lab.backend(device(parameters), Room::of(n), wrong)?, Filter::default(), true);
    let step = Step::prefill(&tokens(7, n, config.vocab), 0, table(n));
    let logits = logits(&mut traced, &step)?;
    Ok((Trace::of(traced), logits, config))
}

/// Every buffer of every stage has its shape, and nothing but numbers in it.
pub(super) fn finite(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let wrong = fault.map(|_| Wrong::NanInHidden);
    let (trace, logits, config) = watched(lab, parameters, wrong)?;
    let mut values = 0;
    for entry in &trace.entries {
        let (place, want) = (entry.place, entry.shape.iter().product::<usize>());
        let kept = entry.values.as_ref().map_or(0, Vec::len);
        if kept != want {
            return Err(Miss::failed(format!("{place}: {kept} values, of the shape {:?}", entry.shape)));
        }
        if let Some(first) = entry.summary.first {
            let bad = entry.summary.total - entry.summary.finite;
            return Err(Miss::failed(format!(
                "{place}: {bad} of {want} values are no numbers, the first at {first}"
            )));
        }
        values += want;
    }
    if logits.len() != config.vocab {
        return Err(Miss::failed(format!("{} logits of a vocabulary of {}", logits.len(), config.vocab)));
    }
    let counts = [("layers", config.layers), ("buffers", trace.entries.len()), ("values", values)];
    Ok(counts.into_iter().map(|(name, n)| (name.to_owned(), n.into())).collect())
}

/// The chosen experts of every row are valid, distinct and the best; their weights sum to 1.
pub(super) fn router(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let wrong =
        fault.map(|fault| if fault == "expert-twice" { Wrong::ExpertTwice } else { Wrong::WeightsTooLarge });
    let within = parameters.number("sum_within").unwrap_or(1e-6);
    let (trace, _, config) = watched(lab, parameters, wrong)?;
    let Ffn::Moe(moe) = config.ffn else { return Err(Miss::unable("the model has no router")) };
    let (mut worst, mut rows) = (0f64, 0);
    for layer in 0..config.layers {
        let read = |buffer| {
            let site = Site { stage: Stage::Route, layer: Some(layer) };
            let found = trace.entries.iter().find(|e| e.place.site == site && e.place.buffer == buffer);
            found
                .and_then(|entry| entry.values.as_deref())
                .ok_or_else(|| Miss::failed(format!("{site}: {buffer} was not captured")))
        };
        let (scores, ids, weights) =
            (read(Buffer::RouterLogits)?, read(Buffer::Experts)?, read(Buffer::ExpertWeights)?);
        let all = scores.chunks(moe.experts).zip(ids.chunks(moe.used)).zip(weights.chunks(moe.used));
        for (row, ((scores, ids), weights)) in all.enumerate() {
            let at = |what: String| Miss::failed(format!("layer {layer}, row {row}: {what}"));
            chosen(scores, ids).map_err(at)?;
            let sum: f64 = weights.iter().map(|&w| f64::from(w) / f64::from(moe.scale)).sum();
            let off = (sum - 1.0).abs();
            if moe.renormalise && (off.is_nan() || off > within) {
                return Err(at(format!("the weights sum to {sum}, not to 1 within {within:e}")));
            }
            if !weights.is_sorted_by(|a, b| a >= b && *b > 0.0) {
                return Err(at(format!("weights {weights:?} do not descend")));
            }
            worst = worst.max(off);
            rows += 1;
        }
    }
    if rows == 0 {
        return Err(Miss::failed("no row was routed"));
    }
    Ok(Figures::from_iter([("rows".into(), rows.into()), ("sum_off_by".into(), worst.into())]))
}

/// Whether `ids` are distinct experts, the best by `scores` (softmax keeps their order), lower ids first among equals.
fn chosen(scores: &[f32], ids: &[f32]) -> Result<(), String> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    // Ids are small integers, exact as f32.
    let got: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    if (0..got.len()).any(|i| got[..i].contains(&got[i])) {
        return Err(format!("experts {got:?} are not distinct"));
    }
    // Two scores so close that their probabilities round to the same are a tie, which the lower id wins.
    let tie = |a: usize, b: usize| (scores[a] - scores[b]).abs() <= 1e-6 * scores[a].abs().max(1.0);
    match got
        .iter()
        .zip(&order)
        .position(|(&got, &want)| got >= scores.len() || got != want && !tie(got, want))
    {
        Some(rank) => Err(format!("expert {} at rank {rank}, where {} is the best", got[rank], order[rank])),
        None => Ok(()),
    }
}

/// Logits against what Hugging Face transformers computed for the same files.
pub(super) fn transformers(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let (least, most) = bounds(parameters);
    let mut all = Seen::default();
    for name in parameters.texts("fixtures") {
        let bytes = lab.bytes(&format!("{name}.safetensors"))?;
        let fixture = Fixture::read(&bytes).map_err(|why| Miss::failed(format!("{name}: {why}")))?;
        let file = File::open(&lab.path(&format!("{name}.gguf"))).map_err(|e| Miss::unable(e.to_string()))?;
        let mut model = Model::load(&file).map_err(|error| Miss::failed(error.to_string()))?;
        if fault.is_some() {
            model.config.rope.base *= 1.01;
        }
        let n = fixture.ids.len();
        let vocab = model.config.vocab;
        let mut backend = lab.place(&Arc::new(model), device(parameters), Room::of(n))?.backend;
        let step = Step { logits: fixture.positions.clone(), ..Step::prefill(&fixture.ids, 0, table(n)) };
        let got = logits(&mut *backend, &step)?;
        all.add(name, &fixture.logits, &got, vocab)?;
    }
    all.judge(least, most)
}

/// Logits against the same forward in f64.
pub(super) fn oracle(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let (least, most) = bounds(parameters);
    let n = count(parameters, "tokens");
    let mut model = lab.model();
    let step = Step::prefill(&tokens(7, n, model.config.vocab), 0, table(n));
    let Placed { mut backend, .. } = lab.place(&model, "oracle", Room::of(n))?;
    let want = logits(&mut *backend, &step)?;
    if fault.is_some()
        && let Ffn::Moe(moe) = &mut Arc::make_mut(&mut model).config.ffn
    {
        moe.renormalise = !moe.renormalise;
    }
    let mut backend = lab.place(&model, device(parameters), Room::of(n))?.backend;
    forward(&mut backend, &step).map_err(broke)?;
    let got = backend.logits().map_err(broke)?;
    let mut seen = Seen::default();
    seen.add("the last token", &want, got, model.config.vocab)?;
    seen.judge(least, most)
}

/// The least cosine and the largest error that a contract allows, the latter in deviations of the logits.
fn bounds(parameters: &Parameters) -> (f64, f64) {
    let bound = |name, default| parameters.number(name).unwrap_or(default);
    (bound("cosine_at_least", 0.9999), bound("error_at_most", f64::INFINITY))
}

/// How far apart logits were, at the worst.
struct Seen {
    rows: usize,
    cosine: f64,
    /// In standard deviations of a row's logits.
    error: f64,
    place: String,
}

impl Default for Seen {
    fn default() -> Seen {
        Seen { rows: 0, cosine: 1.0, error: 0.0, place: String::new() }
    }
}

impl Seen {
    fn add(&mut self, name: &str, want: &[f32], got: &[f32], vocab: usize) -> Result<(), Miss> {
        if want.len() != got.len() {
            return Err(Miss::failed(format!(
                "{name}: {} logits, and {} to compare them with",
                got.len(),
                want.len()
            )));
        }
        for (row, (want, got)) in want.chunks_exact(vocab).zip(got.chunks_exact(vocab)).enumerate() {
            let place = format!("{name}, row {row}");
            let compared = Comparison::of(want, got);
            let cosine = compared.apart.and_then(|apart| apart.cosine);
            let cosine =
                cosine.ok_or_else(|| Miss::failed(format!("{place}: not every logit is a number")))?;
            let mean = want.iter().map(|&v| f64::from(v)).sum::<f64>() / vocab as f64;
            let variance = want.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / vocab as f64;
            let error = compared.max_abs.map_or(0.0, |(_, abs)| abs) / variance.sqrt();
            if error > self.error {
                (self.error, self.place) = (error, place);
            }
            self.cosine = self.cosine.min(cosine);
            self.rows += 1;
        }
        Ok(())
    }

    fn judge(self, least: f64, most: f64) -> Verdict {
        let figures = Figures::from_iter([
            ("rows".into(), self.rows.into()),
            ("least_cosine".into(), self.cosine.into()),
            ("largest_error_in_deviations".into(), self.error.into()),
        ]);
        if self.rows == 0 {
            return Err(Miss::failed("no logits were compared"));
        }
        if self.cosine >= least && self.error <= most {
            return Ok(figures);
        }
        let why = format!(
            "cosine {} (at least {least}), error {} deviations (at most {most}), worst at {}",
            self.cosine, self.error, self.place
        );
        Err(Miss::Failed { why, figures })
    }
}

/// What transformers computed: made by tools/fixtures/transformers_logits.py.
struct Fixture {
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// `[positions, V]`.
    logits: Vec<f32>,
}

impl Fixture {
    fn read(bytes: &[u8]) -> Result<Fixture, String> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let words = |name: &str| -> Result<Vec<u32>, String> {
            let tensor = tensors.tensor(name).map_err(|error| error.to_string())?;
            Ok(tensor.data().as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
        };
        let logits = words("logits_f32")?.into_iter().map(f32::from_bits).collect();
        Ok(Fixture { ids: words("ids")?, positions: words("positions")?, logits })
    }
}
