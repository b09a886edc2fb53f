//! What there is to show, whoever draws it: runs, their steps, and a cell for each buffer of each layer.

use std::collections::BTreeMap;
use std::path::Path;

use model::{Buffer, Site, Stage};
use parity::distribution::Distributions;
use parity::dump::{Arithmetic, StepRecord};
use parity::report::{self, Bound, Class, Distances, Finding, NearTie, Report, Status};
use parity::routing::Routing;
use parity::{Finiteness, Place};
use serde::Serialize;

use crate::columns::{Column, columns};
use crate::types::TypeMap;

/// Everything that is shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct View {
    /// How it came out.
    pub tone: Tone,
    /// In a few words.
    pub headline: String,
    /// In two sentences.
    pub verdict: String,
    /// The decision tree's reading, a sentence each.
    pub reading: Vec<String>,
    /// Left and right; of a trace, the one there is.
    pub sides: Vec<Side>,
    /// What else is known, by name.
    pub facts: Vec<(String, String)>,
    /// The tokens that were run.
    pub prompt_ids: Vec<u32>,
    /// What a layer writes, in the order of execution.
    pub columns: Vec<Column>,
    /// What is written outside layers: before them, and after them.
    pub outside: Vec<Column>,
    /// Layers of the model, as far as is known.
    pub layers: usize,
    /// The runs: those in which something is wrong, then the others, simplest first.
    pub runs: Vec<Run>,
    /// Ways of running that were left out, and why.
    pub skipped: Vec<(String, String)>,
    /// Which type each tensor has.
    pub types: TypeMap,
    /// The first divergence, narrowed.
    pub finding: Option<Finding>,
    /// How to see it again.
    pub reproduce: Vec<Command>,
}

/// How it came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tone {
    /// All that was compared agrees.
    Agree,
    /// The two part.
    Diverge,
    /// Something is not a number.
    NonFinite,
    /// Nothing was compared, and all is finite.
    Trace,
}

/// A side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Side {
    /// The device, or the dump.
    pub name: String,
    /// By which rules its numbers come about.
    pub rules: String,
}

/// Both sides, or one, run in one way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The way, such as `chunked`.
    pub name: String,
    /// What is peculiar to it.
    pub about: String,
    /// Its steps.
    pub steps: Vec<Step>,
    /// Where the two first part, or where something first is no number: step, and index of the cell in it.
    pub first: Option<(usize, usize)>,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// Tokens of its rows.
    pub tokens: Vec<u32>,
    /// Their positions.
    pub positions: Vec<u32>,
    /// In the order of execution.
    pub cells: Vec<Cell>,
    /// By layer.
    pub routing: Vec<Routing>,
}

/// A buffer after a stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// The layer; none for what is outside layers.
    pub layer: Option<usize>,
    /// [`Stage::name`].
    pub stage: &'static str,
    /// [`Buffer::name`].
    pub buffer: &'static str,
    /// How both sides compare; none where there is one.
    pub status: Option<Status>,
    /// Statistics of each side; none of one that does not have the buffer.
    pub sides: Vec<SideStats>,
    /// How far apart the two are; none where there is one.
    pub apart: Option<Distances>,
    /// The error found and what is allowed, where the judge has bounds.
    pub bound: Option<Bound>,
    /// Rows routed otherwise by no fault.
    pub near_ties: Vec<NearTie>,
    /// How the values are spread.
    pub spread: Option<Distributions>,
}

/// Statistics of one side of a buffer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SideStats {
    /// How much of it is numbers, the smallest and the largest.
    #[serde(flatten)]
    pub counts: Finiteness,
    /// Mean of the numbers.
    pub mean: Option<f64>,
    /// Root of their mean square.
    pub rms: Option<f64>,
}

/// A command line and what it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Command {
    /// What it does.
    pub about: String,
    /// To be pasted.
    pub line: String,
}

impl View {
    /// Of a bisection that lies in `dir`, as whoever is to replay it would name the directory.
    pub fn of(report: &Report, dir: &Path) -> View {
        let mut runs: Vec<Run> = report.runs.iter().map(run).collect();
        runs.sort_by_key(|run| run.first.is_none()); // stable
        let seen = |stage, buffer| {
            report.runs.iter().flat_map(|run| &run.cells).any(|cell| at(&cell.place) == (stage, buffer))
        };
        let (columns, outside) = layered(columns(seen));
        let places = report.runs.iter().flat_map(|run| &run.cells).filter_map(|cell| cell.place.site.layer);
        let typed = report.types.iter().filter_map(|types| types.layer);
        View {
            tone: match report.outcome {
                report::Outcome::Agree => Tone::Agree,
                report::Outcome::Diverge => Tone::Diverge,
                report::Outcome::NonFinite => Tone::NonFinite,
            },
            headline: headline(report),
            verdict: report.verdict.clone(),
            reading: report.reading.clone(),
            sides: report
                .sides
                .iter()
                .map(|side| Side { name: side.name.clone(), rules: rules(&side.arithmetic) })
                .collect(),
            facts: vec![("model".into(), report.model.clone()), ("judged by".into(), report.judge.clone())],
            prompt_ids: report.prompt_ids.clone(),
            columns,
            outside,
            layers: places.chain(typed).max().map_or(0, |last| last + 1),
            runs,
            skipped: report
                .skipped
                .iter()
                .map(|skipped| (skipped.scenario.to_string(), skipped.why.clone()))
                .collect(),
            types: TypeMap::of(&report.types),
            finding: report.finding.clone(),
            reproduce: reproduce(report, dir),
        }
    }

