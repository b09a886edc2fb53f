//! From a stage that errs to the weight: which tensor, expert, row, block and element.
//!
//! The buffer that is wrong names the tensor and the row; which part of the row is wrong is asked of both sides by
//! inputs that are zero but in one block, then in one element. A product is linear and its blocks are independent, so
//! what such an input comes to is the fault of that part alone.

use std::collections::BTreeSet;

use gguf::Tensor;
use model::{Buffer, Config, Ffn, FfnWeights, LayerWeights, Model, Site, Stage};

use crate::bench::{Bench, Values, fresh};
use crate::bisect::BisectError;
use crate::judge::Judge;
use crate::pair::Capture;
use crate::place::Number;
use crate::report::{Count, Location, TensorPlace};
use crate::trace::per_expert;

/// Values of a line that a probe leaves as they are.
const BLOCK: usize = 256;

/// The part of a location that explanation looks at further.
pub(crate) struct Localised {
    pub(crate) location: Location,
    /// The buffer that is wrong.
    pub(crate) buffer: Buffer,
    /// Where in it.
    pub(crate) wrong: BTreeSet<usize>,
    /// Of the row's input: which elements of the first wrong block err.
    pub(crate) elements: Vec<(usize, bool)>,
}

/// Asks both sides until the place is known.
pub(crate) fn localise(
    model: &Model,
    bench: Option<&mut Bench<'_>>,
    judge: &Judge,
    capture: &Capture,
) -> Result<Option<Localised>, BisectError> {
    let Some((buffer, wrong)) = first_wrong(&model.config, judge, capture) else { return Ok(None) };
    let config = &model.config;
    let shape = shape_of(config, capture, buffer);
    let index = unravel(wrong[0], &shape);
    let row = match buffer {
        // Indices of rows: `usize` is no narrower than u32.
        Buffer::Logits => capture.step.logits[index[0]] as usize,
        _ => index[0],
    };
    let at = capture.step.rows[row];
    let mut location = Location {
        buffer: buffer.name().into(),
        index: index.clone(),
        row,
        token: at.token,
        position: at.position,
        left: Number(capture.left[&buffer][wrong[0]]),
        right: Number(capture.right[&buffer][wrong[0]]),
        wrong: wrong.len(),
        total: capture.left[&buffer].len(),
        tensors: Vec::new(),
        notes: Vec::new(),
    };
    let mut elements = Vec::new();
    if let Some(bench) = bench {
        let mut probe = Probe { model, bench, judge, capture, buffer, shape, wrong: &wrong };
        elements = probe.tensors(&mut location)?;
    } else {
        let tensors = suspects(model, capture.site, buffer, true);
        location.tensors = tensors.iter().map(|t| outline(t)).collect();
        location.notes.push("a dump cannot be probed: block and element are not known".into());
    }
    Ok(Some(Localised { location, buffer, wrong: wrong.into_iter().collect(), elements }))
}

fn shape_of(config: &Config, capture: &Capture, buffer: Buffer) -> Vec<usize> {
    buffer.shape(config, capture.step.rows.len(), capture.step.logits.len())
}

/// The first buffer in which the two part, and where in it.
pub(crate) fn first_wrong(config: &Config, judge: &Judge, capture: &Capture) -> Option<(Buffer, Vec<usize>)> {
    let outputs = capture.site.stage.inside().iter().chain(capture.site.stage.writes());
    outputs.copied().find_map(|buffer| {
        let wrong = wrong_in(config, judge, capture, buffer);
        (!wrong.is_empty()).then_some((buffer, wrong))
    })
}

fn wrong_in(config: &Config, judge: &Judge, capture: &Capture, buffer: Buffer) -> Vec<usize> {
    let (Some(left), Some(right)) = (capture.left.get(&buffer), capture.right.get(&buffer)) else {
        return Vec::new();
    };
    let line = *shape_of(config, capture, buffer).last().expect("every buffer has a dimension");
    judge.wrong(left, right, line, judge.limit(capture.site.stage, buffer, 0))
}

/// Coordinates of a row-major index.
fn unravel(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut coordinates: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let c = index % n;
            index /= n;
            c
        })
        .collect();
    coordinates.reverse();
    coordinates
}

