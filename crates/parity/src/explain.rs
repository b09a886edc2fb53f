//! What the failing places share that the passing ones lack, ranked.
//!
//! Places are of four kinds: the stage in every layer, every projection of every layer, the outputs of the failing stage, and
//! the elements of the failing row's input. A feature is worth showing if most failing places have it and it makes failing likelier.

use std::collections::{BTreeMap, BTreeSet};

use gguf::Tensor;
use model::{Buffer, Ffn, Model, Stage};

use crate::localise::{Localised, suspects};
use crate::pair::Capture;
use crate::place::Place;
use crate::report::{Cell, Feature, Status};
use crate::trace::per_expert;

/// Places with their features, and whether each fails.
#[derive(Default)]
struct Tally {
    /// Of a feature: failing and passing places that have it.
    with: BTreeMap<String, [usize; 2]>,
    failing: usize,
    passing: usize,
}

impl Tally {
    fn add(&mut self, fails: bool, features: impl IntoIterator<Item = String>) {
        let side = usize::from(!fails);
        if fails {
            self.failing += 1;
        } else {
            self.passing += 1;
        }
        for feature in features {
            self.with.entry(feature).or_default()[side] += 1;
        }
    }

    /// Features that half of the failing places have, and of whose places half fail; the best first.
    fn ranked(self, among: &str) -> Vec<Feature> {
        let (failing, passing) = (self.failing, self.passing);
        if failing == 0 || passing == 0 {
            return Vec::new();
        }
        let base = failing as f64 / (failing + passing) as f64;
        let feature = |(text, [f, p]): (String, [usize; 2])| {
            let lift = f as f64 / (f + p) as f64 / base;
            let among = among.to_owned();
            Feature { among, text, failing_with: f, failing, passing_with: p, passing, lift }
        };
        let telling =
            |f: &Feature| 2 * f.failing_with >= f.failing && f.failing_with >= f.passing_with && f.lift > 1.0;
        let mut all: Vec<Feature> = self.with.into_iter().map(feature).filter(telling).collect();
        all.sort_by(|a, b| score(b).total_cmp(&score(a)).then_with(|| a.text.cmp(&b.text)));
        all.truncate(4);
        all
    }
}

/// The harmonic mean of how many failing places have it and how many of those that have it fail.
fn score(f: &Feature) -> f64 {
    2.0 * f.failing_with as f64 / (f.failing + f.failing_with + f.passing_with) as f64
}

/// All kinds together, best first.
pub(crate) fn explain(
    model: &Model,
    walked: &[Cell],
    capture: &Capture,
    at: Option<&Localised>,
) -> Vec<Feature> {
    let mut all = layers(model, walked, capture, at).ranked("layers");
    all.extend(projections(model, walked).ranked("projections"));
    if let Some(at) = at {
        all.extend(outputs(model, capture, at).ranked("outputs"));
        all.extend(elements(at).ranked("elements"));
    }
    all.sort_by(|a, b| score(b).total_cmp(&score(a)).then_with(|| b.lift.total_cmp(&a.lift)));
    all
}

/// The same stage in each layer, on the inputs of the left: type of the tensor, and layer.
fn layers(model: &Model, walked: &[Cell], capture: &Capture, at: Option<&Localised>) -> Tally {
    let mut tally = Tally::default();
    let stems: Vec<String> = at
        .iter()
        .flat_map(|at| &at.location.tensors)
        .filter_map(|tensor| {
            tensor.name.strip_prefix("blk.")?.split_once('.').map(|(_, stem)| stem.to_owned())
        })
        .collect();
    for layer in 0..model.config.layers {
        let of_layer = walked.iter().filter(|cell| {
            cell.place.site.stage == capture.site.stage && cell.place.site.layer == Some(layer)
        });
        let cells: Vec<&Cell> = of_layer.collect();
        if cells.is_empty() {
            continue;
        }
        let fails = cells.iter().any(|cell| fails(cell));
        let types = stems.iter().filter_map(|stem| {
            let tensor = model.weights.named(&format!("blk.{layer}.{stem}"))?;
            Some(format!("type of {} = {}", stem.trim_end_matches(".weight"), tensor.dtype))
        });
        tally.add(fails, types.chain([format!("layer = {layer}")]));
    }
    tally
}

