//! `tally contract`: contracts validated, executed, and what is known of them.

mod agreement;
mod faults;
mod forward;
mod gpu;
mod lab;
mod planted;
mod quantised;
mod reader;
mod registry;
mod show;

use std::env;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use contract::{
    Contract, ContractStatus, Current, Evidence, Falsifier, Finding, Ground, Mode, Outcome, Session,
    Severity, Source, execute, read, read_folder, status, validate,
};
use cuda::KernelFiles;
use serde_json::json;

use crate::device::{Device, KernelCache};
use crate::failure::Failure;
use crate::threads::Threads;
use crate::{clock, output};
use lab::Lab;

const EXAMPLES: &str = "\
Examples:
  tally contract validate                                   all of contracts/
  tally contract run                                        what can be executed without a GPU
  tally contract run qwen3-moe-forward-gpu-v1 --device cuda --model qwen3-30b-a3b.gguf
  tally contract run --planted                              each with its fault, which must make it fail
  tally contract status

A contract names what must hold, and falsifiers: checks that would show that it does not. `run` executes them and writes
what was seen below evidence/contracts/. `status` computes what is known from that alone: refuted; stale (of other
kernels, another model, another arithmetic or another check); proposed (no check exists, or none was executed);
algorithm-level (holds on a small model, or on emulated kernels); discharged (holds on the real shape on a real GPU).

A check that cannot be executed here is said not to have run, and counts as nothing.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Check contracts: exits with 1 if there is an error.
    Validate(Validate),
    /// Execute falsifiers and keep what was seen.
    Run(Run),
    /// Say what is known, from what is kept.
    Status(Status),
    /// List the checks that contracts can name, with parameters and faults.
    Checks,
    /// Print the JSON schema of contracts, for editors.
    Schema,
}

/// Where contracts and evidence lie.
#[derive(clap::Args)]
struct Places {
    /// The repository: its contracts/ and evidence/contracts/, and where paths in contracts begin.
    #[arg(long, value_name = "DIR", default_value = ".")]
    root: PathBuf,
    /// Where evidence is kept [default: evidence/contracts in the repository].
    #[arg(long, value_name = "DIR")]
    evidence: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Validate {
    /// Contracts [default: all of contracts/].
    files: Vec<PathBuf>,
    /// The repository.
    #[arg(long, value_name = "DIR", default_value = ".")]
    root: PathBuf,
}

#[derive(clap::Args)]
struct Run {
    /// Contracts or falsifiers, by id [default: all].
    ids: Vec<String>,
    /// The model [default: a small random one, made here].
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Where checks that need a GPU are executed: cuda, cuda:N, or emulated; with cpu they are not.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    /// Plant each check's fault, which must make it fail.
    #[arg(long)]
    planted: bool,
    /// Print the evidence as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    kernels: KernelCache,
}

#[derive(clap::Args)]
struct Status {
    /// Contracts, by id [default: all].
    ids: Vec<String>,
    /// A model that evidence is held against, beside the small one.
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Print Markdown: the ledger.
    #[arg(long, conflicts_with = "json")]
    md: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    places: Places,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::Validate(args) => args.run(),
            Action::Run(args) => args.run(),
            Action::Status(args) => args.run(),
            Action::Checks => show::checks(&registry::specs()),
            Action::Schema => output::json(&contract::schema()),
        }
    }
}

impl Places {
    fn contracts(&self) -> PathBuf {
        self.root.join("contracts")
    }

    fn evidence(&self) -> PathBuf {
        self.evidence.clone().unwrap_or_else(|| self.root.join("evidence").join("contracts"))
    }

    /// Contracts without an error; the first error otherwise.
    fn sources(&self) -> Result<Vec<Source>, Failure> {
        let folder = self.contracts();
        let (sources, mut findings) = all(&folder)?;
        findings.extend(validate(&sources, &registry::specs()));
        match findings.into_iter().find(|finding| finding.severity == Severity::Error) {
            Some(finding) => Err(Failure::new(finding.to_string().replacen(": error: ", ": ", 1))
                .hint("`tally contract validate` lists everything that is wrong")),
            None => Ok(sources),
        }
    }
}

/// Every contract of a folder that has at least one.
fn all(folder: &Path) -> Result<(Vec<Source>, Vec<Finding>), Failure> {
    let (sources, findings) = read_folder(folder).map_err(|finding| {
        Failure::new(format!("{}: {}", finding.file, finding.message)).hint("name the repository with --root")
    })?;
    if sources.is_empty() && findings.is_empty() {
        return Err(Failure::new(format!("there is no contract in {}", folder.display()))
            .hint("name the repository with --root"));
    }
    Ok((sources, findings))
}

impl Validate {
    fn run(self) -> Result<(), Failure> {
        let (sources, mut findings) = if self.files.is_empty() {
            all(&self.root.join("contracts"))?
        } else {
            let (mut sources, mut findings) = (Vec::new(), Vec::new());
            for path in &self.files {
                let name = path.display().to_string();
                let text = std::fs::read_to_string(path)
                    .map_err(|error| Failure::new(format!("{name}: {error}")))?;
                match read(&name, &text) {
                    Ok(source) => sources.push(source),
                    Err(finding) => findings.push(finding),
                }
            }
            (sources, findings)
        };
        findings.extend(validate(&sources, &registry::specs()));
        for finding in &findings {
            output::line(format_args!("{finding}"))?;
        }
        let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
        let warnings = findings.len() - errors;
        let plural = |n| if n == 1 { "" } else { "s" };
        let summary = format!("{errors} error{}, {warnings} warning{}", plural(errors), plural(warnings));
        output::line(format_args!("{summary}"))?;
        if errors > 0 { Err(Failure::new(summary)) } else { Ok(()) }
    }
}

