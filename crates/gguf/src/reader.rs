//! An opened model.

use std::path::Path;
use std::sync::Arc;

use crate::{Bytes, Dtype, Error, ErrorKind, Metadata};

/// An opened model file, or all the shards of a split one. Cheap to clone.
#[derive(Clone, Debug)]
pub struct File(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    version: u32,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    size: u64,
}

/// A tensor: its place in the model and its data.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: Arc<str>,
    /// How elements are stored.
    pub dtype: Dtype,
    /// One to four dimensions in GGUF order, none zero: `dims[0]` is the row length, contiguous.
    pub dims: Vec<usize>,
    /// The data: [`rows`](Tensor::rows) rows of [`row_bytes`](Tensor::row_bytes) bytes.
    pub data: Bytes,
}

impl File {
    /// Maps the file at `path`, or, where it is one shard of a split model, all the shards.
    pub fn open(_path: &Path) -> Result<File, Error> {
        Err(ErrorKind::NotYet.into())
    }

    /// A model embedded in the program.
    pub fn from_static(_bytes: &'static [u8]) -> Result<File, Error> {
        Err(ErrorKind::NotYet.into())
    }

    /// A model in memory.
    pub fn from_vec(_bytes: Vec<u8>) -> Result<File, Error> {
        Err(ErrorKind::NotYet.into())
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.0.version
    }

    /// The metadata (of the first shard).
    pub fn metadata(&self) -> &Metadata {
        &self.0.metadata
    }

    /// The tensors in file order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.0.tensors.iter().find(|tensor| &*tensor.name == name)
    }

    /// The bytes of all shards together.
    pub fn size(&self) -> u64 {
        self.0.size
    }
}

impl Tensor {
    /// Elements in a row.
    pub fn row_len(&self) -> usize {
        self.dims[0]
    }

    /// The product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.dims[1..].iter().product()
    }

    /// Bytes in a row.
    pub fn row_bytes(&self) -> usize {
        self.row_len() / self.dtype.block_len() * self.dtype.block_bytes()
    }

    /// Elements altogether, at least one.
    #[allow(clippy::len_without_is_empty, reason = "no dimension is zero, so it never is")]
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }
}
