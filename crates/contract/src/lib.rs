//! Contracts that run: what is claimed, what would refute it, the evidence, and the status that follows from it.
//!
//! A [`Contract`] is YAML: invariants in words and formula, and falsifiers, each with a check that can be executed, what
//! is predicted of it, and what it would mean if the prediction failed. Executing a falsifier makes [`Evidence`]; a
//! [`Status`] is computed from evidence and from nothing else. Nobody types one.
//!
//! Knows no model, backend or device: whoever implements [`Checks`] does, and brings the functions that contracts name.

mod checks;
mod contract;
mod evidence;
mod execute;
mod finding;
mod read;
mod status;
mod validate;

pub use checks::{
    CheckSpec, Checks, Figures, Kind, Miss, ParameterSpec, Parameters, Part, PlantedFault, Verdict,
};
pub use contract::{Amendment, CheckCall, Contract, Falsifier, Invariant, ParameterValue, Stage, schema};
pub use evidence::{Evidence, EvidenceError, Ground, Outcome, Provenance};
pub use execute::{Mode, Session, execute};
pub use finding::{Finding, Severity};
pub use read::{Source, read, read_folder};
pub use status::{ContractStatus, Current, FalsifierStatus, Status, status};
pub use validate::validate;
