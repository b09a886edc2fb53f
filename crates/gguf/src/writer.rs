//! Writing a model file.

use std::io::Write;
use std::path::Path;

use crate::{Dtype, Error, ErrorKind, Metadata};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// How elements are stored.
    pub dtype: Dtype,
    /// One to four dimensions in GGUF order: `dims[0]` is the row length.
    pub dims: Vec<usize>,
}

/// A file being written under a temporary name.
#[derive(Debug)]
pub struct Writer {}

impl Writer {
    /// Lays the file out, reserves its room on the disk and writes header, metadata and tensor table.
    pub fn create(_path: &Path, _metadata: &Metadata, _tensors: &[TensorSpec]) -> Result<Writer, Error> {
        Err(ErrorKind::NotYet.into())
    }

    /// Where tensor `i` starts, in bytes from the start of the file.
    pub fn tensor_offset(&self, _i: usize) -> u64 {
        0
    }

    /// The bytes that tensor `i` takes.
    pub fn tensor_bytes(&self, _i: usize) -> u64 {
        0
    }

    /// The bytes of the whole file.
    pub fn size(&self) -> u64 {
        0
    }

    /// The temporary file: to be removed by whoever ends the process without unwinding.
    pub fn temporary_path(&self) -> &Path {
        Path::new("")
    }

    /// Writes `bytes` at `offset` within tensor `i`. Threads may write at once, each byte once.
    ///
    /// # Panics
    /// If the bytes do not lie within the tensor.
    pub fn write_at(&self, _i: usize, _offset: u64, _bytes: &[u8]) -> Result<(), Error> {
        Err(ErrorKind::NotYet.into())
    }

    /// Puts the file in place under its name.
    pub fn finish(self) -> Result<(), Error> {
        Err(ErrorKind::NotYet.into())
    }
}

/// Writes a whole file, tensor by tensor: `fill(i, out)` writes the data of tensor `i`.
pub fn write(
    _path: &Path,
    _metadata: &Metadata,
    _tensors: &[TensorSpec],
    _fill: impl FnMut(usize, &mut dyn Write) -> std::io::Result<()>,
) -> Result<(), Error> {
    Err(ErrorKind::NotYet.into())
}