fn fails(cell: &Cell) -> bool {
    !matches!(cell.status, Status::Match | Status::Missing | Status::NanBoth)
}

/// Each product with a weight, on the inputs of the left: whether it is a matter of a type, whatever it is used for, or of
/// one projection, whatever its type.
fn projections(model: &Model, walked: &[Cell]) -> Tally {
    let mut by_weight: BTreeMap<&str, (&Tensor, bool)> = BTreeMap::new();
    for cell in walked.iter().filter(|cell| cell.status != Status::Missing) {
        let Place { site, buffer, .. } = cell.place;
        // What a stage makes of several products is none's own.
        if let [weight] = suspects(model, site, buffer, true)[..]
            && weight.dims.len() > 1
            && site.stage != Stage::Embed
        {
            by_weight.entry(&weight.name).or_insert((weight, false)).1 |= fails(cell);
        }
    }
    let mut tally = Tally::default();
    for (name, (weight, fails)) in by_weight {
        let stem =
            name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, stem)| stem);
        let projection = format!("projection = {}", stem.trim_end_matches(".weight"));
        tally.add(fails, [projection, format!("type = {}", weight.dtype)]);
    }
    tally
}

/// The values of the wrong buffer: position, rank, expert, lane patterns of the row, the alignment of the tensor's row, and
/// the size of what went in.
fn outputs(model: &Model, capture: &Capture, at: &Localised) -> Tally {
    let mut tally = Tally::default();
    let config = &model.config;
    let (rows, outputs) = (capture.step.rows.len(), capture.step.logits.len());
    let shape = at.buffer.shape(config, rows, outputs);
    let width = *shape.last().expect("every buffer has a dimension");
    let used = match config.ffn {
        Ffn::Moe(moe) => moe.used,
        Ffn::Dense { .. } => 1,
    };
    let lines = capture.left[&at.buffer].len() / width;
    let by_line: Vec<Vec<String>> =
        (0..lines).map(|line| of_line(capture, at.buffer, line, used, &shape)).collect();
    // Of a billion values a sample tells as much.
    let step = (lines * width / SAMPLE).max(1);
    let alignment = Alignment::of(model, capture, at);
    let sampled: BTreeSet<usize> = (0..lines * width).step_by(step).collect();
    for i in sampled.union(&at.wrong.iter().take(SAMPLE).copied().collect()) {
        let (line, column) = (i / width, i % width);
        let lanes = [32, 16, 8].map(|m| format!("{} % {m} = {}", column_name(at.buffer), column % m));
        let half = format!("{} = {column}", column_name(at.buffer));
        let value = f64::from(capture.left[&at.buffer][*i]);
        let large = (value.abs() > F16_MAX).then(|| "the value is beyond f16's 65504".to_owned());
        let alignment = alignment.as_ref().and_then(|alignment| alignment.feature(capture, *i));
        let features = by_line[line].iter().cloned().chain(lanes).chain([half]).chain(large).chain(alignment);
        tally.add(at.wrong.contains(i), features);
    }
    tally
}

/// Where the rows of the one tensor that is to blame begin, if not all at multiples of [`Alignment::BYTES`].
struct Alignment {
    /// Of a row.
    bytes: usize,
    /// Rows of an expert, or of the tensor.
    rows: usize,
    experts: bool,
}

impl Alignment {
    /// What a thread loads at once.
    const BYTES: usize = 16;

    fn of(model: &Model, capture: &Capture, at: &Localised) -> Option<Alignment> {
        let [tensor] = &at.location.tensors[..] else { return None };
        let tensor = model.weights.named(&tensor.name)?;
        let (bytes, experts) = (tensor.row_bytes(), tensor.dims.len() > 2);
        let rows = tensor.dims.get(1).copied()?;
        // A row of the tensor is a value of a row of the buffer.
        let lines =
            if experts { capture.inputs.get(&Buffer::Experts)?.len() } else { capture.step.rows.len() };
        let fits = experts == per_expert(at.buffer) && capture.left[&at.buffer].len() == lines * rows;
        (fits && !bytes.is_multiple_of(Alignment::BYTES)).then_some(Alignment { bytes, rows, experts })
    }

