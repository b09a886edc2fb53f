//! What a bisection found, as data: what `tally bisect --json` prints and what a report is drawn from. Computes nothing.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::distribution::Distributions;
use crate::dump::{Arithmetic, StepRecord};
use crate::place::{Number, Place};
use crate::routing::Routing;
use crate::scenario::Scenario;
use crate::stats::{Comparison, Difference, Finiteness};
pub use crate::types::LayerTypes;

/// What `format` says.
pub const FORMAT: &str = "tally-bisect";
/// The version that is written.
pub const VERSION: u32 = 1;
/// The report's name in the directory that a bisection writes.
pub const FILE: &str = "report.json";

/// Everything that a bisection found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Fingerprint of the model.
    pub model: String,
    /// The command that was run, for whoever wants to run it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// The folder of kernels that ran in place of the built-in ones: a reproduction needs them, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernels: Option<String>,
    /// What it took, once both sides were ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The tokens that were run.
    pub prompt_ids: Vec<u32>,
    /// Left, held to be right, and right.
    pub sides: [SideFacts; 2],
    /// By what two values were held to agree, and why so.
    pub judge: String,
    /// The model's tensors by layer and type, beside which the stages are drawn.
    pub types: Vec<LayerTypes>,
    /// The runs that were compared, simplest first; the last one is that in which the two part, if they do.
    pub runs: Vec<RunFacts>,
    /// Ways of running that were left out, and why.
    pub skipped: Vec<Skipped>,
    /// Stages whose faults were known: the right was given the left's outputs there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub masked: Vec<String>,
    /// The first divergence, narrowed; none if there is none.
    pub finding: Option<Finding>,
    /// The decision tree's reading, a sentence each.
    pub reading: Vec<String>,
    /// What it comes to.
    pub outcome: Outcome,
    /// The same in two sentences.
    pub verdict: String,
}

/// A way of running that was not compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    /// Which.
    pub scenario: Scenario,
    /// Why.
    pub why: String,
}

/// One side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SideFacts {
    /// The device, or the dump.
    pub name: String,
    /// Rules.
    pub arithmetic: Arithmetic,
    /// Whether it is a dump, which runs nothing.
    pub dump: bool,
}

/// What it comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All that was compared agrees, and is finite.
    Agree,
    /// The two part.
    Diverge,
    /// The two agree on what is not finite, or part by it.
    NonFinite,
}

/// One run of both sides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunFacts {
    /// How it was run.
    pub scenario: Scenario,
    /// Its steps.
    pub steps: Vec<StepRecord>,
    /// Whether each stage of the right was given the left's inputs, or each side went on with its own.
    pub forced: bool,
    /// Every buffer that was compared, in the order of execution.
    pub cells: Vec<Cell>,
    /// The experts that were chosen, by step and layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routing: Vec<Routing>,
    /// Index of the first cell in which the two part.
    pub first_divergence: Option<usize>,
    /// Index of the first cell that is not finite on some side.
    pub first_non_finite: Option<usize>,
}

/// One buffer of both sides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// How they compare.
    pub status: Status,
    /// The numbers.
    pub figures: Figures,
    /// How the values are spread; left out where nobody will draw them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distributions: Option<Distributions>,
    /// Where the judge has bounds: the error found, and what is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
    /// Rows whose experts were chosen otherwise by a margin within the error: no fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub near_ties: Vec<NearTie>,
}

/// How a buffer of both sides compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The same bits, or within the bound.
    Match,
    /// Finite on both sides, and not the same.
    Diverge,
    /// Only the left has values that are not finite.
    NanLeft,
    /// Only the right has.
    NanRight,
    /// Both have.
    NanBoth,
    /// One side does not have it.
    Missing,
}

impl Status {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Status::Match => "match",
            Status::Diverge => "diverge",
            Status::NanLeft => "NaN left",
            Status::NanRight => "NaN right",
            Status::NanBoth => "NaN both",
            Status::Missing => "missing",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The largest error of a row relative to the row's root mean square, and what is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Found; NaN where a value is no number, which JSON has as `null`.
    #[serde(deserialize_with = "number_or_null")]
    pub error: f64,
    /// Allowed.
    pub limit: f64,
}

fn number_or_null<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// A row whose experts differ by no fault.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NearTie {
    /// The row of the step.
    pub row: usize,
    /// Chosen by the left.
    pub left: u32,
    /// Chosen by the right in its place.
    pub right: u32,
    /// How far apart the left's scores of the two are.
    pub margin: f64,
    /// How far apart they may be for the error to turn them.
    pub limit: f64,
}

/// [`Comparison`] as data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Values.
    pub total: usize,
    /// How far apart the two are.
    #[serde(flatten)]
    pub apart: Distances,
    /// The left's finiteness.
    pub left: Finiteness,
    /// The right's.
    pub right: Finiteness,
}

