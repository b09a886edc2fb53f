//! A trace on the disk: `manifest.json` and one safetensors file a step, in a directory of their own.
//!
//! The format is open: whoever can write safetensors can stand in for a side of a comparison. Each step's file holds the
//! tensors that the manifest lists, named `blk.6.experts_down.x` or `embed.x` ([`crate::Place::key`]), row-major, F32 (F16 and
//! BF16 are read as well). A reader trusts nothing: what is missing, cut short, of another model or of another prompt is
//! an error that says where.

use std::io;
use std::path::{Path, PathBuf};

use model::Buffer;
use sha2::{Digest, Sha256};

pub use manifest::{Arithmetic, EntryRecord, FORMAT, Manifest, Origin, StepRecord, VERSION};
pub use read::Dump;
pub use write::write;

use crate::trace::per_expert;

mod manifest;
mod read;
mod write;

/// The manifest's name in its directory.
pub const MANIFEST: &str = "manifest.json";
/// What `tally report` writes beside it.
pub const PAGE: &str = "report.html";

/// Why a trace cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The system.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Not what a trace is.
    #[error("{path}: {why}", path = path.display())]
    Bad {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Made with other weights.
    #[error("{path}: a trace of another model: {found}, where {want} is run", path = path.display())]
    OtherModel {
        /// The directory.
        path: PathBuf,
        /// The trace's.
        found: String,
        /// The model's.
        want: String,
    },
    /// Made from another prompt.
    #[error("{path}: a trace of another prompt: {why}", path = path.display())]
    OtherPrompt {
        /// The directory.
        path: PathBuf,
        /// Where the two part.
        why: String,
    },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> DumpError {
    let path = path.to_owned();
    move |source| DumpError::Io { path, source }
}

/// Little-endian, as safetensors has it.
pub(crate) fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The shape of what is kept of a buffer.
fn kept_shape(shape: &[usize], buffer: Buffer, lines: &Option<Vec<usize>>) -> Vec<usize> {
    let Some(lines) = lines else { return shape.to_vec() };
    let rest = &shape[if per_expert(buffer) { 2 } else { 1 }..];
    [&[lines.len()], rest].concat()
}
