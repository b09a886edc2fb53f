//! What is known, computed from evidence and from nothing else.

use std::fmt;

use serde::Serialize;

use crate::{CheckCall, CheckSpec, Contract, Evidence, Falsifier, Ground, Outcome, Part};

/// What is known of a falsifier or a contract, from the worst to the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The prediction failed, with these kernels, this model and this arithmetic.
    Refuted,
    /// All evidence is of other kernels, another model, another arithmetic or another check.
    Stale,
    /// There is no check, or none of its executions is kept.
    Proposed,
    /// It holds on a small model, or on the emulated kernels.
    AlgorithmLevel,
    /// It holds on the real shape on the device that it is about: for what concerns a GPU, a real one.
    Discharged,
}

impl Status {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Status::Refuted => "refuted",
            Status::Stale => "stale",
            Status::Proposed => "proposed",
            Status::AlgorithmLevel => "algorithm-level",
            Status::Discharged => "discharged",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What evidence must be of in order not to be stale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Current {
    /// Hash of the kernels' sources.
    pub kernel_hash: String,
    /// The arithmetic, by the bits that it gives.
    pub arithmetic: String,
    /// Fingerprints of the models at hand, by name; evidence of a model that is not among them cannot be held against
    /// anything and stands.
    pub models: Vec<(String, String)>,
}

/// What is known of a falsifier, and from what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FalsifierStatus {
    /// Its id.
    pub id: String,
    /// What is known.
    pub status: Status,
    /// The most that can be known: what neither runs on a GPU nor needs a model has no real shape to hold on.
    pub at_most: Status,
    /// From what.
    pub because: String,
    /// The fault that made it fail, once; none if it was never seen to fail.
    pub seen_to_fail: Option<String>,
}

/// What is known of a contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContractStatus {
    /// Its id.
    pub id: String,
    /// Its version.
    pub version: u32,
    /// The worst of its falsifiers, those aside that are at the most that can be known of them while others are better.
    pub status: Status,
    /// Each of them.
    pub falsifiers: Vec<FalsifierStatus>,
    /// Its stages of implementation, and whether each is reached: all that shows it holds at some level.
    pub stages: Vec<(String, bool)>,
}

/// Computes what is known of `contract` from `evidence`.
pub fn status(
    contract: &Contract,
    evidence: &[Evidence],
    current: &Current,
    specs: &[CheckSpec],
) -> ContractStatus {
    let of = |falsifier: &Falsifier| {
        let own = |record: &&Evidence| {
            record.contract == contract.id.value && record.falsifier == falsifier.id.value
        };
        falsifier_status(
            contract,
            falsifier,
            &evidence.iter().filter(own).collect::<Vec<_>>(),
            current,
            specs,
        )
    };
    let falsifiers: Vec<_> = contract.falsifiers.iter().map(of).collect();
    let holds = |id: &str| {
        falsifiers.iter().any(|falsifier| falsifier.id == id && falsifier.status >= Status::AlgorithmLevel)
    };
    let stages = contract
        .stages
        .iter()
        .map(|stage| (stage.name.value.clone(), stage.shown_by.iter().all(|id| holds(&id.value))))
        .collect();
    ContractStatus {
        id: contract.id.value.clone(),
        version: contract.version.value,
        status: worst(&falsifiers),
        falsifiers,
        stages,
    }
}

fn worst(falsifiers: &[FalsifierStatus]) -> Status {
    let worst = falsifiers.iter().map(|falsifier| falsifier.status).min().unwrap_or(Status::Proposed);
    let mut can_be = falsifiers.iter().filter(|falsifier| falsifier.at_most == Status::Discharged).peekable();
    let all_are = can_be.peek().is_some() && can_be.all(|falsifier| falsifier.status == Status::Discharged);
    if worst == Status::AlgorithmLevel && all_are { Status::Discharged } else { worst }
}