    /// The run that tells the most, which every drawing begins with; none if there are no runs.
    pub fn telling(&self) -> Option<&Run> {
        self.runs.first()
    }
}

pub(crate) fn at(place: &Place) -> (Stage, Buffer) {
    (place.site.stage, place.buffer)
}

/// Columns within layers, and those outside.
pub(crate) fn layered(columns: Vec<Column>) -> (Vec<Column>, Vec<Column>) {
    columns.into_iter().partition(|column| !["embed", "head"].contains(&column.stage))
}

fn headline(report: &Report) -> String {
    let Some(finding) = &report.finding else {
        return match report.outcome {
            report::Outcome::Agree => "No difference".into(),
            report::Outcome::Diverge => "The two part".into(),
            report::Outcome::NonFinite => "Not finite on both sides".into(),
        };
    };
    let class = match finding.class {
        Class::Local => "a local error".to_owned(),
        Class::Inherited { .. } => "an inherited error".to_owned(),
        Class::State { only } => format!("an error {}", only.only()),
    };
    format!("{}: {class}", sited(finding.place.site))
}

fn sited(site: Site) -> String {
    match site.layer {
        Some(layer) => format!("Layer {layer}, {}", site.stage),
        None => site.stage.to_string(),
    }
}

pub(crate) fn rules(arithmetic: &Arithmetic) -> String {
    match arithmetic {
        Arithmetic::Tally { activations } => format!("Tally's arithmetic, activations {activations}"),
        Arithmetic::Float { precision } => format!("floats, products in {precision}"),
    }
}

fn reproduce(report: &Report, dir: &Path) -> Vec<Command> {
    let again = report
        .command
        .iter()
        .map(|line| Command { about: "The whole bisection again".into(), line: line.clone() });
    let file = report.finding.iter().filter_map(|finding| finding.reproduction.as_ref());
    let kernels = report.kernels.as_ref().map(|folder| format!(" --kernels {}", word(Path::new(folder))));
    let kernels = kernels.unwrap_or_default();
    let replay = file.map(|file| Command {
        about: "That stage alone, from one small file, with no model at hand".into(),
        line: format!("tally replay {} --device {}{kernels}", word(&dir.join(file)), report.sides[1].name),
    });
    replay.chain(again).collect()
}

/// A path as a word of a shell.
pub(crate) fn word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "-_./:,=@%+".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn run(run: &report::RunFacts) -> Run {
    let mut steps = run.steps.iter().map(step).collect::<Vec<_>>();
    let first_of = [run.first_divergence, run.first_non_finite].into_iter().flatten().min();
    let mut first = None;
    for (index, cell) in run.cells.iter().enumerate() {
        let cells = &mut steps[cell.place.step].cells; // in range: checked when it was read
        if first_of == Some(index) {
            first = Some((cell.place.step, cells.len()));
        }
        cells.push(compared(cell));
    }
    for routing in &run.routing {
        if let Some(step) = steps.get_mut(routing.step) {
            step.routing.push(routing.clone());
        }
    }
    let about = match run.forced {
        true => "every stage of the right on the left's inputs".to_owned(),
        false => format!("each side on its own values, {}", run.scenario.only()),
    };
    Run { name: format!("{}{}", run.scenario, if run.forced { ", forced" } else { "" }), about, steps, first }
}

pub(crate) fn step(record: &StepRecord) -> Step {
    Step {
        tokens: record.tokens.clone(),
        positions: record.positions.clone(),
        cells: Vec::new(),
        routing: Vec::new(),
    }
}

fn compared(cell: &report::Cell) -> Cell {
    let figures = &cell.figures;
    let missing = cell.status == Status::Missing;
    let mut sides: Vec<SideStats> = match missing {
        true => Vec::new(),
        false => {
            [figures.left, figures.right].map(|counts| SideStats { counts, mean: None, rms: None }).into()
        }
    };
    if let Some(spread) = &cell.distributions {
        for (side, of) in sides.iter_mut().zip([Some(&spread.left), spread.right.as_ref()]) {
            let of = of.unwrap_or(&spread.left);
            (side.mean, side.rms) = (Some(of.mean), Some(of.rms));
        }
    }
    Cell {
        layer: cell.place.site.layer,
        stage: cell.place.site.stage.name(),
        buffer: cell.place.buffer.name(),
        status: Some(cell.status),
        sides,
        apart: (!missing).then(|| figures.apart.clone()),
        bound: cell.bound,
        near_ties: cell.near_ties.clone(),
        spread: cell.distributions.clone(),
    }
}

impl Step {
    /// The cells of a layer and stage.
    pub fn of_stage(&self, layer: Option<usize>, stage: &str) -> Vec<&Cell> {
        self.cells.iter().filter(|cell| cell.layer == layer && cell.stage == stage).collect()
    }

    /// How many cells compare in each way, by [`Status::name`].
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for status in self.cells.iter().filter_map(|cell| cell.status) {
            *counts.entry(status.name()).or_default() += 1;
        }
        counts
    }
}
