//! Questions to both sides: a stage on the failing row's input, or on a part of it. What the answers mean is for
//! `stages.rs`.

use std::collections::BTreeSet;

use model::{Buffer, Ffn, Model, Site, Stage};

use crate::bench::{Bench, Values, fresh};
use crate::bisect::BisectError;
use crate::judge::Judge;
use crate::pair::Capture;
use crate::report::Location;
use crate::trace::per_expert;

/// Which part of an input a probe leaves.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// This block as it is.
    Block(usize),
    /// 1 at this element.
    One(usize),
    /// Nothing.
    Nothing,
    /// All of it.
    Whole,
}

pub(super) struct Probe<'a, 'b> {
    pub(super) model: &'a Model,
    pub(super) bench: &'a mut Bench<'b>,
    pub(super) judge: &'a Judge,
    pub(super) capture: &'a Capture,
    pub(super) buffer: Buffer,
    pub(super) shape: Vec<usize>,
    pub(super) wrong: &'a [usize],
}

impl Probe<'_, '_> {
    pub(super) fn site(&self) -> Site {
        self.capture.site
    }

    /// The failing rows' inputs, a row for each of `rows`, with `change` applied to each (row of the result, inputs).
    pub(super) fn rows(&self, rows: &[usize], change: impl Fn(usize, &mut Values)) -> Values {
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

    /// The buffer that the wrong product multiplies, if it can be replaced.
    pub(super) fn input(&self) -> Option<Buffer> {
        match (self.site().stage, self.buffer) {
            (Stage::AttnOut, _) => Some(Buffer::Attn),
            (Stage::ExpertsUp, _) => Some(Buffer::Normed),
            (Stage::ExpertsDown, _) => Some(Buffer::Hidden),
            (Stage::FeedForward, Buffer::Down | Buffer::Hidden | Buffer::X) => None,
            _ => Some(Buffer::X),
        }
    }

    pub(super) fn lines(&self, buffer: Buffer) -> usize {
        let shape = buffer.shape(&self.model.config, self.capture.step.rows.len(), 0);
        if per_expert(buffer) { shape[0] * shape[1] } else { shape[0] }
    }

    /// Rows of the tensor behind the wrong buffer: its values for one row, or one row and expert, heads together.
    pub(super) fn width(&self) -> usize {
        self.shape[if per_expert(self.buffer) { 2 } else { 1 }..].iter().product()
    }

    pub(super) fn used(&self) -> usize {
        match self.model.config.ffn {
            Ffn::Moe(moe) => moe.used,
            Ffn::Dense { .. } => 1,
        }
    }

    /// The rank whose expert errs: read off the buffer where it has one, else asked, one expert weighted at a time.
    pub(super) fn rank(&mut self, location: &Location) -> Result<usize, BisectError> {
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
    pub(super) fn failing_columns(&self, row: usize, rank: usize, width: usize) -> BTreeSet<usize> {
        let line = if per_expert(self.buffer) { row * self.used() + rank } else { self.wrong[0] / width };
        self.wrong.iter().filter(|&&i| i / width == line).map(|i| i % width).collect()
    }

    /// The experts whose lines err, the first wrong one first.
    pub(super) fn failing_experts(&self, chosen: &[f32], rank: usize) -> Vec<usize> {
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
    pub(super) fn answers(
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

    pub(super) fn column_is_wrong(&self, [left, right]: &[Vec<f32>; 2], column: usize) -> bool {
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
