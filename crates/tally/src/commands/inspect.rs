//! `tally inspect`: what is in a model file, of any architecture, and whether all of it can be used.
//!
//! Owns the arguments and the order of the sections; each section is a file.

mod check;
mod describe;
mod summary;
mod type_map;

use std::io::Write;
use std::path::PathBuf;

use gguf::{File, Tensor};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output;
use crate::table::{Align, Table};
use crate::threads::Threads;

use check::Check;
use summary::Summary;
use type_map::TypeMap;

const EXAMPLES: &str = "\
Examples:
  tally inspect model.gguf                   summary, metadata, and which type each tensor has in which layer
  tally inspect model.gguf --tensors         and every tensor with its type, shape and place
  tally inspect model.gguf --metadata        metadata in full: the chat template, every token
  tally inspect model.gguf --check           read every block; fail if a scale or weight is NaN or infinite
  tally inspect model.gguf --json | jq .type_map

Files of any architecture can be inspected, those with a vocabulary alone and the shards of split ones too.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, or any one shard of a split model.
    model: PathBuf,
    /// Read every block and report those with a NaN or infinity, with exit code 1 if there are any.
    #[arg(long)]
    check: bool,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Show metadata in full where long values are shortened otherwise.
    #[arg(long)]
    metadata: bool,
    /// Print all of this as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: Threads,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let file = File::open(&self.model)?;
        let check = if self.check {
            let check = self.threads.pool()?.install(|| check::check(file.tensors()));
            // What was read beyond a new end of the file would not have been the file.
            file.check_unchanged()?;
            Some(check)
        } else {
            None
        };
        if self.json {
            output::json(&self.to_json(&file, check.as_ref()))?;
        } else {
            self.print(&file, check.as_ref())?;
        }
        check.map_or(Ok(()), Check::verdict)
    }

    fn print(&self, file: &File, check: Option<&Check>) -> Result<(), Failure> {
        // Colours are dropped where standard output is no terminal.
        let mut out = std::io::BufWriter::new(anstream::stdout().lock());
        Summary::of(file).write(&self.model, &mut out)?;
        describe::write_metadata(file.metadata(), self.metadata, &mut out)?;
        if !file.tensors().is_empty() {
            TypeMap::of(file.tensors()).write(&mut out)?;
        }
        if self.tensors {
            writeln!(out, "\nTensors")?;
            tensor_table(file.tensors()).text("  ", &mut out)?;
        }
        if let Some(check) = check {
            check.write(&mut out)?;
        }
        Ok(out.flush()?)
    }

    fn to_json(&self, file: &File, check: Option<&Check>) -> Value {
        let mut report = Summary::of(file).to_json();
        report["path"] = json!(self.model);
        report["metadata"] = describe::metadata_json(file.metadata(), self.metadata);
        report["type_map"] = TypeMap::of(file.tensors()).to_json();
        if self.tensors {
            report["tensors"] = file.tensors().iter().map(tensor_json).collect();
        }
        if let Some(check) = check {
            report["check"] = check.to_json();
        }
        report
    }
}

fn tensor_table(tensors: &[Tensor]) -> Table {
    let mut table = Table::new(&[
        ("name", Align::Left),
        ("type", Align::Left),
        ("shape", Align::Left),
        ("bytes", Align::Right),
    ]);
    for tensor in tensors {
        table.row([
            output::printable(&tensor.name).into_owned(),
            tensor.dtype.to_string(),
            describe::shape(&tensor.dims),
            output::grouped(tensor.data.len() as u64), // `usize` is at most 64 bits wide
        ]);
    }
    table
}

fn tensor_json(tensor: &Tensor) -> Value {
    json!({ "name": *tensor.name, "type": tensor.dtype.name(), "shape": tensor.dims, "bytes": tensor.data.len() })
}
