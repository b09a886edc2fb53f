//! What a contract says: the types that its YAML is read into, and the JSON schema that follows from them. Checks
//! nothing beyond structure; [`crate::validate()`] does.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_saphyr::Spanned;

/// A contract: what it governs, what must hold there, and what would show that it does not.
///
/// It has no status: `tally contract status` computes one from evidence.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// Name with its major version, such as `qwen3-moe-forward-v1`; the file's name without `.yaml`.
    #[schemars(with = "String", regex(pattern = r"^[a-z0-9.-]+-v[0-9]+$"))]
    pub id: Spanned<String>,
    /// Counts changes of the contract, from 1.
    #[schemars(with = "u32", range(min = 1))]
    pub version: Spanned<u32>,
    /// What it is about, in a sentence or two.
    #[schemars(with = "String", length(min = 1))]
    pub governs: Spanned<String>,
    /// The shape whose evidence discharges it, by the name that `tally synth` knows. Without one, checks that need a model
    /// stay at the level of the algorithm.
    #[serde(default)]
    pub real_shape: Option<String>,
    /// What must hold.
    #[schemars(length(min = 1))]
    pub invariants: Vec<Invariant>,
    /// What would show that it does not.
    pub falsifiers: Vec<Falsifier>,
    /// In which order it comes to hold.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// What changed, oldest first; the last one's version is the contract's.
    #[serde(default)]
    pub amendments: Vec<Amendment>,
}

/// Something that must hold.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Invariant {
    /// Name within the contract.
    #[schemars(with = "String", length(min = 1))]
    pub id: Spanned<String>,
    /// In words.
    #[schemars(with = "String", length(min = 1))]
    pub words: Spanned<String>,
    /// As a formula.
    #[schemars(with = "String", length(min = 1))]
    pub formula: Spanned<String>,
}

/// An experiment that would refute invariants.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Falsifier {
    /// Name, unique among all contracts, such as `FALSIFY-QW3-MOE-GPU-PARITY-001`.
    #[schemars(with = "String", regex(pattern = r"^[A-Z0-9-]+$"))]
    pub id: Spanned<String>,
    /// The invariants that it would refute, by id.
    #[schemars(with = "Vec<String>", length(min = 1))]
    pub refutes: Vec<Spanned<String>>,
    /// What is executed. Without one, the falsifier is no more than a proposal.
    #[serde(default)]
    pub check: Option<CheckCall>,
    /// What is predicted of it.
    #[schemars(with = "String", length(min = 1))]
    pub prediction: Spanned<String>,
    /// What it would mean if the prediction failed.
    #[schemars(with = "String", length(min = 1))]
    pub if_it_fails: Spanned<String>,
}

/// A check by name, with its parameters and the fault that must make it fail.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckCall {
    /// As `tally contract checks` lists it.
    #[schemars(with = "String", length(min = 1))]
    pub name: Spanned<String>,
    /// As the check declares them.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, ParameterValue>")]
    pub parameters: BTreeMap<String, Spanned<ParameterValue>>,
    /// The fault that `tally contract run --planted` plants. Without one the falsifier can never be seen to fail.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub fault: Option<Spanned<String>>,
}

impl CheckCall {
    /// Name and parameters on one line, as evidence keeps them: whether a check is still the same.
    pub fn signature(&self) -> String {
        let parameters: Vec<_> =
            self.parameters.iter().map(|(name, value)| format!("{name}={}", value.value)).collect();
        format!("{}({})", self.name.value, parameters.join(", "))
    }
}

/// The value of a parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ParameterValue {
    /// Yes or no.
    Flag(bool),
    /// A count.
    Integer(u64),
    /// A bound.
    Number(f64),
    /// A name or a path.
    Text(String),
    /// Several.
    List(Vec<ParameterValue>),
}

impl fmt::Display for ParameterValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParameterValue::Flag(value) => write!(f, "{value}"),
            ParameterValue::Integer(value) => write!(f, "{value}"),
            ParameterValue::Number(value) => write!(f, "{value}"),
            ParameterValue::Text(value) => f.write_str(value),
            ParameterValue::List(values) => {
                let values: Vec<_> = values.iter().map(ToString::to_string).collect();
                write!(f, "[{}]", values.join(", "))
            }
        }
    }
}

/// A stage of implementation.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Name.
    #[schemars(with = "String", length(min = 1))]
    pub name: Spanned<String>,
    /// What it brings.
    pub what: String,
    /// The falsifiers that must hold for it to be reached. Whether it is, is computed.
    #[schemars(with = "Vec<String>", length(min = 1))]
    pub shown_by: Vec<Spanned<String>>,
}

/// A change of a contract.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Amendment {
    /// The version that it made.
    #[schemars(with = "u32", range(min = 1))]
    pub version: Spanned<u32>,
    /// When, `YYYY-MM-DD`.
    pub date: String,
    /// What changed, and why.
    pub what: String,
}

/// The schema of a contract's YAML, for editors: JSON Schema 2020-12.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Contract).to_value()
}
