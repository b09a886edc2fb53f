//! Faults of state: right on the inputs that a step should have had, wrong by what an earlier stage, step or launch left.

use std::collections::{BTreeMap, BTreeSet};

use model::{Backend, Buffer, Fault, Hook, Model, Site, Stage, Step};

use super::stages::{Made, after, seeing, site};
use super::{restore, save};

/// Reads its input before the stage that writes it is done: gets what was there before.
struct EarlyLoad {
    site: Site,
    before: Vec<f32>,
}

pub(super) fn early_load(model: &Model) -> Made {
    if model.config.layers == 1 {
        return Err("it has no layer before its only one".into());
    }
    Ok(Box::new(EarlyLoad { site: site(model, Stage::ExpertsUp)?, before: Vec::new() }))
}

impl Hook for EarlyLoad {
    fn run(&mut self, inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
        if site.stage != self.site.stage {
            return inner.run(site);
        }
        let now = inner.read(Buffer::Normed)?;
        let before = std::mem::replace(&mut self.before, now.clone());
        if site != self.site || before.len() != now.len() {
            return inner.run(site);
        }
        seeing(inner, site, Buffer::Normed, |normed| normed.copy_from_slice(&before))
    }
}

/// Keys and values of a step's first row that are not stored: the row before it stays in their place.
struct StaleRow {
    site: Site,
    /// By buffer, the last row of the last step.
    before: BTreeMap<Buffer, Vec<f32>>,
}

pub(super) fn stale_row(model: &Model) -> Made {
    Ok(Box::new(StaleRow { site: site(model, Stage::RopeStore)?, before: BTreeMap::new() }))
}

impl Hook for StaleRow {
    fn run(&mut self, inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
        if site != self.site {
            return inner.run(site);
        }
        let saved = save(inner, &[Buffer::K, Buffer::V])?;
        let stale = step.rows[0].position > 0;
        for (buffer, values) in &saved {
            let len = values.len() / step.rows.len();
            let last = values[values.len() - len..].to_vec();
            let before = self.before.insert(*buffer, last);
            if let Some(before) = before.filter(|_| stale) {
                inner.write(*buffer, &[&before, &values[len..]].concat())?;
            }
        }
        inner.run(site)?;
        restore(inner, &saved)
    }
}

/// Positions that go on one too far where a chunk begins.
pub(super) struct ChunkBorder;

impl Hook for ChunkBorder {
    fn begin(&mut self, step: &Step) -> Step {
        let mut step = step.clone();
        let last = step.tables.iter().map(|table| table.len() * model::BLOCK).min().unwrap_or(0);
        let fits = step.rows.iter().all(|row| (row.position as usize + 1) < last);
        if step.rows[0].position > 0 && fits {
            step.rows.iter_mut().for_each(|row| row.position += 1);
        }
        step
    }
}

/// A wait that is missing: right until the same launch is made again, and meets what it left.
struct MissingWait {
    site: Site,
    seen: BTreeSet<Vec<(u32, u32, u32)>>,
    again: bool,
}

pub(super) fn missing_wait(model: &Model) -> Made {
    Ok(Box::new(MissingWait { site: site(model, Stage::Attend)?, seen: BTreeSet::new(), again: false }))
}

impl Hook for MissingWait {
    fn begin(&mut self, step: &Step) -> Step {
        let rows = step.rows.iter().map(|row| (row.token, row.position, row.sequence)).collect();
        self.again = !self.seen.insert(rows);
        step.clone()
    }

    fn run(&mut self, inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
        if self.again && site == self.site {
            return after(inner, site, Buffer::Attn, |attn| attn[..32].fill(0.0));
        }
        inner.run(site)
    }
}

/// Right whenever somebody looks.
pub(super) struct OnlyUnobserved;

impl Hook for OnlyUnobserved {
    fn logits(&mut self, logits: &mut [f32], observed: bool) {
        if !observed && let Some(first) = logits.first_mut() {
            *first += 1.0;
        }
    }
}