impl Run {
    fn run(self) -> Result<(), Failure> {
        let sources = self.places.sources()?;
        let work = chosen(&sources, &self.ids)?;
        let mode = if self.planted { Mode::Planted } else { Mode::Plain };
        let mut lab = Lab::new(
            &self.places.root,
            self.model.as_deref(),
            self.device,
            self.threads.count(),
            self.kernels.files(),
        )?;
        let session = Session { command: command(), date: clock::date(clock::now()) };
        let folder = self.places.evidence();
        let mut tally = show::Executed::new(mode, self.json);
        for (contract, falsifier) in work {
            match execute(contract, falsifier, mode, &mut lab, &session) {
                Ok(evidence) => {
                    evidence.store(&folder).map_err(Failure::new)?;
                    tally.done(evidence)?;
                }
                Err(why) => tally.not_run(&falsifier.id.value, &why)?,
            }
        }
        // What was asked for by name, or on a device that was named, must run.
        let insists = !self.ids.is_empty() || lab.ground() != Ground::Ci;
        tally.finish(insists)
    }
}

impl Status {
    fn run(self) -> Result<(), Failure> {
        let sources = self.places.sources()?;
        let lab = Lab::new(&self.places.root, None, Device::Cpu, 0, KernelFiles::default())?;
        let mut models = vec![lab.named_model()];
        if let Some(path) = &self.model {
            models.push(
                Lab::new(&self.places.root, Some(path), Device::Cpu, 0, KernelFiles::default())?
                    .named_model(),
            );
        }
        let current = Current { kernel_hash: cuda::source_hash(), arithmetic: lab.arithmetic()?, models };
        let (specs, folder) = (registry::specs(), self.places.evidence());
        let (mut known, mut bad) = (Vec::new(), Vec::new());
        for source in chosen_contracts(&sources, &self.ids)? {
            let (records, errors) = Evidence::load(&folder, &source.contract.id.value);
            bad.extend(errors);
            known.push((&source.contract, status(&source.contract, &records, &current, &specs)));
        }
        if self.json {
            let statuses: Vec<&ContractStatus> = known.iter().map(|(_, status)| status).collect();
            output::json(&json!({ "arithmetic": current.arithmetic, "kernel_hash": current.kernel_hash,
                                  "contracts": statuses }))?;
        } else if self.md {
            show::ledger(&known)?;
        } else {
            show::statuses(&known)?;
        }
        // Evidence that is none has not been counted; that it is there is a failure all the same.
        match bad.first() {
            Some(error) => Err(Failure::new(error).hint("`git checkout` it, or execute the falsifier again")),
            None => Ok(()),
        }
    }
}

/// The falsifiers of `ids`, or all.
fn chosen<'a>(sources: &'a [Source], ids: &[String]) -> Result<Vec<(&'a Contract, &'a Falsifier)>, Failure> {
    let all = || {
        sources.iter().flat_map(|source| {
            source.contract.falsifiers.iter().map(|falsifier| (&source.contract, falsifier))
        })
    };
    let named = |id: &String, (contract, falsifier): &(&Contract, &Falsifier)| {
        contract.id.value == *id || falsifier.id.value == *id
    };
    if let Some(id) = ids.iter().find(|id| !all().any(|pair| named(id, &pair))) {
        return Err(unknown(id, sources));
    }
    Ok(all().filter(|pair| ids.is_empty() || ids.iter().any(|id| named(id, pair))).collect())
}

/// The contracts of `ids`, or all.
fn chosen_contracts<'a>(sources: &'a [Source], ids: &[String]) -> Result<Vec<&'a Source>, Failure> {
    if let Some(id) = ids.iter().find(|id| !sources.iter().any(|source| source.contract.id.value == **id)) {
        return Err(unknown(id, sources));
    }
    Ok(sources.iter().filter(|source| ids.is_empty() || ids.contains(&source.contract.id.value)).collect())
}

fn unknown(id: &str, sources: &[Source]) -> Failure {
    let known: Vec<_> = sources.iter().map(|source| source.contract.id.value.as_str()).collect();
    Failure::new(format!("there is no contract or falsifier `{id}`"))
        .hint(format!("contracts: {}", known.join(", ")))
}

/// The command as it was given, absolute paths by their last part: evidence is read on other machines.
fn command() -> String {
    let short = |word: std::ffi::OsString| {
        let path = Path::new(&word);
        let name = path.file_name().filter(|_| path.is_absolute());
        name.unwrap_or(&word).to_string_lossy().into_owned()
    };
    let words = env::args_os().skip(1).map(short);
    std::iter::once("tally".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// How an execution is to be read: with a fault planted, failing is right.
fn as_it_should(mode: Mode, outcome: Outcome) -> bool {
    (mode == Mode::Plain) == (outcome == Outcome::Passed)
}