/// How far apart two sides are.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Distances {
    /// Values of other bits.
    pub differing: usize,
    /// The first that differs.
    pub first: Option<Pair>,
    /// The largest difference.
    pub max_abs: Option<f64>,
    /// The most steps between two floats.
    pub max_ulps: Option<u64>,
    /// Of the angle; where all is finite.
    pub cosine: Option<f64>,
    /// Squared error over the left's squares; where all is finite.
    pub nmse: Option<f64>,
}

/// Two values at an index.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Index in the buffer, row-major.
    pub index: usize,
    /// The left's.
    pub left: Number,
    /// The right's.
    pub right: Number,
}

impl From<Difference> for Pair {
    fn from(d: Difference) -> Pair {
        Pair { index: d.index, left: Number(d.left), right: Number(d.right) }
    }
}

impl From<&Comparison> for Figures {
    fn from(c: &Comparison) -> Figures {
        Figures {
            total: c.left.total,
            apart: Distances {
                differing: c.differing,
                first: c.first.map(Pair::from),
                max_abs: c.max_abs.map(|(_, v)| v),
                max_ulps: c.max_ulps.map(|(_, v)| v),
                cosine: c.apart.and_then(|apart| apart.cosine),
                nmse: c.apart.and_then(|apart| apart.nmse),
            },
            left: c.left,
            right: c.right,
        }
    }
}

/// The first divergence, narrowed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// The run in which it shows.
    pub scenario: Scenario,
    /// The first place at which the two part.
    pub place: Place,
    /// What kind of error it is.
    pub class: Class,
    /// How that was established.
    pub evidence: String,
    /// Where in the stage; none where a side is a dump, and so cannot be probed, or the error is not the stage's.
    pub location: Option<Location>,
    /// What the failing places share that passing ones lack, likeliest first.
    pub features: Vec<Feature>,
    /// The reproduction's file, once it is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reproduction: Option<String>,
}

/// What kind of error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Class {
    /// The stage errs on inputs that are right.
    Local,
    /// The stage is right on inputs that are right: what it was given was spoiled before.
    Inherited {
        /// The stage after which an input was first seen spoiled, if one was: it does not write that buffer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        spoiled_after: Option<String>,
        /// The input.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        buffer: Option<String>,
    },
    /// The stage errs only in some ways of running the same tokens.
    State {
        /// The way.
        only: Scenario,
    },
}

impl Class {
    /// The word for it.
    pub const fn name(&self) -> &'static str {
        match self {
            Class::Local => "local",
            Class::Inherited { .. } => "inherited",
            Class::State { .. } => "state",
        }
    }
}

/// Where in a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Location {
    /// The buffer that is wrong.
    pub buffer: String,
    /// Coordinates of the first wrong value in it.
    pub index: Vec<usize>,
    /// Row of the step.
    pub row: usize,
    /// The row's token.
    pub token: u32,
    /// The row's position.
    pub position: u32,
    /// The first wrong value: left, right.
    pub left: Number,
    /// See `left`.
    pub right: Number,
    /// How many values of the buffer are wrong.
    pub wrong: usize,
    /// Of how many.
    pub total: usize,
    /// The weights that are to blame, if it is weights; several where the stage's outputs do not tell them apart.
    pub tensors: Vec<TensorPlace>,
    /// What else the probes said.
    pub notes: Vec<String>,
}

/// Where in a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorPlace {
    /// GGUF name.
    pub name: String,
    /// Type.
    pub dtype: String,
    /// The first expert that errs, of a tensor of experts.
    pub expert: Option<usize>,
    /// All experts that err, of those that were chosen.
    pub experts: Vec<usize>,
    /// The first row that errs, within the expert.
    pub row: Option<usize>,
    /// How many rows err, of those computed.
    pub rows: Count,
    /// The first block of the row that errs, and its length.
    pub block: Option<usize>,
    /// Values in a block as the type has them (256 or 32; 1 for floats, where probes go by 256).
    pub block_len: usize,
    /// How many of the row's blocks err.
    pub blocks: Option<Count>,
    /// The first element of the row that errs.
    pub element: Option<usize>,
    /// How many of the block's elements err.
    pub elements: Option<Count>,
    /// What the weight of that element came to, left and right, on an input of 1 there and 0 elsewhere.
    pub contribution: Option<[Number; 2]>,
}

/// So many of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// So many.
    pub of: usize,
    /// Of so many.
    pub total: usize,
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.of, self.total)
    }
}

/// What failing places share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feature {
    /// What the places are: `layers`, `projections`, `outputs` or `elements`.
    pub among: String,
    /// The property, such as `type = Q4_K` or `row % 32 = 5`.
    pub text: String,
    /// Failing places that have it.
    pub failing_with: usize,
    /// Failing places.
    pub failing: usize,
    /// Passing places that have it.
    pub passing_with: usize,
    /// Passing places.
    pub passing: usize,
    /// How much likelier a place fails if it has it: P(fail | feature) / P(fail).
    pub lift: f64,
}
