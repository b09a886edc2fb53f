//! A directory on the disk, read: a bisection's report, or else a trace.

use std::path::{Path, PathBuf};
use std::{fs, io};

use parity::dump::{self, Dump, DumpError};
use parity::report::{self, Report};

/// What a directory holds.
#[derive(Debug)]
pub enum Source {
    /// `tally bisect` wrote it.
    Bisection(Box<Report>),
    /// `tally trace` wrote it, or another program that knows the format.
    Trace(Box<Dump>),
}

/// Why a directory cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The system.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Neither a bisection nor a trace.
    #[error("{path}: neither a bisection nor a trace: there is no {report} and no {manifest}",
        path = path.display(), report = report::FILE, manifest = dump::MANIFEST)]
    Neither {
        /// The directory.
        path: PathBuf,
    },
    /// Not what a report is.
    #[error("{path}: {why}", path = path.display())]
    Bad {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A bad trace.
    #[error(transparent)]
    Trace(#[from] DumpError),
}

impl Source {
    /// Opens `dir`; where both are in it, the bisection.
    pub fn open(dir: &Path) -> Result<Source, SourceError> {
        let io = |path: &Path, source| SourceError::Io { path: path.to_owned(), source };
        if !fs::metadata(dir).map_err(|source| io(dir, source))?.is_dir() {
            let not = io::Error::from(io::ErrorKind::NotADirectory);
            return Err(io(dir, not));
        }
        let path = dir.join(report::FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(Source::Bisection(Box::new(
                parse(&bytes).map_err(|why| SourceError::Bad { path: path.clone(), why })?,
            ))),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io(&path, error)),
            Err(_) if !dir.join(dump::MANIFEST).exists() => {
                Err(SourceError::Neither { path: dir.to_owned() })
            }
            Err(_) => trace(Dump::open(dir)?, dir),
        }
    }
}

/// A trace of no more layers than can be drawn.
fn trace(dump: Dump, dir: &Path) -> Result<Source, SourceError> {
    let manifest = &dump.manifest;
    let written = manifest.entries.iter().filter_map(|entry| entry.place.site.layer);
    let typed = manifest.types.iter().filter_map(|types| types.layer);
    match written.chain(typed).find(|&layer| layer >= MOST_LAYERS) {
        Some(layer) => {
            let why = format!("layer {layer}: at most {MOST_LAYERS} layers can be drawn");
            Err(SourceError::Bad { path: dir.join(dump::MANIFEST), why })
        }
        None => Ok(Source::Trace(Box::new(dump))),
    }
}

/// A report, whose parts fit together.
fn parse(bytes: &[u8]) -> Result<Report, String> {
    // The version first: a later one may have other fields.
    let head: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    match (head["format"].as_str(), head["version"].as_u64()) {
        (Some(report::FORMAT), Some(version)) if version == u64::from(report::VERSION) => {}
        (Some(report::FORMAT), Some(version)) => {
            return Err(format!("version {version}, where {} is known", report::VERSION));
        }
        _ => return Err(format!("not a bisection's report: `format` is not \"{}\"", report::FORMAT)),
    }
    let report: Report = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    check(&report)?;
    Ok(report)
}

/// Far above any model; a hostile report must not make an endless page.
const MOST_LAYERS: usize = 4096;

fn check(report: &Report) -> Result<(), String> {
    for (index, run) in report.runs.iter().enumerate() {
        let at = |what: &str| format!("run {index} ({}): {what}", run.scenario);
        let beyond = |i: Option<usize>| i.is_some_and(|i| i >= run.cells.len());
        if beyond(run.first_divergence) || beyond(run.first_non_finite) {
            return Err(at("its first cell is beyond its cells"));
        }
        for cell in &run.cells {
            let layered = !matches!(cell.place.site.stage, model::Stage::Embed | model::Stage::Head);
            if cell.place.step >= run.steps.len()
                || layered != cell.place.site.layer.is_some()
                || cell.place.site.layer.is_some_and(|layer| layer >= MOST_LAYERS)
            {
                return Err(at(&format!("{}: no such place", cell.place)));
            }
        }
    }
    if report.types.iter().any(|types| types.layer.is_some_and(|layer| layer >= MOST_LAYERS)) {
        return Err(format!("types of a layer beyond the {MOST_LAYERS} that can be drawn"));
    }
    if report.runs.iter().all(|run| run.cells.is_empty()) {
        return Err("nothing was compared".into());
    }
    Ok(())
}
