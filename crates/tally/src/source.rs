//! Where a model comes from: a file, or the one that ships in the binary.

use std::path::{Path, PathBuf};

use engine::Tokenizer;
use gguf::File;

use crate::failure::Failure;

/// The model that ships; models/README.md says what it is and how it was made.
static SHIPPED: &[u8] = include_bytes!("../../../models/tally-rust-Q4_K_M.gguf");

/// What the shipped model is called where a path would stand.
pub(crate) const SHIPPED_NAME: &str = "the model that ships";

/// Opens the model at `path`, or the one that ships.
pub(crate) fn open(path: Option<&Path>) -> Result<File, Failure> {
    match path {
        Some(path) => Ok(File::open(path)?),
        None => Ok(File::from_static(SHIPPED)?),
    }
}

/// The tokenizer of the model at `path`; tensors, if there are any, are not looked at.
pub(crate) fn tokenizer(path: &Path) -> Result<Tokenizer, Failure> {
    let file = File::open(path)?;
    Tokenizer::from_metadata(file.metadata()).map_err(|error| Failure::from(error).at(path.display()))
}

/// How a model is named in messages.
pub(crate) fn name(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or(SHIPPED_NAME.into(), |p| p.display().to_string())
}
