//! Many short runs instead of one long one: lengths, positions, companies, cuts, recordings and repeats, of which each has
//! kernels and paths of its own. Only logits are compared; `bisect` finds where in a run that differs.
//!
//! A case is several ways to the same logits. On each side all ways must agree in every bit with the first one; and the
//! first ones of both sides with each other.

mod cases;

use std::fmt;
use std::time::Instant;

use model::{Backend, Buffer, Fault, Hook, Hooked, Site, Step, forward};
use serde::Serialize;

use crate::bisect::BisectError;
use crate::report::Figures;
use crate::scenario::Limits;
use crate::stats::Comparison;
use cases::{Case, Room, Way, cases};

/// What is varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Lengths of a prompt that is one step.
    Length,
    /// Positions of a token that is a step by itself.
    Position,
    /// Sequences of different lengths in one step; the other way is each by itself.
    Batch,
    /// The cut of a prompt: whole, in chunks, its last tokens one at a time.
    Cut,
    /// What is recorded and replayed, against stages that run one by one because somebody looks on: graph on and off.
    Replay,
    /// The same step again and again.
    Repeat,
}

impl Axis {
    /// All of them.
    pub const ALL: [Axis; 6] =
        [Axis::Length, Axis::Position, Axis::Batch, Axis::Cut, Axis::Replay, Axis::Repeat];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Axis::Length => "length",
            Axis::Position => "position",
            Axis::Batch => "batch",
            Axis::Cut => "cut",
            Axis::Replay => "replay",
            Axis::Repeat => "repeat",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How far to go.
#[derive(Debug, Clone)]
pub struct Options {
    /// What is varied, in this order.
    pub axes: Vec<Axis>,
    /// Tokens of the longest prompt.
    pub longest: usize,
    /// Sequences of the largest batch.
    pub streams: usize,
    /// How often a step is repeated.
    pub repeats: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { axes: Axis::ALL.to_vec(), longest: 130, streams: 17, repeats: 20 }
    }
}

/// What a case came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trial {
    /// What was varied.
    pub axis: Axis,
    /// The case, such as `65 tokens`.
    pub case: String,
    /// Who was compared: both sides, or two ways on one side.
    pub between: [String; 2],
    /// Of the logits: of the first way that differs, or of the last.
    pub figures: Figures,
    /// What it took, of all runs that were made for it.
    pub seconds: f64,
}

impl Trial {
    /// Whether all bits agree.
    pub fn equal(&self) -> bool {
        self.figures.apart.differing == 0
    }

    /// Whether every value of both is a number.
    pub fn finite(&self) -> bool {
        let f = &self.figures;
        f.left.finite == f.total && f.right.finite == f.total
    }
}

/// Runs every case that both sides have room for on both; `heard` is told of each trial. Names and backends are left and
/// right; each backend's whole cache is used.
///
/// # Errors
/// [`BisectError::Side`] of a side that fails, [`BisectError::Nothing`] where no case has room.
pub fn sweep(
    mut sides: [(String, &mut dyn Backend); 2],
    options: &Options,
    heard: &mut dyn FnMut(&Trial),
) -> Result<Vec<Trial>, BisectError> {
    let limits = sides.iter().map(|(_, backend)| Limits {
        max_rows: backend.max_rows(),
        kv_blocks: backend.kv_blocks().min(1 << 20),
    });
    let limits = limits.reduce(|a, b| Limits {
        max_rows: a.max_rows.min(b.max_rows),
        kv_blocks: a.kv_blocks.min(b.kv_blocks),
    });
    let limits = limits.expect("two sides");
    let context = sides.iter().map(|(_, backend)| backend.context()).min().expect("two sides");
    let vocab = sides[0].1.model().config.vocab;
    let room = Room { limits, context, vocab };
    let mut trials = Vec::new();
    for case in options.axes.iter().flat_map(|&axis| cases(axis, options, room)) {
        for trial in try_case(&case, &mut sides)? {
            heard(&trial);
            trials.push(trial);
        }
    }
    if trials.is_empty() {
        return Err(BisectError::Nothing { why: "there is no case that both sides have room for".into() });
    }
    Ok(trials)
}

