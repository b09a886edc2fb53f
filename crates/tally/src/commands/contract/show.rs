//! What contracts look like: executions as they come, statuses, the ledger. Computes nothing.

use std::io;

use contract::{CheckSpec, Contract, ContractStatus, Evidence, Mode, Outcome};
use serde_json::{Value, json};

use super::as_it_should;
use crate::failure::Failure;
use crate::output;
use crate::table::{Align, Table};

/// Executions as they come.
pub(super) struct Executed {
    mode: Mode,
    json: bool,
    records: Vec<Value>,
    not_run: Vec<(String, String)>,
    wrong: Vec<String>,
}

impl Executed {
    pub(super) fn new(mode: Mode, json: bool) -> Executed {
        Executed { mode, json, records: Vec::new(), not_run: Vec::new(), wrong: Vec::new() }
    }

    /// One that was executed.
    pub(super) fn done(&mut self, evidence: Evidence) -> Result<(), Failure> {
        let right = as_it_should(self.mode, evidence.outcome);
        if !right {
            self.wrong.push(evidence.falsifier.clone());
        }
        let word = match (self.mode, evidence.outcome) {
            (Mode::Plain, Outcome::Passed) => "held",
            (Mode::Plain, Outcome::Failed) => "REFUTED",
            (Mode::Planted, Outcome::Failed) => "noticed",
            (Mode::Planted, Outcome::Passed) => "OVERLOOKED",
        };
        if !self.json {
            let fault = evidence.planted.as_ref().map_or(String::new(), |fault| format!(" {fault}"));
            let figure = |(name, value): (&String, &Value)| format!("{name} {value}");
            let figures: Vec<_> = evidence.figures.iter().map(figure).collect();
            let said = evidence.why.clone().unwrap_or_else(|| figures.join(", "));
            let (id, seconds) = (&evidence.falsifier, evidence.seconds);
            output::line(format_args!("{id}: {word}{fault}, {seconds:.2} s: {}", output::printable(&said)))?;
        }
        self.records.push(serde_json::to_value(&evidence).map_err(Failure::new)?);
        Ok(())
    }

    /// One that could not be.
    pub(super) fn not_run(&mut self, id: &str, why: &str) -> Result<(), Failure> {
        if !self.json {
            output::line(format_args!("{id}: not run: {why}"))?;
        }
        self.not_run.push((id.to_owned(), why.to_owned()));
        Ok(())
    }

    /// The sum of it; a failure if something is wrong, if nothing was executed or, where `insists`, if something was not.
    pub(super) fn finish(self, insists: bool) -> Result<(), Failure> {
        let (done, wrong, left) = (self.records.len(), self.wrong.len(), self.not_run.len());
        let [good, bad] = match self.mode {
            Mode::Plain => ["held", "refuted"],
            Mode::Planted => ["noticed", "overlooked"],
        };
        if self.json {
            let not_run: Vec<_> =
                self.not_run.iter().map(|(id, why)| json!({ "falsifier": id, "why": why })).collect();
            output::json(&json!({ "evidence": self.records, "not_run": not_run }))?;
        } else {
            output::line(format_args!("\n{} {good}, {wrong} {bad}, {left} not run", done - wrong))?;
        }
        if let Some(first) = self.wrong.first() {
            return Err(Failure::new(format!("{wrong} of {done} {bad}, the first is {first}")));
        }
        match self.not_run.first() {
            Some((id, why)) if done == 0 || insists => Err(Failure::new(format!("{id} was not run: {why}"))),
            None if done == 0 => Err(Failure::new("nothing was executed")),
            _ => Ok(()),
        }
    }
}

const COLUMNS: [(&str, Align); 4] = [
    ("falsifier", Align::Left),
    ("status", Align::Left),
    ("seen to fail", Align::Left),
    ("from", Align::Left),
];

fn table(status: &ContractStatus) -> Table {
    let mut table = Table::new(&COLUMNS);
    for falsifier in &status.falsifiers {
        let seen = falsifier.seen_to_fail.clone().unwrap_or_else(|| "never".into());
        let because = output::printable(&falsifier.because).into_owned();
        table.row([falsifier.id.clone(), falsifier.status.to_string(), seen, because]);
    }
    table
}

/// Statuses for a terminal.
pub(super) fn statuses(known: &[(&Contract, ContractStatus)]) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for (i, (_, status)) in known.iter().enumerate() {
        use io::Write;
        let gap = if i > 0 { "\n" } else { "" };
        writeln!(out, "{gap}{} (version {}): {}", status.id, status.version, status.status)?;
        table(status).text("  ", &mut out)?;
        let stages = status
            .stages
            .iter()
            .map(|(name, reached)| format!("{name} {}", if *reached { "reached" } else { "open" }));
        writeln!(out, "  stages: {}", stages.collect::<Vec<_>>().join(", "))?;
    }
    Ok(io::Write::flush(&mut out)?)
}

/// The ledger.
pub(super) fn ledger(known: &[(&Contract, ContractStatus)]) -> Result<(), Failure> {
    use io::Write;
    let mut out = io::BufWriter::new(io::stdout().lock());
    writeln!(out, "# Contracts\n\nComputed from evidence by `tally contract status --md`; nobody edits it.")?;
    for (contract, status) in known {
        writeln!(out, "\n## {}: {}\n\n{}\n", status.id, status.status, contract.governs.value.trim())?;
        for invariant in &contract.invariants {
            let [words, formula] =
                [&invariant.words, &invariant.formula].map(|text| text.value.trim().replace('\n', " "));
            writeln!(out, "- **{}**: {words} `{formula}`", invariant.id.value)?;
        }
        writeln!(out)?;
        table(status).markdown(&mut out)?;
        for (name, reached) in &status.stages {
            writeln!(
                out,
                "{}- [{}] {name}",
                if *name == status.stages[0].0 { "\n" } else { "" },
                if *reached { 'x' } else { ' ' }
            )?;
        }
    }
    Ok(out.flush()?)
}

/// The checks that contracts can name.
pub(super) fn checks(specs: &[CheckSpec]) -> Result<(), Failure> {
    for (i, spec) in specs.iter().enumerate() {
        output::line(format_args!("{}{}: {}", if i > 0 { "\n" } else { "" }, spec.name, spec.about))?;
        for parameter in spec.parameters {
            let needed = if parameter.required { "" } else { ", optional" };
            output::line(format_args!(
                "  {}: {}; {}{needed}",
                parameter.name,
                parameter.about,
                parameter.kind.name()
            ))?;
        }
        for fault in spec.faults {
            output::line(format_args!("  fault {}: {}", fault.name, fault.about))?;
        }
    }
    Ok(())
}
