//! A dump in the place of a backend: at each stage it has what the stage wrote, if that was kept.

use std::collections::BTreeMap;

use model::{Buffer, Site, Step};

use crate::dump::{Dump, DumpError};
use crate::trace::Entry;

/// A dump being played.
#[derive(Debug)]
pub struct Player {
    dump: Dump,
    step: Vec<Entry>,
    /// What the stages so far left, by buffer: indices into `step`.
    now: BTreeMap<Buffer, usize>,
}

/// What a side has of a buffer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Look {
    /// All of it.
    Whole(Vec<f32>),
    /// These lines.
    Lines(Vec<f32>, Vec<usize>),
    /// Nothing.
    Missing,
}

impl Player {
    /// Takes a dump, whose model and prompt were checked.
    pub fn new(dump: Dump) -> Player {
        Player { dump, step: Vec::new(), now: BTreeMap::new() }
    }

    /// The dump.
    pub fn dump(&self) -> &Dump {
        &self.dump
    }

    /// The steps that it has.
    pub fn steps(&self) -> Vec<Step> {
        self.dump.steps()
    }

    pub(crate) fn begin(&mut self, index: usize) -> Result<(), DumpError> {
        self.now.clear();
        self.step = self.dump.read_step(index)?;
        Ok(())
    }

    /// What `site` writes is from now on what the dump has of it, or nothing.
    pub(crate) fn run(&mut self, site: Site) {
        for buffer in site.stage.writes().iter().chain(site.stage.inside()) {
            self.now.remove(buffer);
        }
        let here = self.step.iter().enumerate().filter(|(_, entry)| entry.place.site == site);
        self.now.extend(here.map(|(i, entry)| (entry.place.buffer, i)));
    }

    pub(crate) fn look(&self, buffer: Buffer) -> Look {
        let Some(entry) = self.now.get(&buffer).map(|&i| &self.step[i]) else { return Look::Missing };
        match (&entry.values, &entry.lines) {
            (Some(values), None) => Look::Whole(values.clone()),
            (Some(values), Some(lines)) => Look::Lines(values.clone(), lines.clone()),
            (None, _) => Look::Missing,
        }
    }
}