fn falsifier_status(
    contract: &Contract,
    falsifier: &Falsifier,
    evidence: &[&Evidence],
    current: &Current,
    specs: &[CheckSpec],
) -> FalsifierStatus {
    let spec_of = |call: &CheckCall| specs.iter().find(|spec| spec.name == call.name.value);
    let at_most = match falsifier.check.as_ref().and_then(|call| Some((call, spec_of(call)?))) {
        Some((call, spec)) if spec.depends_on(call, Part::Model) && contract.real_shape.is_none() => {
            Status::AlgorithmLevel
        }
        Some((call, spec))
            if !spec.depends_on(call, Part::Model) && !spec.depends_on(call, Part::Kernels) =>
        {
            Status::AlgorithmLevel
        }
        _ => Status::Discharged,
    };
    let known = |status, because: String, seen_to_fail| FalsifierStatus {
        id: falsifier.id.value.clone(),
        status,
        at_most,
        because,
        seen_to_fail,
    };
    let Some(call) = &falsifier.check else {
        return known(Status::Proposed, "no check exists".into(), None);
    };
    let Some(spec) = spec_of(call) else {
        return known(Status::Proposed, format!("there is no check `{}`", call.name.value), None);
    };
    let same_check = |record: &&&Evidence| record.check == call.signature();
    let seen_to_fail = evidence
        .iter()
        .filter(same_check)
        .find(|record| record.planted.is_some() && record.outcome == Outcome::Failed)
        .and_then(|record| record.planted.clone());
    let plain = || evidence.iter().filter(|record| record.planted.is_none());
    let staleness: Vec<_> = plain().map(|record| (record, stale(record, call, spec, current))).collect();
    let fresh = || staleness.iter().filter(|(_, stale)| stale.is_none()).map(|(record, _)| **record);
    if let Some(record) = fresh().find(|record| record.outcome == Outcome::Failed) {
        let why = record.why.as_deref().unwrap_or("the prediction failed");
        return known(Status::Refuted, format!("{}: {why}", place(record)), seen_to_fail);
    }
    let best =
        fresh().map(|record| (level(contract, call, spec, record), record)).max_by_key(|(level, _)| *level);
    let old: Vec<_> = staleness
        .iter()
        .filter_map(|(record, stale)| Some(format!("{}: {}", place(record), stale.as_ref()?)))
        .collect();
    match best {
        Some((level, record)) if level == Status::Discharged || old.is_empty() => {
            known(level, place(record), seen_to_fail)
        }
        Some((level, record)) => {
            known(level, format!("{}; stale: {}", place(record), old.join("; ")), seen_to_fail)
        }
        None if old.is_empty() => known(Status::Proposed, "never executed".into(), seen_to_fail),
        None => known(Status::Stale, old.join("; "), seen_to_fail),
    }
}

/// What a record that passed and is not stale amounts to.
fn level(contract: &Contract, call: &CheckCall, spec: &CheckSpec, record: &Evidence) -> Status {
    let on_gpu = record.provenance.r#where == Ground::Gpu;
    let of_gpu = spec.depends_on(call, Part::Kernels);
    let of_model = spec.depends_on(call, Part::Model);
    let real = contract.real_shape.is_some() && record.provenance.shape == contract.real_shape;
    // What makes its own models does so in the real shape's widths, and is a claim about a GPU or none at all.
    let enough = if of_model { real && (on_gpu || !of_gpu) } else { on_gpu && of_gpu };
    if enough { Status::Discharged } else { Status::AlgorithmLevel }
}

/// Why a record is no evidence for what is there now.
fn stale(record: &Evidence, call: &CheckCall, spec: &CheckSpec, current: &Current) -> Option<String> {
    if record.check != call.signature() {
        return Some(format!("of another check, {}", record.check));
    }
    let provenance = &record.provenance;
    if spec.depends_on(call, Part::Kernels) && provenance.kernel_hash != current.kernel_hash {
        return Some("of other kernels".into());
    }
    if spec.depends_on(call, Part::Arithmetic) && provenance.arithmetic != current.arithmetic {
        return Some(format!("of another arithmetic, {}", provenance.arithmetic));
    }
    let name = provenance.model.as_ref()?;
    let (_, hash) = current.models.iter().find(|(known, _)| known == name)?;
    (spec.depends_on(call, Part::Model) && provenance.model_hash.as_ref() != Some(hash))
        .then(|| format!("of another model called {name}"))
}

/// Where and when: `gpu (NVIDIA H200), qwen3-30b-a3b, 2026-11-23`.
fn place(record: &Evidence) -> String {
    let Evidence { provenance, date, .. } = record;
    let gpu = provenance.gpu.as_ref().map_or(String::new(), |gpu| format!(" ({gpu})"));
    let model = provenance.shape.as_ref().or(provenance.model.as_ref());
    let model = model.map_or(String::new(), |model| format!(", {model}"));
    format!("{}{gpu}{model}, {date}", provenance.r#where.name())
}
