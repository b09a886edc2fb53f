//! Reading and writing GGUF model files; trusts nothing it reads.
//!
//! A GGUF file is a header, typed key-value metadata, a table of tensors and their data, little-endian
//! throughout. [`File`] maps one, or all the shards of a split one, and hands out [`Metadata`] and
//! [`Tensor`]s that point into the map. [`Writer`] lays a file out up front, so that many threads can fill
//! it, and only a finished file ever appears under its name.
//!
//! Everything about a file is checked when it is opened: whatever [`File::open`] returns can be used without
//! looking back. Nothing is allocated that the file's own length does not justify, and every error names the
//! key, tensor or byte offset at fault. The crate knows no model architecture and decodes no weights.
//!
//! Source: the specification, <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod bytes;
mod cursor;
mod dtype;
mod encode;
mod error;
mod extent;
mod file;
mod map;
mod metadata;
mod parse;
mod shards;
mod shrink;
mod value;
mod writer;

pub use bytes::Bytes;
pub use dtype::{Dtype, UnknownDtype};
pub use error::{Error, ErrorKind};
pub use file::{File, Tensor};
pub use metadata::Metadata;
pub use shrink::exit_on_shrink;
pub use value::{Array, Value, ValueType};
pub use writer::{TensorSpec, Writer, write};

/// The alignment of tensor data where `general.alignment` does not say otherwise, in bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;
