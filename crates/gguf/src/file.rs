//! An opened model: metadata and tensors of one file, or of all the shards of a split one.

use std::path::Path;
use std::sync::Arc;

use crate::map::{MappedFile, Part};
use crate::parse::parse;
use crate::{Bytes, Dtype, Error, ErrorKind, Metadata, shards};

/// An opened model file, or all the shards of a split one. Cheap to clone; `Send` and `Sync`.
#[derive(Clone, Debug)]
pub struct File(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    version: u32,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    /// Places in `tensors`, sorted by name.
    by_name: Vec<usize>,
    size: u64,
    /// Empty for a model in memory.
    files: Vec<MappedFile>,
}

/// A tensor: its name, shape and data.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: Arc<str>,
    /// How elements are stored.
    pub dtype: Dtype,
    /// One to four dimensions in GGUF order, none zero: `dims[0]` is the row length, contiguous.
    pub dims: Vec<usize>,
    /// The data: [`rows`](Tensor::rows) rows of [`row_bytes`](Tensor::row_bytes) bytes. Aligned in a mapped
    /// file as the file's alignment says; not at all in one from memory.
    pub data: Bytes,
}

impl File {
    /// Maps the file at `path` or, where it is any one shard of a split model, all the shards.
    ///
    /// The `split.*` keys of a split model are gone from its [`metadata`](Self::metadata): they describe the
    /// files, not the model, and must not be copied into a new one.
    ///
    /// A mapped file must not be changed while it is in use. See [`check_unchanged`](Self::check_unchanged) and
    /// [`exit_on_shrink`](crate::exit_on_shrink) for what can be done about those that are.
    pub fn open(path: &Path) -> Result<File, Error> {
        Self::from_parts(shards::open(path)?)
    }

    /// A model embedded in the program.
    pub fn from_static(bytes: &'static [u8]) -> Result<File, Error> {
        Self::from_memory(bytes.into())
    }

    /// A model in memory.
    pub fn from_vec(bytes: Vec<u8>) -> Result<File, Error> {
        Self::from_memory(bytes.into())
    }

    fn from_memory(bytes: Bytes) -> Result<File, Error> {
        if bytes.is_empty() {
            return Err(ErrorKind::Empty.into());
        }
        let parsed = parse(&bytes)?;
        if let Some(count) = shards::count(&parsed.metadata)? {
            return Err(ErrorKind::ShardInMemory { count }.into());
        }
        Self::from_parts(vec![Part { parsed, size: bytes.len() as u64, file: None }]) // `usize` is at most 64 bits
    }

    /// Joins `parts`, at least one; the first has the metadata.
    fn from_parts(parts: Vec<Part>) -> Result<File, Error> {
        let split = parts.len() > 1;
        let size = parts.iter().map(|part| part.size).sum();
        let mut parts = parts.into_iter();
        let first = parts.next().expect("a model has at least one part");
        let first_path = first.file.as_ref().map(|file| file.path().to_owned());

        let (version, mut metadata, mut tensors) =
            (first.parsed.version, first.parsed.metadata, first.parsed.tensors);
        let mut files: Vec<MappedFile> = first.file.into_iter().collect();
        for part in parts {
            tensors.extend(part.parsed.tensors);
            files.extend(part.file);
        }
        if split {
            metadata.retain(|key| !key.starts_with("split."));
        }
        let by_name = sorted_by_name(&tensors).map_err(|error| match &first_path {
            Some(path) => error.at(path),
            None => error,
        })?;
        Ok(File(Arc::new(Inner { version, metadata, tensors, by_name, size, files })))
    }

    /// The version of the format, 2 or 3 (of the first shard).
    pub fn version(&self) -> u32 {
        self.0.version
    }

    /// The metadata (of the first shard).
    pub fn metadata(&self) -> &Metadata {
        &self.0.metadata
    }

    /// The tensors in file order, shard after shard. No two have the same name.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let Inner { tensors, by_name, .. } = &*self.0;
        let found = by_name.binary_search_by(|&i| (*tensors[i].name).cmp(name)).ok()?;
        Some(&tensors[by_name[found]])
    }

    /// The bytes of all shards together.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The files that make the model up, in the order of shards; none for a model in memory.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.0.files.iter().map(MappedFile::path)
    }

    /// Whether every file still has the length that it was mapped with. Reading a map beyond the end of a file
    /// that was cut short since kills the process, and nobody can prevent it; a long-lived program checks now
    /// and then, and before it blames anything else.
    pub fn check_unchanged(&self) -> Result<(), Error> {
        self.0.files.iter().try_for_each(MappedFile::check_unchanged)
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

/// The places of `tensors` sorted by name; fails where two share one.
fn sorted_by_name(tensors: &[Tensor]) -> Result<Vec<usize>, Error> {
    let mut by_name: Vec<usize> = (0..tensors.len()).collect();
    by_name.sort_unstable_by(|&a, &b| tensors[a].name.cmp(&tensors[b].name));
    match by_name.windows(2).find(|pair| tensors[pair[0]].name == tensors[pair[1]].name) {
        Some(pair) => Err(ErrorKind::DuplicateTensor { tensor: tensors[pair[0]].name.to_string() }.into()),
        None => Ok(by_name),
    }
}
