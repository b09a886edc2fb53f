//! What the answers of both sides say of each stage: which tensor, expert, row, block and element, or why it is none.

use std::collections::BTreeSet;

use gguf::Tensor;
use model::{Buffer, Stage};

use super::probe::{Part, Probe};
use super::suspects::{outline, shared_norm, suspects};
use super::wrong_in;
use crate::bench::fresh;
use crate::bisect::BisectError;
use crate::place::Number;
use crate::report::{Count, Location, TensorPlace};

/// Values of a line that a probe leaves as they are.
const BLOCK: usize = 256;

impl Probe<'_, '_> {
    /// Fills in the tensors, and returns the elements of the first wrong block with whether they err.
    pub(super) fn tensors(&mut self, location: &mut Location) -> Result<Vec<(usize, bool)>, BisectError> {
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
        let block = wrong.first().map(|k| k / BLOCK);
        let places = self.norm_places(&wrong, d, [location.left, location.right]);
        location.tensors = places.map(|place| TensorPlace { block, ..place }).collect();
    }

    /// The norms that the buffer depends on, with their `wrong` elements of `total`.
    fn norm_places(
        &self,
        wrong: &BTreeSet<usize>,
        total: usize,
        contribution: [Number; 2],
    ) -> impl Iterator<Item = TensorPlace> {
        suspects(self.model, self.site(), self.buffer, true).into_iter().map(move |norm| TensorPlace {
            row: Some(0),
            rows: Count { of: 1, total: 1 },
            element: wrong.first().copied(),
            elements: Some(Count { of: wrong.len(), total }),
            contribution: Some(contribution),
            ..outline(norm)
        })
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
        let contribution = [Number(left[first]), Number(right[first])];
        location.tensors = self.norm_places(&elements, hd, contribution).collect();
        location.notes.push("wrong at position 0 as well, where nothing is rotated: the heads' norm".into());
        Ok(())
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
