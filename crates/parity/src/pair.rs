//! Two sides run stage by stage through the one forward, and every buffer compared where it was written.
//!
//! *Free*, each side goes on with its own values. *Forced*, the right is given the left's inputs before every stage, so
//! that an error is the stage's own. (Where the right is a dump, which cannot be given anything, it is the left that is
//! given the right's.)

use std::collections::{BTreeMap, BTreeSet};

use model::{Backend, Buffer, Fault, Model, Site, Stage, Step, forward};

use crate::bisect::BisectError;
use crate::distribution::Distributions;
use crate::judge::{Judge, near_ties};
use crate::place::Place;
use crate::player::Look;
use crate::report::{Bound, Cell, Distances, Figures, Status};
use crate::routing::Routing;
use crate::side::Side;
use crate::stats::{Comparison, Finiteness};
use crate::trace::pick;

/// Which inputs the right is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forcing {
    /// None.
    Free,
    /// Those of every stage.
    Every,
}

/// How to walk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk<'a> {
    pub(crate) judge: &'a Judge,
    pub(crate) forcing: Forcing,
    /// Sites whose outputs the right is given, so that what is wrong there does not go on.
    pub(crate) masked: &'a BTreeSet<Site>,
    /// Whether buffers are read between stages; if not, only logits are compared.
    pub(crate) observed: bool,
    /// Where to stop: this stage alone is given the left's inputs, and everything is kept.
    pub(crate) stop: Option<(usize, Site)>,
    /// Whether to tell how values are spread and which experts were chosen, for a report that is drawn.
    pub(crate) detail: bool,
}

/// A stage on the same inputs.
#[derive(Debug, Clone)]
pub(crate) struct Capture {
    pub(crate) index: usize,
    pub(crate) step: Step,
    pub(crate) site: Site,
    /// What it read on both sides.
    pub(crate) inputs: BTreeMap<Buffer, Vec<f32>>,
    pub(crate) left: BTreeMap<Buffer, Vec<f32>>,
    pub(crate) right: BTreeMap<Buffer, Vec<f32>>,
    /// For each input, the stage after which it was first not the same on both sides.
    pub(crate) spoiled: BTreeMap<Buffer, Site>,
    /// Of attention, what the layer was to store in the steps before.
    pub(crate) past: Vec<Stored>,
}

/// What a layer was to store in a step: keys and values as projected, `[T, KH, HD]`.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) step: Step,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

/// What a walk found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) cells: Vec<Cell>,
    pub(crate) routing: Vec<Routing>,
    pub(crate) capture: Option<Capture>,
}

/// Takes both sides through `steps`, which are counted from `first`.
pub(crate) fn walk(
    model: &Model,
    sides: &mut [Side<'_>; 2],
    steps: &[Step],
    first: usize,
    walk: Walk<'_>,
) -> Result<Found, BisectError> {
    let inside = if walk.observed {
        // Both are asked, so `&` and not `&&`.
        sides[0].observe(true) & sides[1].observe(true)
    } else {
        false
    };
    let mut pair = Pair {
        model,
        sides,
        walk,
        inside,
        index: first,
        step: Step::default(),
        unforced: 0,
        found: Found::default(),
        spoiled: BTreeMap::new(),
        past: Vec::new(),
        written: BTreeSet::new(),
        failed: None,
    };
    for (index, step) in steps.iter().enumerate() {
        pair.index = first + index;
        if let Err(fault) = forward(&mut pair, step) {
            let side = "both sides".to_owned();
            return Err(pair.failed.take().unwrap_or(BisectError::Side { side, source: fault }));
        }
        if pair.found.capture.is_some() {
            break;
        }
    }
    let found = pair.found;
    for side in sides {
        side.observe(false);
    }
    Ok(found)
}

/// Both sides as one backend.
struct Pair<'a, 'b> {
    model: &'a Model,
    sides: &'a mut [Side<'b>; 2],
    walk: Walk<'a>,
    inside: bool,
    index: usize,
    step: Step,
    /// Stages since the right last had all its inputs from the left.
    unforced: u32,
    found: Found,
    spoiled: BTreeMap<Buffer, Site>,
    past: Vec<Stored>,
    /// What the stages so far have written for the one to stop at: nothing else need be there to be looked at.
    written: BTreeSet<Buffer>,
    /// Why the forward was ended: it only knows faults.
    failed: Option<BisectError>,
}

impl Pair<'_, '_> {
    /// Which side gives, and which is given.
    fn roles(&self) -> (usize, usize) {
        if self.sides[1].is_dump() && !self.sides[0].is_dump() { (1, 0) } else { (0, 1) }
    }