    /// Of value `i` of the buffer.
    fn feature(&self, capture: &Capture, i: usize) -> Option<String> {
        let expert = if self.experts { *capture.inputs[&Buffer::Experts].get(i / self.rows)? } else { 0.0 };
        // Ids are small integers, exact as f32.
        let start = (expert as usize * self.rows + i % self.rows) * self.bytes;
        let a = if start.is_multiple_of(Alignment::BYTES) { "a" } else { "no" };
        Some(format!("the tensor's row begins at {a} multiple of {} bytes", Alignment::BYTES))
    }
}

/// Values that are looked at, at most.
const SAMPLE: usize = 1 << 17;
/// The largest finite f16.
const F16_MAX: f64 = 65504.0;

fn column_name(buffer: Buffer) -> &'static str {
    match buffer {
        Buffer::Q | Buffer::K | Buffer::V | Buffer::CacheK | Buffer::CacheV | Buffer::Attn => "dimension",
        _ => "row",
    }
}

fn of_line(capture: &Capture, buffer: Buffer, line: usize, used: usize, shape: &[usize]) -> Vec<String> {
    let mut features = Vec::new();
    let per_row = shape[1..shape.len() - 1].iter().product::<usize>();
    let row = match buffer {
        Buffer::Logits => capture.step.logits[line] as usize, // `usize` is no narrower than u32
        _ => line / per_row,
    };
    let at = capture.step.rows[row];
    features.push(format!("position = {}", at.position));
    features.push(format!("sequence = {}", at.sequence));
    let tile = at.position as usize / model::BLOCK;
    features.push(if tile > 0 { "position >= 64".into() } else { "position < 64".into() });
    if at.position > 0 {
        features.push("position > 0".into());
    }
    if (at.position as usize).is_multiple_of(model::BLOCK) && at.position > 0 {
        features.push("position % 64 = 0".into());
    }
    let (first, last) = (row == 0, row + 1 == capture.step.rows.len());
    features.extend(first.then(|| "first row of the step".into()));
    features.extend(last.then(|| "last row of the step".into()));
    if per_expert(buffer) {
        features.push(format!("rank = {}", line % used));
        if let Some(chosen) = capture.inputs.get(&Buffer::Experts) {
            features.push(format!("expert = {}", chosen[line]));
        }
    } else if per_row > 1 {
        features.push(format!("head = {}", line % per_row));
        features.push(format!("head % 2 = {}", line % per_row % 2));
    }
    for (&input, values) in &capture.inputs {
        let lines = values.len() / (capture.step.rows.len() * if per_expert(input) { used } else { 1 });
        let start = if per_expert(input) && per_expert(buffer) { line * lines } else { row * lines };
        let Some(values) = values.get(start..start + lines) else { continue };
        let largest = values.iter().fold(0f64, |max, &v| max.max(f64::from(v).abs()));
        if largest > F16_MAX {
            features.push(format!("an input in {input} beyond f16's 65504"));
        }
        if values.iter().any(|v| !v.is_finite()) {
            features.push(format!("an input in {input} that is no number"));
        }
        let sums = values.chunks(32).map(|block| block.iter().map(|&v| f64::from(v)).sum::<f64>().abs());
        if largest <= F16_MAX && sums.fold(0.0, f64::max) > F16_MAX {
            features.push(format!("a sum of 32 inputs in {input} beyond f16's 65504"));
        }
    }
    features
}

/// The elements of the first wrong block: lanes and sub-blocks.
fn elements(at: &Localised) -> Tally {
    let mut tally = Tally::default();
    for &(k, wrong) in &at.elements {
        let lanes = [32, 16, 8, 4].map(|m| format!("element % {m} = {}", k % m));
        let sub =
            [format!("sub-block of 32 = {}", k % 256 / 32), format!("sub-block of 16 = {}", k % 256 / 16)];
        let half = if k % 256 < 128 { "first half of the block" } else { "second half of the block" };
        tally.add(wrong, lanes.into_iter().chain(sub).chain([half.into()]));
    }
    tally
}
