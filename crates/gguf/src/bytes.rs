//! Shared, sliceable, read-only bytes that keep whatever holds them alive: a map, a vector or the program.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// Read-only bytes; cloning and slicing copy nothing. No alignment is promised.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    /// Always within the owner's length.
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Static(&'static [u8]),
    Vec(Arc<Vec<u8>>),
    Map(Arc<Mmap>),
}

impl Bytes {
    pub(crate) fn from_map(map: Mmap) -> Self {
        Self { range: 0..map.len(), owner: Owner::Map(Arc::new(map)) }
    }

    /// The bytes in `range`, counted from the start of these.
    ///
    /// # Panics
    /// If `range` is not within these bytes, like slicing.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.range.len(),
            "slice {range:?} of {} bytes",
            self.range.len()
        );
        let start = self.range.start;
        Self { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl From<&'static [u8]> for Bytes {
    fn from(bytes: &'static [u8]) -> Self {
        Self { owner: Owner::Static(bytes), range: 0..bytes.len() }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), owner: Owner::Vec(Arc::new(bytes)) }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Static(bytes) => bytes,
            Owner::Vec(bytes) => bytes,
            Owner::Map(map) => map,
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Bytes {
    /// The length alone: a tensor is too long to print.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}
