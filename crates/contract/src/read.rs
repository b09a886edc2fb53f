//! From YAML to a [`Contract`]: structure alone, with line and column where it is not one.

use std::fs;
use std::path::{Path, PathBuf};

use serde_saphyr::{Error, UserMessageFormatter};

use crate::Contract;
use crate::finding::{Finding, Severity};

/// A contract and where it was read.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file, as findings name it.
    pub file: String,
    /// Its name without folder and `.yaml`.
    pub stem: String,
    /// What it says.
    pub contract: Contract,
}

/// Reads the text of `file`.
pub fn read(file: &str, text: &str) -> Result<Source, Finding> {
    // The message is one line; whoever prints it has the place.
    let options = serde_saphyr::options! { with_snippet: false };
    let contract =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| finding(file, &error))?;
    let stem =
        Path::new(file).file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    Ok(Source { file: file.to_owned(), stem, contract })
}

fn finding(file: &str, error: &Error) -> Finding {
    let error = error.without_snippet();
    let place = error.location();
    let message = match error {
        Error::SerdeUnknownField { field, .. } if field == "status" => {
            "a status is computed from evidence (`tally contract status`): nobody types one".into()
        }
        error => strip_place(&error.render_with_formatter(&UserMessageFormatter)),
    };
    Finding {
        severity: Severity::Error,
        file: file.into(),
        line: place.map_or(0, |at| at.line()),
        column: place.map_or(0, |at| at.column()),
        message,
    }
}

/// The message without the place that the parser appends to it, and on one line.
fn strip_place(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.rsplit_once(" at line ").map_or(line, |(message, _)| message).to_owned()
}

/// Reads every `.yaml` of a folder, in the order of names; a finding for each that is no contract.
pub fn read_folder(folder: &Path) -> Result<(Vec<Source>, Vec<Finding>), Finding> {
    let unreadable = |path: &Path, error: std::io::Error| Finding {
        severity: Severity::Error,
        file: path.display().to_string(),
        line: 0,
        column: 0,
        message: format!("cannot be read: {error}"),
    };
    let entries = fs::read_dir(folder).map_err(|error| unreadable(folder, error))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    let (mut sources, mut findings) = (Vec::new(), Vec::new());
    for path in paths {
        let result = fs::read_to_string(&path)
            .map_err(|error| unreadable(&path, error))
            .and_then(|text| read(&path.display().to_string(), &text));
        match result {
            Ok(source) => sources.push(source),
            Err(finding) => findings.push(finding),
        }
    }
    Ok((sources, findings))
}
