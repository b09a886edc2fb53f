//! Reading primitives from untrusted bytes: every step is checked against what is left. Knows no format above
//! little-endian numbers, counts and length-prefixed strings.

use std::fmt;

use crate::error::quoted;
use crate::{Error, ErrorKind};

/// What is being read, for errors.
#[derive(Clone, Copy)]
pub(crate) enum Subject<'a> {
    /// The header and its counts.
    Header(&'static str),
    /// The `n`th key or name, counted from 0, which has no name yet.
    Nth(&'static str, u64),
    /// The value of a metadata key, or its length or count.
    Value(&'static str, &'a str),
    /// One element of the array at a metadata key.
    Element(usize, &'a str),
    /// The entry of a tensor in the table.
    Tensor(&'a str),
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Subject::Header(what) => f.write_str(what),
            Subject::Nth(what, n) => write!(f, "{what} {n}"),
            Subject::Value(what, key) => write!(f, "the {what} of metadata key {}", quoted(key)),
            Subject::Element(i, key) => write!(f, "element {i} of metadata key {}", quoted(key)),
            Subject::Tensor(name) => write!(f, "the entry of tensor {}", quoted(name)),
        }
    }
}

/// A place in untrusted bytes.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, offset: 0 }
    }

    /// Bytes from the start.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.offset
    }

    /// The next `needed` bytes.
    pub(crate) fn take(&mut self, needed: u64, of: Subject<'_>) -> Result<&'a [u8], Error> {
        let rest = &self.bytes[self.offset..];
        match usize::try_from(needed).ok().and_then(|needed| rest.get(..needed)) {
            Some(taken) => {
                self.offset += taken.len();
                Ok(taken)
            }
            None => {
                let (offset, left) = (self.offset, rest.len());
                Err(ErrorKind::Truncated { subject: of.to_string(), offset, needed, left }.into())
            }
        }
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self, of: Subject<'_>) -> Result<[u8; N], Error> {
        let taken = self.take(N as u64, of)?; // `usize` is at most 64 bits wide
        Ok(taken.try_into().expect("take returns as many bytes as asked for"))
    }

    pub(crate) fn u32(&mut self, of: Subject<'_>) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(of)?))
    }

    pub(crate) fn u64(&mut self, of: Subject<'_>) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(of)?))
    }

    /// A count of entries that take at least `entry_bytes` each, checked against what is left: whatever is
    /// allocated for them afterwards is within a constant factor of the file's length.
    pub(crate) fn count(&mut self, entry_bytes: usize, of: Subject<'_>) -> Result<usize, Error> {
        let offset = self.offset;
        let count = self.u64(of)?;
        self.check_count(count, offset, entry_bytes, of)
    }

    /// Checks a count that was read at `offset`, like [`count`](Self::count).
    pub(crate) fn check_count(
        &self,
        count: u64,
        offset: usize,
        entry_bytes: usize,
        of: Subject<'_>,
    ) -> Result<usize, Error> {
        let left = self.left();
        match usize::try_from(count) {
            Ok(fits) if fits <= left / entry_bytes => Ok(fits),
            _ => Err(ErrorKind::Count { subject: of.to_string(), offset, count, left }.into()),
        }
    }

    /// A string: its length as `u64`, then that many bytes.
    ///
    /// The specification wants UTF-8 and the writers in use (llama.cpp's converters, gguf-py) encode Python
    /// strings, so that anything else is a damaged file. Byte-level vocabularies are no exception: they store
    /// each byte as a printable character, and SentencePiece ones as `<0xE2>`.
    pub(crate) fn string(&mut self, of: Subject<'_>) -> Result<String, Error> {
        let len = self.u64(of)?;
        let offset = self.offset;
        // Copied before it is checked: the bytes may be mapped, and change in between.
        let copy = self.take(len, of)?.to_vec();
        String::from_utf8(copy).map_err(|error| {
            let offset = offset + error.utf8_error().valid_up_to();
            ErrorKind::Utf8 { subject: of.to_string(), offset }.into()
        })
    }
}
