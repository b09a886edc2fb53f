//! Generation that does not wait for the host: choose a token of every sequence, feed it to the next step, again.
//!
//! A choice and the step that it feeds are one recording, replayed for each token; what varies (tokens, positions, random
//! numbers) goes on by itself in device memory.

use std::collections::BTreeMap;

use model::{Backend, Chooser, Chosen, Fault, Lane, Row, Step};

use crate::launch::sample::{Feed, Needs, Sampling};
use crate::replay::{MAX_ROWS, Recording, forward_sites};
use crate::{Cuda, STEP, fault};

/// The sequences that are going on, and the recordings of their steps.
pub(crate) struct Generation {
    pub(crate) sampling: Sampling,
    /// By number of sequences and what their sampling launches.
    graphs: BTreeMap<(usize, Needs), Recording>,
    /// The first position for which no KV block, rotation or place is left.
    end: u32,
    /// The position of the token to be chosen next, of the sequence that is furthest.
    furthest: u32,
}

impl Generation {
    pub(crate) fn new(sampling: Sampling) -> Generation {
        Generation { sampling, graphs: BTreeMap::new(), end: 0, furthest: 0 }
    }

    /// Forgets all recordings: an address in them has changed.
    pub(crate) fn forget(&mut self) {
        self.graphs.clear();
    }
}

impl Cuda {
    /// The draw alone, or the draw and the step that it feeds.
    fn launch_draw(&mut self, with_step: bool) -> Result<(), Fault> {
        let step = self.step.arg();
        let feed = if with_step {
            Feed { token: step.token, position: step.position, wanted: self.step.wanted() }
        } else {
            Feed::NOWHERE
        };
        let drawn = self.generation.sampling.launch(&self.device, self.buffers.logits.ptr(), feed);
        drawn.map_err(fault(STEP))?;
        if with_step {
            self.launch_whole(&forward_sites(&self.model.config, true))?;
        }
        Ok(())
    }
}

impl Cuda {
    /// Checks that histories of `lanes` fit for so many choices, and that there is a logit for every bias.
    fn check_adjustments(&self, lanes: &[Lane], choices: usize) -> Result<(), Fault> {
        let within = |what, got: usize, limit: usize| {
            if got <= limit { Ok(()) } else { Err(Fault::Capacity { what, got, limit }) }
        };
        let adjustments = || lanes.iter().filter_map(|lane| lane.adjustment.as_ref());
        let biased = adjustments().flat_map(|adjustment| &adjustment.bias).map(|&(id, _)| id as usize + 1);
        within("a biased token's number", biased.max().unwrap_or(0), self.model.config.vocab)?;
        let places = adjustments().map(|adjustment| adjustment.places(choices)).sum();
        within("a history", places, self.generation.sampling.places())
    }
}

impl Chooser for Cuda {
    fn places(&self) -> usize {
        self.generation.sampling.places()
    }

    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault> {
        self.settle()?;
        let limit = self.step.outputs().min(self.max_rows).min(self.step.max_sequences());
        if lanes.is_empty() || lanes.len() > limit {
            return Err(Fault::Capacity { what: "a number of sequences", got: lanes.len(), limit });
        }
        // The tokens are put in their places by the draw.
        let rows =
            lanes.iter().zip(0..).map(|(lane, sequence)| Row { token: 0, position: lane.position, sequence });
        let step = Step {
            rows: rows.collect(),
            tables: lanes.iter().map(|lane| lane.table.clone()).collect(),
            logits: (0..lanes.len() as u32).collect(),
        };
        let shortest = step.tables.iter().map(|t| t.len() * model::BLOCK).min().unwrap_or(0);
        let highest = step.tables.iter().flatten().map(|&b| b as usize + 1).max().unwrap_or(0);
        if highest > self.kv_blocks() {
            return Err(Fault::Capacity { what: "a KV block id", got: highest, limit: self.kv_blocks() });
        }
        // A context is below 2^32: `Config` bounds it.
        self.generation.end = shortest.min(self.context) as u32;
        self.generation.furthest = lanes.iter().map(|lane| lane.position).max().unwrap_or(0);
        let choices = self.generation.end.saturating_sub(self.generation.furthest) as usize + 1; // 32 bits fit
        self.check_adjustments(lanes, choices)?;
        self.generation.sampling.start(lanes, choices).map_err(fault(STEP))?;
        self.step.set(&step).map_err(fault(STEP))
    }

    fn advance(&mut self) -> Result<(), Fault> {
        self.settle()?;
        if !self.generation.sampling.may_choose() {
            let (got, limit) = (self.generation.furthest as usize, self.generation.end as usize);
            return Err(Fault::Capacity { what: "a position to choose for", got, limit });
        }
        // A token for a place that does not exist is chosen, and not fed.
        let with_step = self.generation.furthest < self.generation.end;
        let key = (self.step.rows(), self.generation.sampling.needs());
        let recorded = self.graphs && with_step && key.0 <= MAX_ROWS;
        let failed = fault(STEP);
        match self.generation.graphs.get(&key) {
            Some(Recording::Ready(graph)) if recorded => {
                graph.launch().map_err(failed)?;
                self.held.ran_forward(&self.model.config, true);
            }
            Some(Recording::Seen) if recorded => {
                self.device.begin_capture().map_err(&failed)?;
                let launched = self.launch_draw(true);
                let graph = self.device.end_capture();
                launched?;
                let graph = graph.map_err(&failed)?;
                graph.launch().map_err(&failed)?;
                self.generation.graphs.insert(key, Recording::Ready(graph));
            }
            _ => {
                self.launch_draw(with_step)?;
                if recorded {
                    self.generation.graphs.insert(key, Recording::Seen);
                }
            }
        }
        self.generation.sampling.note();
        self.generation.furthest += 1;
        self.step.advance();
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Chosen>, Fault> {
        self.generation.sampling.collect(&self.device).map_err(fault(STEP))
    }
}
