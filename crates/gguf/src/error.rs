//! What can be wrong with a model file, each as one readable line.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::dtype;

/// An error about a model file: [what](Error::kind) is wrong, and in which file where that is known.
#[derive(Debug)]
pub struct Error {
    path: Option<PathBuf>,
    kind: Box<ErrorKind>,
}

impl Error {
    /// What is wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// The file at fault, unless the bytes came from memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The same error, said of the file at `path`.
    pub(crate) fn at(mut self, path: &Path) -> Self {
        self.path.get_or_insert_with(|| path.to_owned());
        self
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { path: None, kind: Box::new(kind) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}: {}", path.display(), self.kind),
            None => write!(f, "{}", self.kind),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The kind is already in the message; only what lies below it is a source.
        std::error::Error::source(&*self.kind)
    }
}

/// What is wrong with a model file. Keys and names are shown escaped: they come from the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its variant and fields are")]
pub enum ErrorKind {
    #[error("{action}: {source}")]
    Io { action: &'static str, source: io::Error },

    #[error("metadata key {key:?} is missing")]
    MissingKey { key: String },
    #[error("metadata key {key:?} is {found}, expected {wanted}")]
    WrongType { key: String, found: &'static str, wanted: &'static str },
    #[error("metadata key {key:?} is {value}, which does not fit {wanted}")]
    OutOfRange { key: String, value: i128, wanted: &'static str },
    #[error("not yet")]
    NotYet,
    #[error("tensor type {id} ({}) is not supported; supported are {}", dtype::foreign_name(*id).unwrap_or("unknown"), dtype::supported())]
    Foreign { id: u32 },
}
