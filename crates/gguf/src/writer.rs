//! Writing a model file: filled by many threads under a temporary name, in place only when whole.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::encode::{Layout, Span, layout};
use crate::{Dtype, Error, ErrorKind, Metadata};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// How elements are stored.
    pub dtype: Dtype,
    /// One to four dimensions in GGUF order, none zero: `dims[0]` is the row length.
    pub dims: Vec<usize>,
}

/// A version 3 file being written.
///
/// It lies next to its destination under a temporary name until [`finish`](Self::finish); dropped before, it
/// is removed. Whoever ends the process without unwinding (a signal) removes
/// [`temporary_path`](Self::temporary_path) first.
#[derive(Debug)]
pub struct Writer {
    destination: PathBuf,
    temporary: Temporary,
    spans: Vec<Span>,
    /// Bytes written so far of each tensor.
    written: Vec<AtomicU64>,
    size: u64,
}

impl Writer {
    /// Lays the file out, reserves its room on the disk, and writes header, metadata and tensor table.
    ///
    /// `general.alignment` in `metadata` is obeyed. A file at `path` stays as it is until
    /// [`finish`](Self::finish) replaces it; a symbolic link is followed.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Writer, Error> {
        Self::create_unnamed(path, layout(metadata, tensors)?).map_err(|error| error.at(path))
    }

    fn create_unnamed(path: &Path, layout: Layout) -> Result<Writer, Error> {
        let destination = destination(path)?;
        let temporary = Temporary::create(&destination)?;
        reserve(&temporary.file, layout.size)?;
        let writing = |source| Error::io("cannot write the header", source);
        temporary.file.write_all_at(&layout.head, 0).map_err(writing)?;
        let written = layout.spans.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Writer { destination, temporary, spans: layout.spans, written, size: layout.size })
    }

    /// Where tensor `i` starts, in bytes from the start of the file.
    pub fn tensor_offset(&self, i: usize) -> u64 {
        self.spans[i].offset
    }

    /// The bytes that tensor `i` takes.
    pub fn tensor_bytes(&self, i: usize) -> u64 {
        self.spans[i].size
    }

    /// The bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the file lies until it is finished.
    pub fn temporary_path(&self) -> &Path {
        &self.temporary.path
    }

    /// Writes `bytes` at `offset` within tensor `i`. Many threads may write at once; each byte of a tensor is
    /// to be written once.
    ///
    /// # Panics
    /// If the bytes do not lie within the tensor.
    pub fn write_at(&self, i: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.put(i, offset, bytes).map_err(|source| self.write_error(i, source))
    }

    fn put(&self, i: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let Span { name, offset: start, size } = &self.spans[i];
        let len = bytes.len() as u64; // `usize` is at most 64 bits wide
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= *size),
            "{len} bytes at {offset} of tensor {name:?}, which has {size}"
        );
        self.temporary.file.write_all_at(bytes, start + offset)?;
        self.written[i].fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    fn write_error(&self, i: usize, source: io::Error) -> Error {
        let name = &self.spans[i].name;
        Error::io(format!("cannot write tensor {}", crate::error::quoted(name)), source).at(&self.destination)
    }

    /// Puts the file in place, replacing what was there; fails, and leaves that untouched, where a tensor is
    /// not whole.
    ///
    /// The data are synced to the disk before the file is renamed. Otherwise a crash could leave the name with
    /// a file of zeros, and an error that the system meets only when it writes the data out (a network file
    /// system's full disk) would go unseen. The rename itself is not synced: after a crash the old file is as
    /// good an answer as the new one.
    pub fn finish(self) -> Result<(), Error> {
        let failed = |error: Error| error.at(&self.destination);
        for (span, written) in self.spans.iter().zip(&self.written) {
            let (written, size) = (written.load(Ordering::Relaxed), span.size);
            if written != size {
                return Err(failed(
                    ErrorKind::Incomplete { tensor: span.name.clone(), written, size }.into(),
                ));
            }
        }
        self.temporary.file.sync_data().map_err(|source| failed(Error::io("cannot write", source)))?;
        self.temporary.put_in_place(&self.destination).map_err(failed)
    }
}

/// Writes a whole file, tensor by tensor: `fill(i, out)` writes exactly the data of tensor `i`.
pub fn write(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorSpec],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    /// Large enough that the cost of a call vanishes.
    const BUFFER_BYTES: usize = 1 << 20;

    let writer = Writer::create(path, metadata, tensors)?;
    for i in 0..tensors.len() {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, TensorStream { writer: &writer, i, at: 0 });
        fill(i, &mut out).and_then(|()| out.flush()).map_err(|source| writer.write_error(i, source))?;
    }
    writer.finish()
}

/// Writes one tensor from its start to its end.
struct TensorStream<'a> {
    writer: &'a Writer,
    i: usize,
    at: u64,
}

impl Write for TensorStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.writer.tensor_bytes(self.i) - self.at;
        let len = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if len == 0 && !bytes.is_empty() {
            return Err(io::Error::other("more data than the tensor has room for"));
        }
        self.writer.put(self.i, self.at, &bytes[..len])?;
        self.at += len as u64; // at most `left`
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A new file that is removed unless it is put in place.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    file: fs::File,
}

impl Temporary {
    /// Creates a file in the directory of `destination`, so that it can be renamed to it.
    fn create(destination: &Path) -> Result<Self, Error> {
        for n in 0u32.. {
            let path = destination.with_file_name(format!(".gguf-{}-{n}.part", std::process::id()));
            match fs::File::create_new(&path) {
                Ok(file) => return Ok(Self { path, file }),
                // Of another writer in this process, or left by a killed one with the same number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io("cannot create", error)),
            }
        }
        unreachable!("a directory does not hold 2^32 temporary files of one process")
    }

    fn put_in_place(self, destination: &Path) -> Result<(), Error> {
        // Dropping `self` afterwards finds nothing to remove under the old name.
        fs::rename(&self.path, destination).map_err(|source| Error::io("cannot put in place", source))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing is left to do about a failure, and after `put_in_place` there is nothing to remove.
        let _ = fs::remove_file(&self.path);
    }
}

/// Where a file written to `path` ends up: links followed, so that they stay; anything but a regular file
/// refused, since renaming over `/dev/null` would replace it.
fn destination(path: &Path) -> Result<PathBuf, Error> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(ErrorKind::Directory.into()),
        Ok(found) if !found.is_file() => Err(ErrorKind::NotRegular.into()),
        Ok(_) => fs::canonicalize(path).map_err(|source| Error::io("cannot create", source)),
        Err(_) if path.file_name().is_none() => Err(ErrorKind::Directory.into()),
        // Not there yet, or not to be reached: creating the temporary file next to it will tell.
        Err(_) => Ok(path.to_owned()),
    }
}

/// Sets the length of `file`, and reserves the room where the file system can: a disk that is too full says so
/// now and not after many gigabytes.
fn reserve(file: &fs::File, size: u64) -> Result<(), Error> {
    let full = |source: io::Error| Error::io(format!("cannot reserve {size} bytes"), source);
    match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size)) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(size).map_err(full),
        Err(errno) => Err(full(errno.into())),
    }
}
