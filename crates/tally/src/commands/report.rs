//! `tally report`: what a bisection or a trace found, as a table in the terminal and as a page to look at.

mod table;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use parity::dump::PAGE;
use report::{Source, SourceError, View};
use serde_json::Value;

use crate::failure::Failure;
use crate::output;
use table::LayerTable;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory that `tally bisect --out` or `tally trace --out` wrote.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Do not write DIR/report.html.
    #[arg(long)]
    no_html: bool,
    /// Print what the page shows as JSON in place of the table.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let view = self.view()?;
        let page = self.directory.join(PAGE);
        if !self.no_html {
            write_whole(&page, &report::page(&view))?;
        }
        if self.json {
            let value: Value = serde_json::to_value(&view).expect("a view is numbers, text and lists");
            return output::json(&value);
        }
        let mut out = io::BufWriter::new(anstream::stdout().lock());
        LayerTable::of(&view).write(&view, &mut out)?;
        if !self.no_html {
            writeln!(out, "\n{}", output::printable(&page.display().to_string()))?;
        }
        Ok(out.flush()?)
    }

    fn view(&self) -> Result<View, Failure> {
        match Source::open(&self.directory)? {
            Source::Bisection(report) => Ok(View::of(&report, &self.directory)),
            Source::Trace(dump) => {
                View::of_trace(&dump, &self.directory).map_err(|error| SourceError::from(error).into())
            }
        }
    }
}

/// Beside its place and then into it, so that a page is never half there.
fn write_whole(path: &std::path::Path, text: &str) -> Result<(), Failure> {
    let beside = path.with_extension("html.part");
    let failed = |error: io::Error| {
        Failure::new(error).at(path.display()).hint("--no-html prints the table and writes nothing")
    };
    fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).map_err(failed)
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Failure {
        let hint = match &error {
            SourceError::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "is the path right?",
                io::ErrorKind::NotADirectory => "name the directory that the file is in",
                _ => return Failure::new(error),
            },
            SourceError::Neither { .. } => "`tally bisect --out DIR` and `tally trace --out DIR` write one",
            _ => "write it again: it was cut short, or changed since",
        };
        Failure::new(&error).hint(hint)
    }
}
