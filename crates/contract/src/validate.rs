//! What structure cannot say: that names mean something, that every invariant can be refuted, and that every falsifier
//! can be seen to fail.

use std::collections::BTreeMap;

use serde_saphyr::{Location, Spanned};

use crate::finding::{Finding, Severity};
use crate::{CheckCall, CheckSpec, Contract, Falsifier, Source};

/// Everything wrong with `sources`, which name checks of `specs`, in the order of files and lines.
pub fn validate(sources: &[Source], specs: &[CheckSpec]) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut seen = BTreeMap::new();
    for source in sources {
        let mut review = Review { source, specs, findings: Vec::new() };
        review.contract();
        for falsifier in &source.contract.falsifiers {
            let id = &falsifier.id;
            if let Some(other) = seen.insert(id.value.as_str(), source.file.as_str()) {
                review.error(id.referenced, format!("falsifier `{}` is in {other} already", id.value));
            }
        }
        review.findings.sort_by_key(|finding| (finding.line, finding.column));
        all.append(&mut review.findings);
    }
    all
}

struct Review<'a> {
    source: &'a Source,
    specs: &'a [CheckSpec],
    findings: Vec<Finding>,
}

impl<'a> Review<'a> {
    fn add(&mut self, severity: Severity, at: Location, message: String) {
        let file = self.source.file.clone();
        self.findings.push(Finding { severity, file, line: at.line(), column: at.column(), message });
    }

    fn error(&mut self, at: Location, message: String) {
        self.add(Severity::Error, at, message);
    }

    fn warning(&mut self, at: Location, message: String) {
        self.add(Severity::Warning, at, message);
    }

    fn contract(&mut self) {
        let Source { contract, stem, .. } = self.source;
        let id = &contract.id;
        let versioned = id.value.rsplit_once("-v").is_some_and(|(name, version)| {
            !name.is_empty() && !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit())
        });
        if !versioned {
            self.error(id.referenced, format!("`{}` has no version: such as `{}-v1`", id.value, id.value));
        }
        if id.value != *stem {
            self.error(id.referenced, format!("`{}` is in a file called `{stem}`", id.value));
        }
        self.not_blank("governs", &contract.governs);
        self.versions(contract);
        self.unique("invariant", contract.invariants.iter().map(|invariant| &invariant.id));
        for invariant in &contract.invariants {
            self.not_blank("words", &invariant.words);
            self.not_blank("formula", &invariant.formula);
            let mut refuted = contract.falsifiers.iter().flat_map(|falsifier| &falsifier.refutes);
            if !refuted.any(|name| name.value == invariant.id.value) {
                let message = format!("no falsifier would refute the invariant `{}`", invariant.id.value);
                self.warning(invariant.id.referenced, message);
            }
        }
        if contract.falsifiers.is_empty() {
            self.error(id.referenced, "a contract without a falsifier claims nothing".into());
        }
        for falsifier in &contract.falsifiers {
            self.falsifier(contract, falsifier);
        }
        self.unique("stage", contract.stages.iter().map(|stage| &stage.name));
        for name in contract.stages.iter().flat_map(|stage| &stage.shown_by) {
            if !contract.falsifiers.iter().any(|falsifier| falsifier.id.value == name.value) {
                self.error(name.referenced, format!("there is no falsifier `{}` here", name.value));
            }
        }
    }

    /// Versions count up to the contract's.
    fn versions(&mut self, contract: &Contract) {
        let version = &contract.version;
        if version.value == 0 {
            self.error(version.referenced, "versions count from 1".into());
        }
        for pair in contract.amendments.windows(2) {
            if pair[1].version.value <= pair[0].version.value {
                let at = pair[1].version.referenced;
                self.error(
                    at,
                    format!("amendment {} does not follow {}", pair[1].version.value, pair[0].version.value),
                );
            }
        }
        let last = contract.amendments.last().map_or(1, |amendment| amendment.version.value);
        if version.value > 0 && last != version.value {
            let message = format!("version {} of a contract whose amendments lead to {last}", version.value);
            self.error(version.referenced, message);
        }
    }

    fn falsifier(&mut self, contract: &Contract, falsifier: &'a Falsifier) {
        self.not_blank("prediction", &falsifier.prediction);
        self.not_blank("if_it_fails", &falsifier.if_it_fails);
        if falsifier.refutes.is_empty() {
            self.error(falsifier.id.referenced, format!("`{}` refutes nothing", falsifier.id.value));
        }
        for name in &falsifier.refutes {
            if !contract.invariants.iter().any(|invariant| invariant.id.value == name.value) {
                self.error(name.referenced, format!("there is no invariant `{}`", name.value));
            }
        }
        match &falsifier.check {
            None => {
                let message = format!("`{}` has no check: no more than a proposal", falsifier.id.value);
                self.warning(falsifier.id.referenced, message);
            }
            Some(call) => self.call(call),
        }
    }

    fn call(&mut self, call: &'a CheckCall) {
        let specs = self.specs;
        let Some(spec) = specs.iter().find(|spec| spec.name == call.name.value) else {
            let names: Vec<_> = specs.iter().map(|spec| spec.name).collect();
            let message = format!("unknown check `{}`; known are {}", call.name.value, names.join(", "));
            return self.error(call.name.referenced, message);
        };
        for (name, value) in &call.parameters {
            match spec.parameters.iter().find(|parameter| parameter.name == name) {
                None => {
                    let known: Vec<_> = spec.parameters.iter().map(|parameter| parameter.name).collect();
                    let message = format!(
                        "check `{}` has no parameter `{name}`; it has {}",
                        spec.name,
                        known.join(", ")
                    );
                    self.error(value.referenced, message);
                }
                Some(parameter) if !parameter.kind.takes(&value.value) => {
                    let message = format!(
                        "`{name}` of check `{}` is {}, not {}",
                        spec.name,
                        parameter.kind.name(),
                        value.value
                    );
                    self.error(value.referenced, message);
                }
                Some(_) => {}
            }
        }
        for parameter in spec.parameters.iter().filter(|parameter| parameter.required) {
            if !call.parameters.contains_key(parameter.name) {
                let message = format!("check `{}` needs the parameter `{}`", spec.name, parameter.name);
                self.error(call.name.referenced, message);
            }
        }
        match &call.fault {
            None => {
                let message = "no fault is planted: nobody will ever see this check fail".into();
                self.warning(call.name.referenced, message);
            }
            Some(fault) if !spec.faults.iter().any(|known| known.name == fault.value) => {
                let known: Vec<_> = spec.faults.iter().map(|fault| fault.name).collect();
                let message = format!(
                    "check `{}` has no fault `{}`; it has {}",
                    spec.name,
                    fault.value,
                    known.join(", ")
                );
                self.error(fault.referenced, message);
            }
            Some(_) => {}
        }
    }

    fn not_blank(&mut self, what: &str, text: &Spanned<String>) {
        if text.value.trim().is_empty() {
            self.error(text.referenced, format!("`{what}` is empty"));
        }
    }

    fn unique<'b>(&mut self, what: &str, names: impl Iterator<Item = &'b Spanned<String>>) {
        let mut seen = Vec::new();
        for name in names {
            if seen.contains(&&name.value) {
                self.error(name.referenced, format!("{what} `{}` is there twice", name.value));
            }
            seen.push(&name.value);
        }
    }
}