    fn stage(&mut self, site: Site) -> Result<(), BisectError> {
        if self.found.capture.is_some() {
            return Ok(());
        }
        let stop = self.walk.stop == Some((self.index, site));
        let forced = stop || self.walk.forcing == Forcing::Every;
        let inputs = if forced { self.force(site)? } else { BTreeMap::new() };
        for side in self.sides.iter_mut() {
            side.run(site)?;
        }
        if stop {
            return self.capture(site, inputs);
        }
        self.remember(site)?;
        if self.walk.observed {
            if self.walk.stop.is_none() {
                self.compare(site)?;
            } else {
                self.watch(site)?;
            }
        } else if site.stage == Stage::Head {
            self.compare_buffer(site, Buffer::Logits)?;
        }
        if self.walk.masked.contains(&site) {
            for &buffer in site.stage.writes() {
                // The cache is written by its stage alone.
                if matches!(buffer, Buffer::CacheK | Buffer::CacheV) {
                    continue;
                }
                if let Look::Whole(values) = self.sides[0].look(buffer)? {
                    self.sides[1].give(buffer, &values)?;
                }
            }
        }
        Ok(())
    }

    /// Gives one side the other's inputs, and returns them.
    fn force(&mut self, site: Site) -> Result<BTreeMap<Buffer, Vec<f32>>, BisectError> {
        let (from, to) = self.roles();
        let mut inputs = BTreeMap::new();
        let mut all = true;
        for &buffer in site.stage.reads() {
            match self.sides[from].look(buffer)? {
                Look::Whole(values) => {
                    all &= self.sides[to].give(buffer, &values)?;
                    inputs.insert(buffer, values);
                }
                _ => all = false,
            }
        }
        self.unforced = if all { 0 } else { self.unforced + 1 };
        Ok(inputs)
    }

    fn outputs(&self, site: Site) -> Vec<Buffer> {
        let inside = if self.inside { site.stage.inside() } else { &[] };
        inside.iter().chain(site.stage.writes()).copied().collect()
    }

    fn capture(&mut self, site: Site, mut inputs: BTreeMap<Buffer, Vec<f32>>) -> Result<(), BisectError> {
        if site.stage == Stage::Attend {
            // What the step stored: with it, attention over a sequence's first step can be run alone.
            for buffer in [Buffer::K, Buffer::V] {
                if let Look::Whole(values) = self.sides[self.roles().0].look(buffer)? {
                    inputs.insert(buffer, values);
                }
            }
        }
        let mut sides = [BTreeMap::new(), BTreeMap::new()];
        for buffer in self.outputs(site) {
            for (side, kept) in self.sides.iter_mut().zip(&mut sides) {
                if let Look::Whole(values) = side.look(buffer)? {
                    kept.insert(buffer, values);
                }
            }
        }
        let [left, right] = sides;
        let (step, spoiled) = (self.step.clone(), std::mem::take(&mut self.spoiled));
        let past = std::mem::take(&mut self.past);
        self.found.capture =
            Some(Capture { index: self.index, step, site, inputs, left, right, spoiled, past });
        Ok(())
    }

    /// Keeps what attention, if that is where to stop, will find in the cache.
    fn remember(&mut self, site: Site) -> Result<(), BisectError> {
        let Some((index, Site { stage: Stage::Attend, layer })) = self.walk.stop else { return Ok(()) };
        if self.index >= index || site != (Site { stage: Stage::Qkv, layer }) {
            return Ok(());
        }
        let (from, _) = self.roles();
        let giver = &mut self.sides[from];
        if let (Look::Whole(k), Look::Whole(v)) = (giver.look(Buffer::K)?, giver.look(Buffer::V)?) {
            self.past.push(Stored { step: self.step.clone(), k, v });
        }
        Ok(())
    }

    /// Notes after which stage an input of the stage to stop at is first not the same on both sides.
    fn watch(&mut self, site: Site) -> Result<(), BisectError> {
        let Some((index, target)) = self.walk.stop else { return Ok(()) };
        if index != self.index {
            return Ok(());
        }
        // Of other layers, only the residual stream goes on to the target's.
        if site.layer != target.layer {
            self.written.retain(|buffer| *buffer == Buffer::X);
        }
        let goes_on = |buffer: &&Buffer| site.layer == target.layer || **buffer == Buffer::X;
        self.written.extend(site.stage.writes().iter().filter(goes_on));
        for &buffer in target.stage.reads() {
            if site.stage.writes().contains(&buffer) {
                self.spoiled.remove(&buffer);
            }
            if !self.written.contains(&buffer) || self.spoiled.contains_key(&buffer) {
                continue;
            }
            let (left, right) = (self.sides[0].look(buffer)?, self.sides[1].look(buffer)?);
            let (Look::Whole(left), Look::Whole(right)) = (left, right) else { continue };
            let limit = self.walk.judge.limit(site.stage, buffer, self.unforced);
            if left.len() == right.len()
                && !self.walk.judge.wrong(&left, &right, left.len(), limit).is_empty()
            {
                self.spoiled.insert(buffer, site);
            }
        }
        Ok(())
    }

    fn compare(&mut self, site: Site) -> Result<(), BisectError> {
        for buffer in self.outputs(site) {
            self.compare_buffer(site, buffer)?;
        }
        if self.walk.detail && site.stage == Stage::Route {
            self.routing(site)?;
        }
        Ok(())
    }

