//! What can be wrong with a model file, each as one readable line. Knows nothing of how it was found.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::Dtype;
use crate::dtype;

/// An error about a model file: [what](Error::kind) is wrong, and in which file where that is known.
#[derive(Debug)]
pub struct Error {
    path: Option<PathBuf>,
    /// Boxed, so that a `Result` stays small where nothing fails.
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

    /// The same error, said of the file at `path` unless it already names one.
    pub(crate) fn at(mut self, path: &Path) -> Self {
        self.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// A failed system call, with a full disk told apart.
    pub(crate) fn io(action: impl Into<String>, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::DiskFull { source },
            _ => ErrorKind::Io { action: action.into(), source },
        }
        .into()
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
    /// What lies below the kind, whose own message is already in this error's.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.kind)
    }
}

/// What is wrong with a model file. Offsets are in bytes from the start of the file unless said otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its variant and fields are")]
pub enum ErrorKind {
    // The file itself.
    #[error("{action}: {source}")]
    Io { action: String, source: io::Error },
    #[error("a directory, not a model file")]
    Directory,
    #[error("not a regular file")]
    NotRegular,
    #[error("the file is empty")]
    Empty,
    #[error("the file changed while it was open: it had {was} bytes and has {now}; load it again")]
    Changed { was: u64, now: u64 },

    // Its header.
    #[error("not a GGUF file: it starts with \"{}\", not \"GGUF\"{}", found.escape_ascii(), magic_hint(found))]
    Magic { found: [u8; 4] },
    #[error("a big-endian GGUF file (version {version}); supported is little-endian")]
    BigEndian { version: u32 },
    #[error("GGUF version {version}; supported are 2 and 3")]
    Version { version: u32 },

    // Reading on.
    #[error(
        "the file ends within {subject}: {needed} bytes needed at byte {offset}, {left} left; truncated?"
    )]
    Truncated { subject: String, offset: usize, needed: u64, left: usize },
    #[error("{subject} at byte {offset} is {count}, which the {left} bytes that follow cannot hold")]
    Count { subject: String, offset: usize, count: u64, left: usize },
    #[error("{subject} at byte {offset} is not UTF-8")]
    Utf8 { subject: String, offset: usize },

    // Metadata in the file.
    #[error("metadata key {} at byte {offset} has the unknown value type {id}", quoted(key))]
    ValueType { key: String, offset: usize, id: u32 },
    #[error("metadata key {} at byte {offset} is an array of arrays, which is not supported", quoted(key))]
    NestedArray { key: String, offset: usize },
    #[error("metadata key {} has a boolean of {found} at byte {offset}, neither 0 nor 1", quoted(key))]
    Bool { key: String, offset: usize, found: u8 },
    #[error("metadata key {} occurs again at byte {offset}", quoted(key))]
    DuplicateKey { key: String, offset: usize },
    #[error("metadata key \"general.alignment\" is {alignment}, not a power of two")]
    Alignment { alignment: u64 },

    // Metadata as asked for.
    #[error("metadata key {} is missing", quoted(key))]
    MissingKey { key: String },
    #[error("metadata key {} is {found}, expected {wanted}", quoted(key))]
    WrongType { key: String, found: &'static str, wanted: &'static str },
    #[error("metadata key {} is {value}, which does not fit {wanted}", quoted(key))]
    OutOfRange { key: String, value: i128, wanted: &'static str },

    // Tensors.
    #[error("tensor {} has {rank} dimensions; supported are 1 to 4", quoted(tensor))]
    Rank { tensor: String, rank: usize },
    #[error("tensor {} has a dimension of zero: {dims:?}", quoted(tensor))]
    ZeroDimension { tensor: String, dims: Vec<u64> },
    #[error(
        "tensor {} has the type {}; supported are {}",
        quoted(tensor), dtype::foreign_name(*id), dtype::supported()
    )]
    UnsupportedDtype { tensor: String, id: u32 },
    #[error(
        "tensor {} has rows of {row_len} elements, no multiple of the {} in a block of {dtype}",
        quoted(tensor), dtype.block_len()
    )]
    RowLength { tensor: String, dtype: Dtype, row_len: u64 },
    #[error("tensor {} is too large to address: {dims:?} of {dtype}", quoted(tensor))]
    TensorSize { tensor: String, dtype: Dtype, dims: Vec<u64> },
    #[error(
        "tensor {} starts at byte {offset} of the data, no multiple of the alignment {alignment}",
        quoted(tensor)
    )]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor {} takes {size} bytes from byte {offset} of the data, which has {available}; truncated?",
        quoted(tensor)
    )]
    OutOfBounds { tensor: String, offset: u64, size: u64, available: u64 },
    #[error("tensor {} starts at byte {offset} of the data, within tensor {}", quoted(tensor), quoted(other))]
    Overlap { tensor: String, other: String, offset: u64 },
    #[error("tensor {} occurs twice", quoted(tensor))]
    DuplicateTensor { tensor: String },

    // Split models.
    #[error("one of {count} shards, but its name does not end in -00001-of-{count:05}.gguf or the like")]
    ShardName { count: u16 },
    #[error("one of {count} shards; the others are needed: open it from a file")]
    ShardInMemory { count: u16 },
    #[error("shard {number} of {count} is missing")]
    ShardMissing { number: u16, count: u16 },
    #[error("named as shard {wanted}, but its split.no, which counts from 0, is {found}")]
    ShardNumber { wanted: u16, found: u64 },
    #[error("a shard of {found}, next to a shard of {wanted}")]
    ShardCount { wanted: u16, found: u64 },
    #[error("a shard of another model: its metadata key {} differs from the first shard's", quoted(key))]
    ShardForeign { key: String },
    #[error("the shards hold {found} tensors together; the first says {wanted} (split.tensors.count)")]
    ShardTensors { wanted: u64, found: usize },

    // Writing.
    #[error("the disk is too full: {source}")]
    DiskFull { source: io::Error },
    #[error("the model would take more bytes than a file can have")]
    FileSize,
    #[error("tensor {} got {written} of its {size} bytes", quoted(tensor))]
    Incomplete { tensor: String, written: u64, size: u64 },
}

/// A key or name from a file: escaped, so that it cannot play tricks on a terminal, and never long.
pub(crate) fn quoted(name: &str) -> String {
    const SHOWN: usize = 80;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}...", &name[..end]),
        None => format!("{name:?}"),
    }
}

/// What a file that is no model file may be instead.
fn magic_hint(found: &[u8; 4]) -> &'static str {
    match found {
        b"vers" => " (a Git LFS pointer? fetch the file itself)",
        b"<!DO" | b"<!do" | b"<htm" => " (a web page, saved in place of the download?)",
        b"PK\x03\x04" => " (a zip archive or a PyTorch checkpoint?)",
        b"lmgg" | b"tjgg" | b"fmgg" => " (a GGML file from before GGUF? convert it)",
        _ => "",
    }
}
