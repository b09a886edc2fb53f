//! From two runs to a verdict: run both in ever less simple ways until they part, give the stage at which they do the
//! left's inputs, and narrow down what is wrong.

use std::collections::BTreeSet;

use model::{BLOCK, Fault, Model, Site, Step};

use crate::bench::Bench;
use crate::dump::{DumpError, StepRecord};
use crate::explain::explain;
use crate::fingerprint;
use crate::judge::Judge;
use crate::localise::{Localised, first_wrong, localise};
use crate::pair::{Forcing, Found, Walk, walk};
use crate::place::Place;
use crate::report::{
    self, Cell, Class, Finding, LayerTypes, Outcome, Report, RunFacts, SideFacts, Skipped, Status,
};
use crate::reproduction::Reproduction;
use crate::scenario::{Limits, Scenario};
use crate::side::{Engine, Side};
use crate::verdict;

mod class;

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum BisectError {
    /// A side failed.
    #[error("{side}: {source}")]
    Side {
        /// Which.
        side: String,
        /// Why.
        source: Fault,
    },
    /// A dump cannot be used.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The sides do not have the same values to compare.
    #[error("{place}: {left} values on the left, {right} on the right")]
    Shapes {
        /// Where.
        place: Place,
        /// The left's.
        left: usize,
        /// The right's.
        right: usize,
    },
    /// Nothing was compared, which proves nothing.
    #[error("nothing was compared: {why}")]
    Nothing {
        /// Why not.
        why: String,
    },
}

