//! CUDA graphs of the forward: a step of few rows is recorded once for its shape, and replayed.
//!
//! The forward asks for one stage after the other; here the stages of a small step are only noted, and launched all at
//! once when the last one has been asked for. Whoever reads or writes a buffer in between gets it: what was noted runs
//! at once and the rest of the step stage by stage. What a replay computes is what the stages compute, bit for bit.

use std::collections::BTreeMap;

use model::{Config, Ffn, Site, Stage};

use crate::driver::Graph;

/// Rows of the largest step that is recorded. Longer ones are long enough to hide their launches.
pub(crate) const MAX_ROWS: usize = 64;

/// Recordings kept; a server that meets more shapes than this starts over.
const MAX_GRAPHS: usize = 256;

/// What a recording depends on: rows, and rows whose logits are wanted.
pub(crate) type Key = (usize, usize);

/// What is known of a step's shape.
pub(crate) enum Recording {
    /// Ran once, stage by stage: kernels are loaded and memory is there, so it can be recorded.
    Seen,
    /// Recorded.
    Ready(Graph),
}

/// The recordings of a backend, and where the current step stands.
pub(crate) struct Replay {
    enabled: bool,
    graphs: BTreeMap<Key, Recording>,
    /// Stages noted but not launched.
    noted: Vec<Site>,
    /// Whether the current step's stages are noted rather than launched.
    deferred: bool,
}

impl Replay {
    pub(crate) fn new(enabled: bool) -> Replay {
        Replay { enabled, graphs: BTreeMap::new(), noted: Vec::new(), deferred: false }
    }

    /// A new step of this shape.
    pub(crate) fn begin(&mut self, key: Key) {
        self.noted.clear();
        self.deferred = self.enabled && key.0 <= MAX_ROWS;
    }

    /// Forgets all recordings: an address in them has changed.
    pub(crate) fn forget(&mut self) {
        self.graphs.clear();
    }

    /// Whether this stage is launched later.
    pub(crate) fn defers(&self) -> bool {
        self.deferred
    }

    /// Notes a stage; the whole list once it is the last of the forward.
    pub(crate) fn note(&mut self, site: Site, config: &Config, head: bool) -> Option<Vec<Site>> {
        self.noted.push(site);
        let last = last_site(config, head);
        (site == last).then(|| self.take())
    }

    /// What was noted, to be launched now; the step goes on stage by stage.
    pub(crate) fn take(&mut self) -> Vec<Site> {
        self.deferred = false;
        std::mem::take(&mut self.noted)
    }

    /// What is known of a shape.
    pub(crate) fn get(&self, key: Key) -> Option<&Recording> {
        self.graphs.get(&key)
    }

    pub(crate) fn set(&mut self, key: Key, recording: Recording) {
        if self.graphs.len() >= MAX_GRAPHS {
            self.graphs.clear();
        }
        self.graphs.insert(key, recording);
    }
}

fn last_site(config: &Config, head: bool) -> Site {
    if head {
        return Site { stage: Stage::Head, layer: None };
    }
    let stage = match config.ffn {
        Ffn::Dense { .. } => Stage::FeedForward,
        Ffn::Moe(_) => Stage::ExpertsDown,
    };
    Site { stage, layer: Some(config.layers - 1) }
}

/// The stages of a layer, in order.
pub(crate) fn layer_stages(config: &Config) -> impl Iterator<Item = Stage> {
    let tail: &[Stage] = match config.ffn {
        Ffn::Dense { .. } => &[Stage::FeedForward],
        Ffn::Moe(_) => &[Stage::Route, Stage::ExpertsUp, Stage::ExpertsDown],
    };
    [Stage::Qkv, Stage::RopeStore, Stage::Attend, Stage::AttnOut].iter().chain(tail).copied()
}

/// The sites of a whole forward, in order: what a recording stands for.
pub(crate) fn forward_sites(config: &Config, head: bool) -> Vec<Site> {
    let layers = (0..config.layers)
        .flat_map(|l| layer_stages(config).map(move |stage| Site { stage, layer: Some(l) }));
    let top = |stage| Site { stage, layer: None };
    std::iter::once(top(Stage::Embed)).chain(layers).chain(head.then(|| top(Stage::Head))).collect()
}