/// The tensors whose fault a wrong buffer can be, likeliest first. Without the inside, what is wrong within the experts
/// shows in what the stage hands on.
fn suspects(model: &Model, site: Site, buffer: Buffer, inside: bool) -> Vec<&Tensor> {
    let weights = &model.weights;
    let Some(layer) = site.layer else {
        return match site.stage {
            Stage::Embed => vec![&weights.token_embd],
            _ => vec![&weights.output],
        };
    };
    let w: &LayerWeights = &weights.layers[layer];
    let (router, gate, up, down) = match &w.ffn {
        FfnWeights::Dense { gate, up, down } => (None, gate, up, down),
        FfnWeights::Moe { gate_inp, gate, up, down } => (Some(gate_inp), gate, up, down),
    };
    match (site.stage, buffer) {
        (Stage::Qkv, Buffer::Q) => vec![&w.attn_q],
        (Stage::Qkv, Buffer::K) => vec![&w.attn_k],
        (Stage::Qkv, _) => vec![&w.attn_v],
        (Stage::RopeStore, Buffer::Q) => vec![&w.attn_q_norm],
        (Stage::RopeStore, Buffer::CacheK) => vec![&w.attn_k_norm],
        (Stage::AttnOut, _) => vec![&w.attn_output],
        (Stage::Route, Buffer::Normed) => vec![&w.ffn_norm],
        (Stage::Route, Buffer::RouterLogits) => router.into_iter().collect(),
        (_, Buffer::Gate) => vec![gate],
        (_, Buffer::Up) => vec![up],
        (_, Buffer::Down) => vec![down],
        (Stage::ExpertsUp, Buffer::Hidden) if !inside => vec![gate, up],
        (Stage::ExpertsDown, Buffer::X) if !inside => vec![down],
        (Stage::FeedForward, Buffer::X) if !inside => vec![gate, up, down],
        _ => Vec::new(),
    }
}

/// The norm before a stage's products, whose fault all of them share.
fn shared_norm(model: &Model, site: Site) -> Option<&Tensor> {
    let layer = site.layer.map(|layer| &model.weights.layers[layer]);
    match site.stage {
        Stage::Qkv => Some(&layer?.attn_norm),
        Stage::FeedForward => Some(&layer?.ffn_norm),
        Stage::Head => Some(&model.weights.output_norm),
        _ => None,
    }
}

fn outline(tensor: &Tensor) -> TensorPlace {
    TensorPlace {
        name: tensor.name.to_string(),
        dtype: tensor.dtype.to_string(),
        expert: None,
        experts: Vec::new(),
        row: None,
        rows: Count { of: 0, total: 0 },
        block: None,
        block_len: tensor.dtype.block_len(),
        blocks: None,
        element: None,
        elements: None,
        contribution: None,
    }
}

/// Which part of an input a probe leaves.
#[derive(Clone, Copy)]
enum Part {
    /// This block as it is.
    Block(usize),
    /// 1 at this element.
    One(usize),
    /// Nothing.
    Nothing,
    /// All of it.
    Whole,
}

struct Probe<'a, 'b> {
    model: &'a Model,
    bench: &'a mut Bench<'b>,
    judge: &'a Judge,
    capture: &'a Capture,
    buffer: Buffer,
    shape: Vec<usize>,
    wrong: &'a [usize],
}

impl Probe<'_, '_> {
    fn site(&self) -> Site {
        self.capture.site
    }

    /// Fills in the tensors, and returns the elements of the first wrong block with whether they err.
    fn tensors(&mut self, location: &mut Location) -> Result<Vec<(usize, bool)>, BisectError> {
        match self.site().stage {
            Stage::Embed => self.embedding(location),
            Stage::RopeStore => self.heads(location)?,
            Stage::Attend => {}
            Stage::Route if self.buffer == Buffer::Normed => self.norm_itself(location),
            Stage::Route if self.buffer != Buffer::RouterLogits => {
                location.notes.push("the scores are right: the choice of experts is wrong".into());
            }
            _ => return self.products(location),
        }
        Ok(Vec::new())
    }

