//! Writing a model file: progress, timing, and nothing left behind by an error or Ctrl-C. Knows nothing of what is
//! written.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use gguf::{Metadata, TensorSpec, Writer};
use indicatif::DecimalBytes;

use crate::failure::Failure;
use crate::interrupt::Unfinished;
use crate::progress::Progress;

/// `general.quantization_version` (`GGML_QNT_VERSION` of ggml.h): the layout of blocks since 2023.
pub(crate) const QUANTIZATION_VERSION: u32 = 2;

/// A file that was written.
pub(crate) struct Written {
    /// Of the whole file, in bytes.
    pub(crate) size: u64,
    /// Of the tensors alone, in bytes.
    pub(crate) data: u64,
    /// From laying the file out to having it on the disk.
    pub(crate) elapsed: Duration,
}

impl fmt::Display for Written {
    /// Such as `18.56 GB in 12.0 s (1.55 GB/s)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed.as_secs_f64();
        // Shown to three digits: the fraction of a byte that is cut off is not seen.
        let rate = DecimalBytes((self.size as f64 / seconds.max(1e-9)) as u64);
        write!(f, "{} in {seconds:.1} s ({rate}/s)", DecimalBytes(self.size))
    }
}

/// Lays a file out and has `fill` write every tensor, counting the bytes in the bar that it is given. A file at `path`
/// is replaced once the new one is whole, and untouched until then.
pub(crate) fn write(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorSpec],
    what: &'static str,
    fill: impl FnOnce(&Writer, &Progress) -> Result<(), Failure>,
) -> Result<Written, Failure> {
    let start = Instant::now();
    let (writer, _unfinished) = Unfinished::create(|| {
        let writer = Writer::create(path, metadata, tensors)?;
        let temporary = writer.temporary_path().to_owned();
        Ok::<_, gguf::Error>((writer, temporary))
    })?;
    let size = writer.size();
    let data = (0..tensors.len()).map(|i| writer.tensor_bytes(i)).sum();
    let progress = Progress::bytes(what, data);
    fill(&writer, &progress)?;
    writer.finish()?;
    Ok(Written { size, data, elapsed: start.elapsed() })
}