    fn routing(&mut self, site: Site) -> Result<(), BisectError> {
        let mut looks = Vec::new();
        for side in self.sides.iter_mut() {
            for buffer in [Buffer::Experts, Buffer::RouterLogits] {
                match side.look(buffer)? {
                    Look::Whole(values) => looks.push(values),
                    // A dump without them has nothing to tell.
                    _ => return Ok(()),
                }
            }
        }
        let ([left, right], rows) = ([&looks[..2], &looks[2..]], self.step.rows.len());
        let sides = [left, right].map(|side| [&side[0][..], &side[1][..]]);
        let layer = site.layer.unwrap_or(0);
        self.found.routing.push(Routing::of(self.index, layer, rows, sides[0], sides[1]));
        Ok(())
    }

    fn compare_buffer(&mut self, site: Site, buffer: Buffer) -> Result<(), BisectError> {
        let place = Place { step: self.index, site, buffer };
        let shape = buffer.shape(&self.model.config, self.step.rows.len(), self.step.logits.len());
        let (left, right) = (self.sides[0].look(buffer)?, self.sides[1].look(buffer)?);
        let Some((left, right)) = common(left, right, &shape, buffer) else {
            self.found.cells.push(missing(place));
            return Ok(());
        };
        if left.len() != right.len() {
            let (left, right) = (left.len(), right.len());
            return Err(BisectError::Shapes { place, left, right });
        }
        let judge = self.walk.judge;
        let line = *shape.last().expect("every buffer has a dimension");
        let limit = judge.limit(site.stage, buffer, self.unforced);
        let comparison = Comparison::of(&left, &right);
        let (mut ties, wrong) = match (buffer, limit) {
            (Buffer::Experts, Some(limit)) => match self.sides[0].look(Buffer::RouterLogits)? {
                Look::Whole(scores) if left.len() == shape.iter().product::<usize>() => {
                    near_ties(&left, &right, &scores, line, limit)
                }
                _ => (Vec::new(), judge.wrong(&left, &right, line, None)),
            },
            _ => (Vec::new(), judge.wrong(&left, &right, line, limit)),
        };
        // Other experts have other weights: what is no fault there is none here.
        let excused: BTreeSet<usize> = match (buffer, limit, self.found.cells.last()) {
            (Buffer::ExpertWeights, Some(_), Some(cell)) if cell.place.buffer == Buffer::Experts => {
                ties.clone_from(&cell.near_ties);
                ties.iter().map(|tie| tie.row).collect()
            }
            _ => BTreeSet::new(),
        };
        let agree = wrong.iter().all(|i| excused.contains(&(i / line)));
        let status = match (comparison.left.all(), comparison.right.all()) {
            (true, true) if agree => Status::Match,
            (true, true) => Status::Diverge,
            (false, true) => Status::NanLeft,
            (true, false) => Status::NanRight,
            (false, false) => Status::NanBoth,
        };
        let bound = limit.map(|limit| Bound { error: Judge::error(&left, &right, line), limit });
        let figures = Figures::from(&comparison);
        let distributions = self.walk.detail.then(|| Distributions::of(&left, &right));
        self.found.cells.push(Cell { place, status, figures, bound, near_ties: ties, distributions });
        Ok(())
    }
}

/// What both sides have of a buffer, in the same lines.
fn common(left: Look, right: Look, shape: &[usize], buffer: Buffer) -> Option<(Vec<f32>, Vec<f32>)> {
    Some(match (left, right) {
        (Look::Whole(left), Look::Whole(right)) => (left, right),
        (Look::Whole(left), Look::Lines(right, lines)) => (pick(&left, shape, buffer, &lines), right),
        (Look::Lines(left, lines), Look::Whole(right)) => (left, pick(&right, shape, buffer, &lines)),
        (Look::Lines(left, l), Look::Lines(right, r)) if l == r => (left, right),
        _ => return None,
    })
}

fn missing(place: Place) -> Cell {
    let none = Finiteness::default();
    let figures = Figures { total: 0, apart: Distances::default(), left: none, right: none };
    Cell { place, status: Status::Missing, figures, bound: None, near_ties: Vec::new(), distributions: None }
}

impl Backend for Pair<'_, '_> {
    fn model(&self) -> &Model {
        self.model
    }

    fn max_rows(&self) -> usize {
        usize::MAX
    }

    fn context(&self) -> usize {
        usize::MAX
    }

    fn kv_blocks(&self) -> usize {
        usize::MAX
    }

    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.step.clone_from(step);
        self.unforced = 0;
        self.spoiled.clear();
        self.written.clear();
        for i in 0..2 {
            if let Err(error) = self.sides[i].begin(self.index, step) {
                self.failed = Some(error);
                return Err(Fault::NoSuchStage { site: Site { stage: Stage::Embed, layer: None } });
            }
        }
        Ok(())
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.stage(site).map_err(|error| {
            self.failed = Some(error);
            Fault::NoSuchStage { site }
        })
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        Err(Fault::Buffer { buffer, why: "a pair has two of each".into() })
    }

    fn write(&mut self, buffer: Buffer, _values: &[f32]) -> Result<(), Fault> {
        Err(Fault::Buffer { buffer, why: "a pair has two of each".into() })
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        Ok(&[])
    }
}