/// How far to go.
#[derive(Debug, Clone)]
pub struct Options {
    /// Ways of running, in this order; dumps have their own steps.
    pub scenarios: Vec<Scenario>,
    /// How often [`Scenario::Repeat`] runs.
    pub repeats: usize,
    /// Sites whose outputs the right is given: known faults, behind which another may hide.
    pub masked: BTreeSet<Site>,
    /// Whether the report shall tell how values are spread and which experts were chosen.
    pub detail: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { scenarios: Scenario::LIVE.to_vec(), repeats: 3, masked: BTreeSet::new(), detail: false }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Bisection {
    /// What was found.
    pub report: Report,
    /// The failing stage cut out, if it errs by itself and both sides can run.
    pub reproduction: Option<Reproduction>,
}

/// Compares `sides`, left and right, on the tokens `ids` of `model`.
pub fn bisect(
    model: &Model,
    sides: &mut [Side<'_>; 2],
    ids: &[u32],
    options: &Options,
) -> Result<Bisection, BisectError> {
    let judge = Judge::of(&sides[0].arithmetic, &sides[1].arithmetic);
    let mut work = Work { model, judge, ids, options };
    let (mut runs, mut skipped, mut found) = (Vec::new(), Vec::new(), None);
    for scenario in work.scenarios(sides) {
        let steps = match work.steps(scenario, sides) {
            Ok(steps) => steps,
            Err(why) => {
                skipped.push(Skipped { scenario, why });
                continue;
            }
        };
        let run = work.run(scenario, sides, &steps)?;
        let divergence = run.first_divergence.map(|at| run.cells[at].place);
        runs.push(run);
        if let Some(place) = divergence {
            found = Some(work.narrow(scenario, sides, &steps, place, &runs)?);
            break;
        }
    }
    let compared = runs.iter().flat_map(|run| &run.cells).filter(|cell| cell.status != Status::Missing);
    if compared.map(|cell| cell.figures.total).sum::<usize>() == 0 {
        let why = skipped.first().map_or("no stage is there on both sides".to_owned(), |s| s.why.clone());
        return Err(BisectError::Nothing { why });
    }
    let (finding, reproduction) = match found {
        Some((finding, reproduction)) => (Some(finding), reproduction),
        None => (None, None),
    };
    let outcome = outcome(&runs, finding.as_ref());
    let mut report = Report {
        format: report::FORMAT.into(),
        version: report::VERSION,
        model: fingerprint(model),
        prompt_ids: ids.to_vec(),
        sides: [0, 1].map(|i| SideFacts {
            name: sides[i].name.clone(),
            arithmetic: sides[i].arithmetic.clone(),
            dump: sides[i].is_dump(),
        }),
        judge: work.judge.reason(),
        command: None,
        kernels: None,
        seconds: None,
        types: LayerTypes::of(model),
        runs,
        skipped,
        masked: options.masked.iter().map(Site::to_string).collect(),
        finding,
        reading: Vec::new(),
        outcome,
        verdict: String::new(),
    };
    report.reading = verdict::reading(&report);
    report.verdict = verdict::verdict(&report);
    Ok(Bisection { report, reproduction })
}

/// Compares `sides` in one way of running, every buffer of every stage; narrows nothing down.
///
/// # Errors
/// As [`bisect`]; [`BisectError::Nothing`] too where it cannot be run so.
pub fn compare(
    model: &Model,
    sides: &mut [Side<'_>; 2],
    ids: &[u32],
    scenario: Scenario,
) -> Result<RunFacts, BisectError> {
    let judge = Judge::of(&sides[0].arithmetic, &sides[1].arithmetic);
    let mut work = Work { model, judge, ids, options: &Options::default() };
    let steps = work.steps(scenario, sides).map_err(|why| BisectError::Nothing { why })?;
    work.run(scenario, sides, &steps)
}

fn outcome(runs: &[RunFacts], finding: Option<&Finding>) -> Outcome {
    let cells = runs.iter().flat_map(|run| run.cells.get(run.first_non_finite?));
    match finding {
        // The first divergence is by what is no number.
        Some(finding) if cells.clone().any(|cell| cell.place == finding.place) => Outcome::NonFinite,
        Some(_) => Outcome::Diverge,
        None if cells.count() > 0 => Outcome::NonFinite,
        None => Outcome::Agree,
    }
}

struct Work<'a> {
    model: &'a Model,
    judge: Judge,
    ids: &'a [u32],
    options: &'a Options,
}

impl Work<'_> {
    fn scenarios(&self, sides: &[Side<'_>; 2]) -> Vec<Scenario> {
        if sides.iter().any(Side::is_dump) { vec![Scenario::Dump] } else { self.options.scenarios.clone() }
    }

    fn steps(&self, scenario: Scenario, sides: &[Side<'_>; 2]) -> Result<Vec<Step>, String> {
        for side in sides {
            if let Engine::Dump(player) = &side.engine {
                return Ok(player.steps());
            }
        }
        if scenario == Scenario::Unobserved && self.judge != Judge::Bits {
            return Err(
                "where bits need not agree inputs must be given, or errors add up over the layers".into()
            );
        }
        let steps = scenario.steps(self.ids, limits(sides))?;
        let times = if scenario == Scenario::Repeat { self.options.repeats } else { 1 };
        Ok(vec![steps; times].concat())
    }

    fn forcing(&self) -> Forcing {
        if self.judge == Judge::Bits { Forcing::Free } else { Forcing::Every }
    }

    fn walk_as(&self, forcing: Forcing, observed: bool, stop: Option<(usize, Site)>) -> Walk<'_> {
        let masked = &self.options.masked;
        Walk { judge: &self.judge, forcing, masked, observed, stop, detail: false }
    }

    fn run(
        &mut self,
        scenario: Scenario,
        sides: &mut [Side<'_>; 2],
        steps: &[Step],
    ) -> Result<RunFacts, BisectError> {
        let observed = scenario != Scenario::Unobserved;
        let forcing = if observed { self.forcing() } else { Forcing::Free };
        let way = Walk { detail: self.options.detail, ..self.walk_as(forcing, observed, None) };
        let Found { cells, routing, .. } = walk(self.model, sides, steps, 0, way)?;
        let parts = |cell: &Cell| matches!(cell.status, Status::Diverge | Status::NanLeft | Status::NanRight);
        // By bits, both may be no numbers and still not the same ones.
        let bits = |cell: &Cell| {
            self.judge == Judge::Bits && cell.status == Status::NanBoth && cell.figures.apart.differing > 0
        };
        // What the right made of a masked stage was shown, and replaced.
        let masked = |cell: &Cell| self.options.masked.contains(&cell.place.site);
        let bad = |cell: &Cell| {
            let total = cell.figures.total;
            cell.figures.left.finite != total || cell.figures.right.finite != total && !masked(cell)
        };
        Ok(RunFacts {
            scenario,
            steps: steps.iter().map(StepRecord::of).collect(),
            forced: forcing == Forcing::Every,
            first_divergence: cells.iter().position(|cell| (parts(cell) || bits(cell)) && !masked(cell)),
            first_non_finite: cells.iter().position(bad),
            cells,
            routing,
        })
    }

    /// The finding of the first place at which the two part.
    fn narrow(
        &mut self,
        scenario: Scenario,
        sides: &mut [Side<'_>; 2],
        steps: &[Step],
        place: Place,
        runs: &[RunFacts],
    ) -> Result<(Finding, Option<Reproduction>), BisectError> {
        let finding = |class, evidence: String| Finding {
            scenario,
            place,
            class,
            evidence,
            location: None,
            features: Vec::new(),
            reproduction: None,
        };
        if scenario == Scenario::Unobserved {
            let evidence = "the same steps agree in every stage while buffers are read between the stages";
            let class = Class::State { only: scenario };
            return Ok((finding(class, evidence.into()), None));
        }
        let stop = Some((place.step, place.site));
        let stopped = walk(self.model, sides, steps, 0, self.walk_as(self.forcing(), true, stop))?;
        let Some(capture) = stopped.capture else {
            return Err(BisectError::Nothing { why: format!("{place} was not reached again") });
        };
        if first_wrong(&self.model.config, &self.judge, &capture).is_none() {
            return Ok((self.inherited(finding, sides, &capture), None));
        }
        let (class, evidence) = self.classify(scenario, sides, &capture)?;
        let mut finding = finding(class, evidence);
        let inside = sides[0].observe(true) & sides[1].observe(true);
        let bench = bench(sides, inside);
        let live = bench.is_some();
        let located = match bench {
            // What goes wrong only in some way of running does not go wrong on the bench.
            Some(mut bench) if finding.class == Class::Local => {
                localise(self.model, Some(&mut bench), &self.judge, &capture)?
            }
            _ => localise(self.model, None, &self.judge, &capture)?.map(without_tensors(live)),
        };
        finding.features = explain(
            self.model,
            &self.layers(scenario, sides, steps, live, runs)?,
            &capture,
            located.as_ref(),
        );
        let reproduction = match (&located, live && finding.class == Class::Local) {
            (Some(at), true) => {
                Reproduction::cut(self.model, &self.judge, &sides[0].arithmetic, &capture, at)
            }
            _ => None,
        };
        finding.location = located.map(|located| located.location);
        for side in sides {
            side.observe(false);
        }
        Ok((finding, reproduction))
    }

    /// The same stage in every layer on the left's inputs.
    fn layers(
        &self,
        scenario: Scenario,
        sides: &mut [Side<'_>; 2],
        steps: &[Step],
        live: bool,
        runs: &[RunFacts],
    ) -> Result<Vec<Cell>, BisectError> {
        match runs.last() {
            Some(run) if run.forced => Ok(run.cells.clone()),
            _ if !live || scenario == Scenario::Repeat => Ok(Vec::new()),
            _ => Ok(walk(self.model, sides, steps, 0, self.walk_as(Forcing::Every, true, None))?.cells),
        }
    }
}

/// What went wrong in some way of running only is no tensor's fault.
fn without_tensors(live: bool) -> impl Fn(Localised) -> Localised {
    move |mut located| {
        if live {
            located.location.tensors.clear();
            located.location.notes.clear();
        }
        located
    }
}

fn bench<'s>(sides: &'s mut [Side<'_>; 2], inside: bool) -> Option<Bench<'s>> {
    let names = [0, 1].map(|i| sides[i].name.clone());
    let [left, right] = sides;
    match (&mut left.engine, &mut right.engine) {
        (Engine::Live(left), Engine::Live(right)) => {
            Some(Bench { backends: [&mut **left, &mut **right], names, inside })
        }
        _ => None,
    }
}

fn limits(sides: &[Side<'_>; 2]) -> Limits {
    let mut limits = Limits { max_rows: usize::MAX, kv_blocks: usize::MAX };
    for side in sides {
        if let Engine::Live(backend) = &side.engine {
            limits.max_rows = limits.max_rows.min(backend.max_rows());
            limits.kv_blocks = limits.kv_blocks.min(backend.kv_blocks());
            // A sequence may not outgrow the context, whatever the blocks.
            limits.max_rows = limits.max_rows.min(backend.context().max(BLOCK));
        }
    }
    limits
}

#[cfg(test)]
mod tests;