fn try_case(case: &Case, sides: &mut [(String, &mut dyn Backend); 2]) -> Result<Vec<Trial>, BisectError> {
    let mut trials = Vec::new();
    let mut firsts = Vec::new();
    let trial = |between: [String; 2], comparison: &Comparison, seconds: f64| Trial {
        axis: case.axis,
        case: case.name.clone(),
        between,
        figures: Figures::from(comparison),
        seconds,
    };
    for (name, backend) in sides.iter_mut() {
        let start = Instant::now();
        let vocab = backend.model().config.vocab;
        let mut logits = |way: &Way| {
            run(&mut **backend, way, vocab).map_err(|source| BisectError::Side { side: name.clone(), source })
        };
        let [first, others @ ..] = &case.ways[..] else { unreachable!("a case has a way") };
        let want = logits(first)?;
        let mut found = None;
        for way in others {
            let compared = Comparison::of(&want, &logits(way)?);
            let differs = !compared.bits_equal();
            found = Some((way, compared));
            if differs {
                break;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        if let Some((way, compared)) = found {
            let between = [first, way].map(|way| format!("{name} {}", way.name));
            trials.push(trial(between, &compared, seconds));
        }
        firsts.push((want, seconds));
    }
    if case.across {
        let compared = Comparison::of(&firsts[0].0, &firsts[1].0);
        let names = [0, 1].map(|i| sides[i].0.clone());
        trials.push(trial(names, &compared, firsts[0].1 + firsts[1].1));
    }
    Ok(trials)
}

/// The logits of all rows that the way's steps want.
fn run(backend: &mut dyn Backend, way: &Way, vocab: usize) -> Result<Vec<f32>, Fault> {
    let mut logits = Vec::new();
    for step in &way.steps {
        if way.watched {
            forward(&mut Hooked::with(&mut *backend, Box::new(Watch)), step)?;
        } else {
            forward(backend, step)?;
        }
        if !step.logits.is_empty() {
            logits.extend_from_slice(backend.logits()?);
        }
    }
    Ok(match &way.order {
        Some(order) => order.iter().flat_map(|&row| &logits[row * vocab..][..vocab]).copied().collect(),
        None => logits,
    })
}

/// Reads a buffer after every stage, so that nothing can be put off to the end of the step.
struct Watch;

impl Hook for Watch {
    fn run(&mut self, inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
        inner.run(site)?;
        let written: Buffer = *site.stage.writes().last().expect("every stage writes");
        inner.read(written).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use model::Stage;

    use super::*;
    use crate::testing;

    fn options() -> Options {
        Options { longest: 66, streams: 3, repeats: 3, ..Options::default() }
    }

    /// The trials that differ, by axis and who was compared.
    fn differing(trials: &[Trial]) -> Vec<(Axis, String)> {
        trials.iter().filter(|t| !t.equal()).map(|t| (t.axis, t.between[1].clone())).collect()
    }

    #[test]
    fn two_that_are_the_same_agree_in_every_case() {
        let model = testing::model(false, 2);
        let (mut left, mut right) = (testing::cpu(&model), testing::cpu(&model));
        let mut told = 0;
        let sides = [("left".into(), &mut left as &mut dyn Backend), ("right".into(), &mut right)];
        let trials = sweep(sides, &options(), &mut |_| told += 1).expect("it computes");
        assert_eq!(differing(&trials), []);
        assert!(trials.iter().all(Trial::finite) && told == trials.len());
        for axis in Axis::ALL {
            assert!(trials.iter().any(|t| t.axis == axis && t.figures.total > 0), "{axis}");
        }
    }

    /// Errs in steps that fit.
    struct When(fn(&Step) -> bool);

    impl Hook for When {
        fn run(&mut self, inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
            inner.run(site)?;
            if site.stage != Stage::AttnOut || !(self.0)(step) {
                return Ok(());
            }
            let mut x = inner.read(Buffer::X)?;
            x.iter_mut().for_each(|x| *x += 0.5);
            inner.write(Buffer::X, &x)
        }
    }

    #[test]
    fn each_axis_finds_its_own_fault() {
        let model = testing::model(false, 2);
        let check = |wrong: fn(&Step) -> bool, axes: &[Axis], want: &[Axis]| {
            let mut left = testing::cpu(&model);
            let mut right = Hooked::with(testing::cpu(&model), Box::new(When(wrong)));
            let sides = [("left".into(), &mut left as &mut dyn Backend), ("right".into(), &mut right)];
            let options = Options { axes: axes.to_vec(), ..options() };
            let trials = sweep(sides, &options, &mut |_| ()).expect("it computes");
            let mut found: Vec<Axis> = differing(&trials).into_iter().map(|(axis, _)| axis).collect();
            found.dedup();
            assert_eq!(found, want);
        };
        check(|step| step.rows.len() == 17, &[Axis::Length, Axis::Position], &[Axis::Length]);
        check(
            |step| step.rows.len() == 1 && step.rows[0].position == 64,
            &[Axis::Length, Axis::Position, Axis::Batch],
            &[Axis::Position],
        );
        check(|step| step.tables.len() > 1, &Axis::ALL, &[Axis::Batch]);
        check(
            |step| step.rows[0].position > 0 && step.rows.len() > 1,
            &[Axis::Length, Axis::Cut],
            &[Axis::Cut],
        );
    }

    /// Errs every other time.
    struct Sometimes(usize);

    impl Hook for Sometimes {
        fn logits(&mut self, logits: &mut [f32], _: bool) {
            self.0 += 1;
            if self.0.is_multiple_of(3) {
                logits[0] += 1.0;
            }
        }
    }

    /// Errs unless somebody looks on.
    struct Unwatched;

    impl Hook for Unwatched {
        fn logits(&mut self, logits: &mut [f32], observed: bool) {
            if !observed {
                logits[0] += 1.0;
            }
        }
    }

    #[test]
    fn what_errs_now_and_then_or_unseen_is_found_on_its_own_side() {
        let model = testing::model(false, 2);
        let check = |hook: Box<dyn Hook>, axis: Axis, way: &str| {
            let mut left = testing::cpu(&model);
            let mut right = Hooked::with(testing::cpu(&model), hook);
            let sides = [("left".into(), &mut left as &mut dyn Backend), ("right".into(), &mut right)];
            let options = Options { axes: vec![axis], ..options() };
            let trials = sweep(sides, &options, &mut |_| ()).expect("it computes");
            let found = differing(&trials);
            assert!(found.contains(&(axis, format!("right {way}"))), "{found:?}");
            assert!(trials.iter().filter(|t| t.between[1].starts_with("left")).all(Trial::equal));
        };
        check(Box::new(Sometimes(0)), Axis::Repeat, "again");
        check(Box::new(Unwatched), Axis::Replay, "first");
    }

    #[test]
    fn without_room_there_is_nothing() {
        let model = testing::model(false, 2);
        let (mut left, mut right) = (testing::cpu(&model), testing::cpu(&model));
        let sides = [("left".into(), &mut left as &mut dyn Backend), ("right".into(), &mut right)];
        let options = Options { axes: vec![Axis::Batch], streams: 0, ..Options::default() };
        assert!(matches!(sweep(sides, &options, &mut |_| ()), Err(BisectError::Nothing { .. })));
    }
}