    fn embedding(&self, location: &mut Location) {
        let table = &self.model.weights.token_embd;
        let (d, block) = (location.index[1], table.dtype.block_len());
        let row = location.row * self.shape[1]..(location.row + 1) * self.shape[1];
        let wrong: Vec<usize> =
            self.wrong.iter().filter(|i| row.contains(i)).map(|i| i - row.start).collect();
        let blocks: BTreeSet<usize> = wrong.iter().map(|k| k / block).collect();
        let in_block = wrong.iter().filter(|&k| k / block == d / block).count();
        let rows: BTreeSet<usize> = self.wrong.iter().map(|i| i / self.shape[1]).collect();
        location.tensors = vec![TensorPlace {
            row: Some(location.token as usize), // `usize` is no narrower
            rows: Count { of: rows.len(), total: self.shape[0] },
            block: Some(d / block),
            blocks: Some(Count { of: blocks.len(), total: self.shape[1].div_ceil(block) }),
            element: Some(d),
            elements: Some(Count { of: in_block, total: block }),
            contribution: Some([location.left, location.right]),
            ..outline(table)
        }];
    }

    /// A norm whose output is a buffer of its own: its elements are the buffer's.
    fn norm_itself(&self, location: &mut Location) {
        let d = self.shape[1];
        let wrong: BTreeSet<usize> = self.wrong.iter().map(|i| i % d).collect();
        let norm = suspects(self.model, self.site(), self.buffer, true);
        location.tensors = norm
            .iter()
            .map(|norm| TensorPlace {
                row: Some(0),
                rows: Count { of: 1, total: 1 },
                block: wrong.first().map(|k| k / BLOCK),
                element: wrong.first().copied(),
                elements: Some(Count { of: wrong.len(), total: d }),
                contribution: Some([location.left, location.right]),
                ..outline(norm)
            })
            .collect();
    }

    /// The heads' norm is told from the rotation by position 0, which is not rotated.
    fn heads(&mut self, location: &mut Location) -> Result<(), BisectError> {
        if self.buffer == Buffer::CacheV {
            location.notes.push("values are stored as they come: storing is wrong".into());
            return Ok(());
        }
        let inputs = self.rows(&[location.row], |_, _| {});
        let step = fresh(&[location.token]);
        let [left, right] = self.bench.ask(&step, self.site(), &inputs, &[self.buffer])?;
        let (left, right) = (&left[&self.buffer], &right[&self.buffer]);
        let hd = self.model.config.head_dim;
        let limit = self.judge.limit(Stage::RopeStore, self.buffer, 0);
        let wrong = self.judge.wrong(left, right, hd, limit);
        let Some(&first) = wrong.first() else {
            let note = "right at position 0, where nothing is rotated: the heads' norm is right, and the rotation or the \
                        position is wrong";
            location.notes.push(note.into());
            return Ok(());
        };
        let elements: BTreeSet<usize> = wrong.iter().map(|i| i % hd).collect();
        let norm = suspects(self.model, self.site(), self.buffer, true);
        location.tensors = norm
            .iter()
            .map(|norm| TensorPlace {
                row: Some(0),
                rows: Count { of: 1, total: 1 },
                element: elements.first().copied(),
                elements: Some(Count { of: elements.len(), total: hd }),
                contribution: Some([Number(left[first]), Number(right[first])]),
                ..outline(norm)
            })
            .collect();
        location.notes.push("wrong at position 0 as well, where nothing is rotated: the heads' norm".into());
        Ok(())
    }

    /// The failing rows' inputs, a row for each of `rows`, with `change` applied to each (row of the result, inputs).
    fn rows(&self, rows: &[usize], change: impl Fn(usize, &mut Values)) -> Values {
        let config = &self.model.config;
        let mut all = Values::new();
        for (at, &row) in rows.iter().enumerate() {
            let mut inputs = Values::new();
            for (&buffer, values) in &self.capture.inputs {
                let len = values.len() / buffer.shape(config, self.capture.step.rows.len(), 0)[0];
                inputs.insert(buffer, values[row * len..][..len].to_vec());
            }
            change(at, &mut inputs);
            for (buffer, values) in inputs {
                all.entry(buffer).or_default().extend(values);
            }
        }
        all
    }

