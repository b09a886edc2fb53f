//! Logits of a text on disk: what `--save-logits` writes and `--against` reads.
//!
//! The format is GGUF, so that writing in place only when whole, mapping, and distrust of what is read come with it,
//! and any GGUF reader opens it. With `W` windows of `C` tokens and a vocabulary of `V`:
//!
//! | key | |
//! | --- | --- |
//! | `general.architecture` | `logits` |
//! | `logits.version` | 1 |
//! | `logits.source` | the model and the precision of activations, for people |
//! | `logits.context_length` | `C` |
//! | `logits.tokens` | the ids of the windows, `W * C` of u32: what tells one text, or one vocabulary, from another |
//!
//! and one tensor `logits`, F32, GGUF order `[V, C - 1 - C / 2, W]`: the logits of each scored position. They are
//! kept as they were computed, 4 bytes each: against its own file a run has a divergence of exactly 0, and one as small
//! as two arithmetics' (1e-8 nats) is not buried, as it would be in 16 bits.

use std::path::Path;

use gguf::{Array, Dtype, File, Metadata, TensorSpec, Value};

use super::windows::Windows;
use crate::failure::Failure;
use crate::output;

const ARCHITECTURE: &str = "logits";
const VERSION: u32 = 1;
const TENSOR: &str = "logits";

/// The metadata of a new file.
pub(super) fn metadata(source: String, windows: &Windows) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String(ARCHITECTURE.to_owned()));
    metadata.set("logits.version", Value::U32(VERSION));
    metadata.set("logits.source", Value::String(source));
    metadata.set("logits.context_length", Value::U64(windows.ctx() as u64)); // `usize` is at most 64 bits wide
    metadata.set("logits.tokens", Value::Array(Array::U32(windows.ids().to_vec())));
    metadata
}

/// The tensor of a new file, for a vocabulary of `vocab`.
pub(super) fn tensor(vocab: usize, windows: &Windows) -> TensorSpec {
    let dims = vec![vocab, windows.scored().len(), windows.count()];
    TensorSpec { name: TENSOR.to_owned(), dtype: Dtype::F32, dims }
}

/// The bytes of `logits` in the file.
pub(super) fn encode(logits: &[f32]) -> Vec<u8> {
    logits.iter().flat_map(|logit| logit.to_le_bytes()).collect()
}

/// Logits of another run on the same windows.
pub(super) struct Reference {
    file: File,
    vocab: usize,
}

impl Reference {
    /// Opens the file at `path`; refuses one of other windows or another vocabulary.
    pub(super) fn open(path: &Path, vocab: usize, windows: &Windows) -> Result<Reference, Failure> {
        let file = File::open(path)?;
        check(&file, vocab, windows).map_err(|failure| failure.at(path.display()))?;
        Ok(Reference { file, vocab })
    }

    /// The model and arithmetic that the logits came from.
    pub(super) fn source(&self) -> &str {
        self.file.metadata().str("logits.source").unwrap_or("unknown")
    }

    /// The logits of the `row`-th scored position of all windows, `[V]`.
    pub(super) fn row(&self, row: usize) -> Vec<f32> {
        let tensor = self.file.tensor(TENSOR).expect("checked when the file was opened");
        let size = self.vocab * size_of::<f32>();
        let bytes = tensor.data[row * size..][..size].as_chunks().0;
        bytes.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    /// Whether the file still has the length that it was opened with.
    pub(super) fn check_unchanged(&self) -> Result<(), Failure> {
        Ok(self.file.check_unchanged()?)
    }
}

/// The file holds logits of these windows, or of these and more.
fn check(file: &File, vocab: usize, windows: &Windows) -> Result<(), Failure> {
    let metadata = file.metadata();
    let architecture = metadata.str("general.architecture")?;
    if architecture != ARCHITECTURE {
        let message = format!("a model of architecture `{}`, not logits", output::printable(architecture));
        return Err(Failure::new(message).hint("--save-logits writes what --against reads"));
    }
    let version = metadata.u32("logits.version")?;
    if version != VERSION {
        return Err(Failure::new(format!(
            "version {version} of the format is not supported (supported: {VERSION})"
        )));
    }
    let (ctx, ids) = (metadata.usize("logits.context_length")?, metadata.u32s("logits.tokens")?);
    if ctx != windows.ctx() {
        return Err(Failure::new(format!("windows of {ctx} tokens, not of {}", windows.ctx()))
            .hint(format!("give --ctx {ctx}")));
    }
    if let Some(at) = ids.iter().zip(windows.ids()).position(|(theirs, ours)| theirs != ours) {
        let message =
            format!("another text or vocabulary: token {at} is {}, not {}", ids[at], windows.ids()[at]);
        return Err(Failure::new(message));
    }
    let count = ids.len() / ctx;
    if count < windows.count() {
        let windows_of = if count == 1 { "one window".to_owned() } else { format!("{count} windows") };
        let message = format!("{windows_of} of this text, which has {}", windows.count());
        return Err(Failure::new(message).hint(format!("give --chunks {count}")));
    }
    let want = [vocab, windows.scored().len(), count];
    match file.tensor(TENSOR) {
        Some(tensor) if tensor.dtype == Dtype::F32 && tensor.dims == want => Ok(()),
        Some(tensor) if tensor.dims.first() != Some(&vocab) => {
            Err(Failure::new(format!("a vocabulary of {}, not of {vocab}", tensor.dims[0])))
        }
        Some(tensor) => Err(Failure::new(format!(
            "tensor `{TENSOR}`: {} of shape {:?}, not F32 of {want:?}",
            tensor.dtype, tensor.dims
        ))),
        None => Err(Failure::new(format!("tensor `{TENSOR}` is missing"))),
    }
}
