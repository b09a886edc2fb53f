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
//! ```
//! use gguf::{Dtype, File, Metadata, TensorSpec};
//!
//! # let directory = std::env::temp_dir().join(format!("gguf-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&directory)?;
//! let path = directory.join("model.gguf");
//! let mut metadata = Metadata::new();
//! metadata.set("general.architecture", "qwen3");
//! let norm = TensorSpec { name: "output_norm.weight".into(), dtype: Dtype::F32, dims: vec![4] };
//! gguf::write(&path, &metadata, &[norm], |_, out| out.write_all(&[0; 16]))?;
//!
//! let file = File::open(&path)?;
//! assert_eq!(file.metadata().str("general.architecture")?, "qwen3");
//! assert_eq!(file.tensor("output_norm.weight").map(|tensor| tensor.row_len()), Some(4));
//! # std::fs::remove_dir_all(&directory)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
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