    fn products(&mut self, location: &mut Location) -> Result<Vec<(usize, bool)>, BisectError> {
        let site = self.site();
        let inside = self.bench.inside;
        // All buffers of the stage that are wrong on inputs that are right: each has tensors of its own.
        let mut wrong_buffers = vec![self.buffer];
        for &other in site.stage.inside().iter().chain(site.stage.writes()) {
            let independent = matches!(other, Buffer::K | Buffer::V | Buffer::Up) && other != self.buffer;
            if independent && !wrong_in(&self.model.config, self.judge, self.capture, other).is_empty() {
                wrong_buffers.push(other);
            }
        }
        let tensors: Vec<&Tensor> =
            wrong_buffers.iter().flat_map(|&b| suspects(self.model, site, b, inside)).collect();
        let (width, rank) = (self.width(), self.rank(location)?);
        let column = self.wrong[0] % width;
        let columns: BTreeSet<usize> = self.failing_columns(location.row, rank, width);
        let mut places: Vec<TensorPlace> = tensors.iter().map(|t| outline(t)).collect();
        for place in &mut places {
            place.row = Some(column);
            place.rows = Count { of: columns.len(), total: width };
            if let Some(chosen) = self.capture.inputs.get(&Buffer::Experts) {
                let experts = self.failing_experts(chosen, rank);
                place.expert = experts.first().copied();
                place.experts = experts;
            }
        }
        let Some(input) = self.input() else {
            location.tensors = places;
            location.notes.push(
                "the input of this product lies within the stage: block and element are not known".into(),
            );
            return Ok(Vec::new());
        };
        if places.is_empty() {
            location.notes.push(self.no_tensor().into());
            return Ok(Vec::new());
        }
        let k = self.capture.inputs[&input].len() / self.lines(input);
        let unit = if k.is_multiple_of(BLOCK) { BLOCK } else { 32 };
        let ends = self.answers(input, unit, location.row, rank, &[Part::Whole, Part::Nothing])?;
        let [whole, nothing] = &ends[..] else { unreachable!("an answer to each part") };
        if !self.column_is_wrong(whole, column) {
            location.notes.push(self.right_alone().into());
            return Ok(Vec::new());
        }
        let [left, right] = nothing;
        if right[column].is_finite() && self.column_is_wrong(nothing, column) {
            let values = format!("left {}, right {}", Number(left[column]), Number(right[column]));
            location.notes.push(format!(
                "wrong on an input of zeros as well ({values}), where no weight counts: it does not read the input that it \
                 is given, or adds what it should not"
            ));
            return Ok(Vec::new());
        }
        let parts: Vec<Part> = (0..k.div_ceil(unit)).map(Part::Block).collect();
        let answers = self.answers(input, unit, location.row, rank, &parts)?;
        let blocks: Vec<usize> =
            (0..parts.len()).filter(|&b| self.column_is_wrong(&answers[b], column)).collect();
        let Some(&block) = blocks.first() else {
            location.tensors = places;
            let note = "no block of the input alone brings the error about: it needs values of the whole row, or their size";
            location.notes.push(note.into());
            return Ok(Vec::new());
        };
        let ones: Vec<Part> = (block * unit..((block + 1) * unit).min(k)).map(Part::One).collect();
        let single = self.answers(input, unit, location.row, rank, &ones)?;
        let elements: Vec<(usize, bool)> = single
            .iter()
            .enumerate()
            .map(|(i, answer)| (block * unit + i, self.column_is_wrong(answer, column)))
            .collect();
        let first = elements.iter().position(|(_, wrong)| *wrong);
        for place in &mut places {
            place.block = Some(block);
            if place.block_len != unit {
                location.notes.push(format!("blocks are counted by {unit} values of the row"));
            }
            place.blocks = Some(Count { of: blocks.len(), total: parts.len() });
            place.element = first.map(|i| block * unit + i);
            place.elements = Some(Count {
                of: elements.iter().filter(|(_, wrong)| *wrong).count(),
                total: elements.len(),
            });
            place.contribution = first.map(|i| single[i].clone().map(|line| Number(line[column])));
        }
        location.notes.dedup();
        let norm = shared_norm(self.model, site).filter(|_| wrong_buffers.len() > 1 || tensors.len() == 1);
        match (norm, first) {
            (Some(norm), Some(i)) if self.all_outputs_wrong() && scaled(&single[i]) => {
                let place = places.swap_remove(0);
                location
                    .notes
                    .push("every output of the stage is off by the same factor: the norm before them".into());
                let rows = Count { of: 1, total: 1 };
                location.tensors = vec![TensorPlace {
                    row: Some(0),
                    rows,
                    expert: None,
                    block: place.block,
                    ..outline(norm)
                }];
                let target = &mut location.tensors[0];
                (target.blocks, target.element, target.elements) =
                    (place.blocks, place.element, place.elements);
                target.contribution = place.contribution;
            }
            _ => location.tensors = places,
        }
        Ok(elements)
    }

