//! Executing a falsifier, which makes evidence; or not being able to, which makes none.

use std::time::Instant;

use crate::{Checks, Contract, Evidence, Falsifier, Figures, Miss, Outcome, Parameters};

/// What is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The check as it stands.
    Plain,
    /// The check with its fault planted, which must make it fail.
    Planted,
}

/// What evidence says of the run that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The command.
    pub command: String,
    /// The day, `YYYY-MM-DD`.
    pub date: String,
}

/// Executes `falsifier` of a contract that was found valid.
///
/// # Errors
/// Why it could not be executed. That is no evidence, neither for nor against.
pub fn execute(
    contract: &Contract,
    falsifier: &Falsifier,
    mode: Mode,
    checks: &mut dyn Checks,
    session: &Session,
) -> Result<Evidence, String> {
    let call = falsifier.check.as_ref().ok_or("it has no check: no more than a proposal")?;
    let specs = checks.specs();
    let name = &call.name.value;
    let spec =
        specs.iter().find(|spec| spec.name == name).ok_or_else(|| format!("unknown check `{name}`"))?;
    let planted = match (mode, &call.fault) {
        (Mode::Plain, _) => None,
        (Mode::Planted, Some(fault)) => Some(fault.value.clone()),
        (Mode::Planted, None) => return Err("no fault is named that could be planted".into()),
    };
    let unable = |miss| match miss {
        Miss::Failed { why, .. } | Miss::Unable { why } => why,
    };
    let start = Instant::now();
    let (outcome, why, figures) = match checks.run(spec, &Parameters::of(call), planted.as_deref()) {
        Ok(figures) => (Outcome::Passed, None, figures),
        Err(Miss::Failed { why, figures }) => (Outcome::Failed, Some(why), figures),
        Err(miss @ Miss::Unable { .. }) => return Err(unable(miss)),
    };
    let seconds = (start.elapsed().as_secs_f64() * 1e3).round() / 1e3;
    // A check that measured nothing and did not fail has looked at nothing.
    if outcome == Outcome::Passed && figures == Figures::new() {
        return Err(format!("check `{name}` reported no figures: nothing was compared"));
    }
    Ok(Evidence {
        what: falsifier.prediction.value.trim().to_owned(),
        contract: contract.id.value.clone(),
        version: contract.version.value,
        falsifier: falsifier.id.value.clone(),
        check: call.signature(),
        planted,
        outcome,
        why,
        provenance: checks.provenance(spec, call).map_err(unable)?,
        command: session.command.clone(),
        date: session.date.clone(),
        seconds,
        figures,
    })
}
