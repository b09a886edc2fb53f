//! The seam between contracts and what they are about: named checks with declared parameters, and what becomes of one.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{CheckCall, ParameterValue, Provenance};

/// What a parameter may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Yes or no.
    Flag,
    /// A count.
    Integer,
    /// Any number.
    Number,
    /// A name or a path.
    Text,
    /// A list of names or paths.
    Texts,
    /// A list of counts.
    Integers,
}

impl Kind {
    /// Whether `value` is one.
    pub fn takes(self, value: &ParameterValue) -> bool {
        use ParameterValue::{Flag, Integer, List, Number, Text};
        match (self, value) {
            (Kind::Flag, Flag(_))
            | (Kind::Integer | Kind::Number, Integer(_))
            | (Kind::Number, Number(_))
            | (Kind::Text, Text(_)) => true,
            (Kind::Texts, List(values)) => values.iter().all(|value| matches!(value, Text(_))),
            (Kind::Integers, List(values)) => values.iter().all(|value| matches!(value, Integer(_))),
            _ => false,
        }
    }

    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Flag => "true or false",
            Kind::Integer => "a count",
            Kind::Number => "a number",
            Kind::Text => "a text",
            Kind::Texts => "a list of texts",
            Kind::Integers => "a list of counts",
        }
    }
}

/// A parameter of a check.
#[derive(Debug, Clone, Copy)]
pub struct ParameterSpec {
    /// Name.
    pub name: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// What it is.
    pub about: &'static str,
    /// Whether a contract must give it.
    pub required: bool,
}

/// A fault that a check can plant into what it looks at, and must then notice.
#[derive(Debug, Clone, Copy)]
pub struct PlantedFault {
    /// Name.
    pub name: &'static str,
    /// What is broken.
    pub about: &'static str,
}

/// What evidence of a check is evidence for; when one of these is another, the evidence is stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The GPU's kernels, by the hash of their sources. A check that has this part needs a GPU.
    Kernels,
    /// The model at hand, by its fingerprint. A check without this part makes its own or needs none.
    Model,
    /// The arithmetic, by the bits that it gives.
    Arithmetic,
}

/// A check that contracts can name.
#[derive(Debug, Clone, Copy)]
pub struct CheckSpec {
    /// Name, such as `forward.router`.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub about: &'static str,
    /// What it takes.
    pub parameters: &'static [ParameterSpec],
    /// What can be planted.
    pub faults: &'static [PlantedFault],
    /// What its evidence depends on, apart from the check itself; a check with a parameter `device: gpu` depends on
    /// [`Part::Kernels`], too.
    pub parts: &'static [Part],
}

impl CheckSpec {
    /// Whether evidence of `call` depends on `part`.
    pub fn depends_on(&self, call: &CheckCall, part: Part) -> bool {
        let on_gpu =
            || call.parameters.values().any(|value| value.value == ParameterValue::Text("gpu".into()));
        self.parts.contains(&part) || part == Part::Kernels && on_gpu()
    }
}

/// The parameters of a call, which validation has found to be what the check declares.
#[derive(Debug, Clone, Default)]
pub struct Parameters(BTreeMap<String, ParameterValue>);

impl Parameters {
    /// Of a call.
    pub fn of(call: &CheckCall) -> Parameters {
        Parameters(call.parameters.iter().map(|(name, value)| (name.clone(), value.value.clone())).collect())
    }

    /// A flag; false where it is not given.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.0.get(name), Some(ParameterValue::Flag(true)))
    }

    /// A count.
    pub fn integer(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            ParameterValue::Integer(value) => Some(*value),
            _ => None,
        }
    }

    /// A number, whole or not.
    pub fn number(&self, name: &str) -> Option<f64> {
        match self.0.get(name)? {
            ParameterValue::Number(value) => Some(*value),
            // Bounds are small.
            ParameterValue::Integer(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// A text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            ParameterValue::Text(value) => Some(value),
            _ => None,
        }
    }

    /// A list of texts; empty where it is not given.
    pub fn texts(&self, name: &str) -> Vec<&str> {
        self.list(name, |value| match value {
            ParameterValue::Text(value) => Some(value.as_str()),
            _ => None,
        })
    }

    /// A list of counts; empty where it is not given.
    pub fn integers(&self, name: &str) -> Vec<u64> {
        self.list(name, |value| match value {
            ParameterValue::Integer(value) => Some(*value),
            _ => None,
        })
    }

    fn list<'a, T>(&'a self, name: &str, of: impl Fn(&'a ParameterValue) -> Option<T>) -> Vec<T> {
        match self.0.get(name) {
            Some(ParameterValue::List(values)) => values.iter().filter_map(of).collect(),
            _ => Vec::new(),
        }
    }
}

/// What a check measured, by name.
pub type Figures = serde_json::Map<String, Value>;

/// Why a check does not hold.
#[derive(Debug, Clone, PartialEq)]
pub enum Miss {
    /// The prediction failed.
    Failed {
        /// What was seen instead, with its place.
        why: String,
        /// What was measured.
        figures: Figures,
    },
    /// The check could not be executed here: that proves nothing either way.
    Unable {
        /// What is missing.
        why: String,
    },
}

impl Miss {
    /// A prediction that failed without figures.
    pub fn failed(why: impl Into<String>) -> Miss {
        Miss::Failed { why: why.into(), figures: Figures::new() }
    }

    /// A check that cannot be executed here.
    pub fn unable(why: impl Into<String>) -> Miss {
        Miss::Unable { why: why.into() }
    }
}

/// What became of a check.
pub type Verdict = Result<Figures, Miss>;

/// Whoever brings the checks.
pub trait Checks {
    /// All of them.
    fn specs(&self) -> Vec<CheckSpec>;

    /// Executes a check of [`Checks::specs`], with one of its faults planted if `fault` names it.
    fn run(&mut self, spec: &CheckSpec, parameters: &Parameters, fault: Option<&str>) -> Verdict;

    /// Where and of what evidence of `call` is that is made now.
    fn provenance(&mut self, spec: &CheckSpec, call: &CheckCall) -> Result<Provenance, Miss>;
}