    /// Whether a stage with several products errs in all of them.
    fn all_outputs_wrong(&self) -> bool {
        let of = |buffer: &Buffer| {
            self.capture
                .left
                .get(buffer)
                .is_none_or(|_| !wrong_in(&self.model.config, self.judge, self.capture, *buffer).is_empty())
        };
        self.site().stage.writes().iter().all(of)
            && (self.site().stage != Stage::FeedForward || [Buffer::Gate, Buffer::Up].iter().all(of))
    }

    /// What it means that the row's product is right by itself: in a step of its own, with nothing to add it to.
    fn right_alone(&self) -> &'static str {
        match self.site().stage {
            Stage::AttnOut | Stage::ExpertsDown => {
                "the product by itself is right: adding it into x is wrong, or it depends on the row's place in the step"
            }
            _ => {
                "the row in a step of its own is right: it depends on the row's place in the step, or on other rows"
            }
        }
    }

    fn no_tensor(&self) -> &'static str {
        match (self.site().stage, self.buffer) {
            (Stage::ExpertsUp | Stage::FeedForward, Buffer::Hidden) => {
                "gate and up are right: SwiGLU is wrong"
            }
            (Stage::ExpertsDown, Buffer::X) => {
                "the experts' outputs are right: weighting them, or adding them into x, is wrong"
            }
            (Stage::FeedForward, Buffer::X) => "the down projection is right: adding it into x is wrong",
            _ => "no product is wrong",
        }
    }

    /// The buffer that the wrong product multiplies, if it can be replaced.
    fn input(&self) -> Option<Buffer> {
        match (self.site().stage, self.buffer) {
            (Stage::AttnOut, _) => Some(Buffer::Attn),
            (Stage::ExpertsUp, _) => Some(Buffer::Normed),
            (Stage::ExpertsDown, _) => Some(Buffer::Hidden),
            (Stage::FeedForward, Buffer::Down | Buffer::Hidden | Buffer::X) => None,
            _ => Some(Buffer::X),
        }
    }

    fn lines(&self, buffer: Buffer) -> usize {
        let shape = buffer.shape(&self.model.config, self.capture.step.rows.len(), 0);
        if per_expert(buffer) { shape[0] * shape[1] } else { shape[0] }
    }

    /// Rows of the tensor behind the wrong buffer: its values for one row, or one row and expert, heads together.
    fn width(&self) -> usize {
        self.shape[if per_expert(self.buffer) { 2 } else { 1 }..].iter().product()
    }

    fn used(&self) -> usize {
        match self.model.config.ffn {
            Ffn::Moe(moe) => moe.used,
            Ffn::Dense { .. } => 1,
        }
    }

    /// The rank whose expert errs: read off the buffer where it has one, else asked, one expert weighted at a time.
    fn rank(&mut self, location: &Location) -> Result<usize, BisectError> {
        if per_expert(self.buffer) {
            return Ok(location.index[1]);
        }
        if self.site().stage != Stage::ExpertsDown {
            return Ok(0);
        }
        let width = self.shape[1];
        let column = location.index[1];
        for rank in 0..self.used() {
            let inputs = self.rows(&[location.row], |_, inputs| only_rank(inputs, rank));
            let step = fresh(&[location.token]);
            let [left, right] = self.bench.ask(&step, self.site(), &inputs, &[Buffer::X])?;
            let limit = self.judge.limit(Stage::ExpertsDown, Buffer::X, 0);
            let wrong = self.judge.wrong(&left[&Buffer::X], &right[&Buffer::X], width, limit);
            if wrong.contains(&column) {
                return Ok(rank);
            }
        }
        Ok(0)
    }

    /// The wrong columns of the line of the first wrong value.
    fn failing_columns(&self, row: usize, rank: usize, width: usize) -> BTreeSet<usize> {
        let line = if per_expert(self.buffer) { row * self.used() + rank } else { self.wrong[0] / width };
        self.wrong.iter().filter(|&&i| i / width == line).map(|i| i % width).collect()
    }

    /// The experts whose lines err, the first wrong one first.
    fn failing_experts(&self, chosen: &[f32], rank: usize) -> Vec<usize> {
        let (used, width) = (self.used(), self.width());
        let mut experts: Vec<usize> = Vec::new();
        for &i in self.wrong {
            let pair = if per_expert(self.buffer) { i / width } else { i / width * used + rank };
            let expert = chosen[pair] as usize; // a small integer, exact as f32
            if !experts.contains(&expert) {
                experts.push(expert);
            }
        }
        experts
    }

    /// What both sides make of the failing row with only a part of its input, as the line of the wrong buffer. As many
    /// rows at a time as the stage had, since one row and many rows may be different kernels.
    fn answers(
        &mut self,
        input: Buffer,
        unit: usize,
        row: usize,
        rank: usize,
        parts: &[Part],
    ) -> Result<Vec<[Vec<f32>; 2]>, BisectError> {
        let rows = match self.site().stage {
            Stage::Head => self.capture.step.logits.len(),
            _ => self.capture.step.rows.len(),
        };
        let group = rows.min(self.bench.max_rows()).max(1);
        let (used, width) = (self.used(), self.width());
        let mut all = Vec::new();
        for parts in parts.chunks(group) {
            // The last group is filled up, so that every step has as many rows.
            let picked = |at: usize| parts[at.min(parts.len() - 1)];
            let inputs = self.rows(&vec![row; group], |at, inputs| {
                if matches!(self.site().stage, Stage::AttnOut | Stage::ExpertsDown) {
                    // What the product is added to.
                    inputs.entry(Buffer::X).and_modify(|x| x.fill(0.0));
                }
                if self.site().stage == Stage::ExpertsDown {
                    only_rank(inputs, rank);
                }
                let line = if per_expert(input) { rank } else { 0 };
                let values = inputs.entry(input).or_default();
                let k = if per_expert(input) { values.len() / used } else { values.len() };
                let kept = values[line * k..][..k].to_vec();
                values.fill(0.0);
                match picked(at) {
                    Part::Whole => values[line * k..][..k].copy_from_slice(&kept),
                    Part::Block(b) => {
                        let range = b * unit..((b + 1) * unit).min(k);
                        values[line * k..][range.clone()].copy_from_slice(&kept[range]);
                    }
                    Part::One(e) => values[line * k + e] = 1.0,
                    Part::Nothing => {}
                }
            });
            let step = fresh(&vec![self.capture.step.rows[row].token; group]);
            let [left, right] = self.bench.ask(&step, self.site(), &inputs, &[self.buffer])?;
            for at in 0..parts.len() {
                let line = if per_expert(self.buffer) { at * used + rank } else { at };
                all.push([&left, &right].map(|side| side[&self.buffer][line * width..][..width].to_vec()));
            }
        }
        Ok(all)
    }

    fn column_is_wrong(&self, [left, right]: &[Vec<f32>; 2], column: usize) -> bool {
        let limit = self.judge.limit(self.site().stage, self.buffer, 0);
        self.judge.wrong(left, right, left.len(), limit).contains(&column)
    }
}

/// Leaves one expert, with weight 1.
fn only_rank(inputs: &mut Values, rank: usize) {
    if let Some(weights) = inputs.get_mut(&Buffer::ExpertWeights) {
        weights.iter_mut().enumerate().for_each(|(r, w)| *w = if r == rank { 1.0 } else { 0.0 });
    }
    inputs.entry(Buffer::X).and_modify(|x| x.fill(0.0));
}

/// Whether one line is the other times a factor that is not 1, or nothing but NaN beside numbers.
fn scaled([left, right]: &[Vec<f32>; 2]) -> bool {
    if right.iter().all(|v| v.is_nan()) && left.iter().all(|v| v.is_finite()) {
        return true;
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let (ll, lr, rr) = (dot(left, left), dot(left, right), dot(right, right));
    let factor = lr / ll;
    // Twice the rounding of an activation in the coarser fixed point.
    let same_direction = (lr * lr - ll * rr).abs() <= 1e-4 * ll * rr;
    same_direction && (factor - 1.0).abs() > 1e-6
}
