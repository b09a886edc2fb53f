//! Files mapped into memory. Knows what a file is to the operating system, and nothing of split models.

use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::parse::{Parsed, parse};
use crate::{Bytes, Error, ErrorKind};

/// A file that is mapped, kept open so that its length can be checked.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    file: fs::File,
    size: u64,
}

/// One file's contents, and the file unless they came from memory.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) parsed: Parsed,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) file: Option<MappedFile>,
}

impl Part {
    /// Maps and parses one file.
    pub(crate) fn open(path: &Path) -> Result<Part, Error> {
        Self::open_unnamed(path).map_err(|error| error.at(path))
    }

    fn open_unnamed(path: &Path) -> Result<Part, Error> {
        let cannot_open = |source| Error::io("cannot open", source);
        // Before opening, which would wait for a writer if this were a pipe.
        let kind = fs::metadata(path).map_err(cannot_open)?.file_type();
        if kind.is_dir() {
            return Err(ErrorKind::Directory.into());
        }
        if !kind.is_file() {
            return Err(ErrorKind::NotRegular.into());
        }
        let file = fs::File::open(path).map_err(cannot_open)?;
        let size = file.metadata().map_err(cannot_open)?.len();
        if size == 0 {
            return Err(ErrorKind::Empty.into());
        }
        // SAFETY: the map is read-only and private to this process. Its bytes change under us only if another
        // process writes to the file, which no program that maps files can exclude. No memory access depends on
        // that: all that steers one (counts, strings, shapes, offsets) is copied out first and checked after, and
        // what stays in the map are weights, of which any bits are valid. A file cut short raises SIGBUS, which
        // `exit_on_shrink` turns into a message.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io("cannot map", source))?;
        let parsed = parse(&Bytes::from_map(map))?;
        Ok(Part { parsed, size, file: Some(MappedFile { path: path.to_owned(), file, size }) })
    }
}

impl MappedFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn check_unchanged(&self) -> Result<(), Error> {
        let now =
            self.file.metadata().map_err(|source| Error::io("cannot stat", source).at(&self.path))?.len();
        if now == self.size {
            return Ok(());
        }
        Err(Error::from(ErrorKind::Changed { was: self.size, now }).at(&self.path))
    }
}
