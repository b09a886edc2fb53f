//! One file's bytes into metadata and tensors: header, key-value pairs, tensor table, and where the data lie.
//! Knows nothing of paths, maps or shards.
//!
//! ```text
//! magic "GGUF" | version u32 | tensors u64 | pairs u64
//! pair:   key string | type u32 | value            (array: element type u32 | count u64 | elements)
//! tensor: name string | rank u32 | dims u64 x rank | type u32 | offset u64
//! padding to the alignment | data, each tensor at its offset from here
//! ```

use std::sync::Arc;

use crate::cursor::{Cursor, Subject};
use crate::extent::{self, MAX_RANK};
use crate::{Array, Bytes, Dtype, Error, ErrorKind, Metadata, Tensor, Value, ValueType};

/// Key length, value type and a one-byte value: the least that a pair takes.
const MIN_PAIR_BYTES: usize = 8 + 4 + 1;
/// Name length, rank, one dimension, type and offset: the least that a tensor's entry takes.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// What one file holds.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    /// In file order. Names may repeat: only all shards together can tell.
    pub(crate) tensors: Vec<Tensor>,
}

/// A tensor's entry in the table, its shape checked and its place not yet.
struct Entry {
    name: Arc<str>,
    dtype: Dtype,
    dims: Vec<usize>,
    /// From the start of the data.
    offset: u64,
    size: u64,
}

/// Parses a whole file.
pub(crate) fn parse(bytes: &Bytes) -> Result<Parsed, Error> {
    let mut cursor = Cursor::new(bytes);
    let version = version(&mut cursor)?;
    let tensor_count = cursor.count(MIN_TENSOR_BYTES, Subject::Header("the number of tensors"))?;
    let pair_count = cursor.count(MIN_PAIR_BYTES, Subject::Header("the number of metadata keys"))?;
    let metadata = metadata(&mut cursor, pair_count)?;
    let alignment = extent::alignment(&metadata)?;
    let mut entries = Vec::with_capacity(tensor_count);
    for i in 0..tensor_count {
        entries.push(entry(&mut cursor, i, alignment)?);
    }
    let tensors = place(entries, bytes, cursor.offset(), alignment)?;
    Ok(Parsed { version, metadata, tensors })
}

/// Magic and version.
fn version(cursor: &mut Cursor<'_>) -> Result<u32, Error> {
    let found = cursor.array(Subject::Header("the magic number"))?;
    if &found != b"GGUF" {
        return Err(ErrorKind::Magic { found }.into());
    }
    let version = cursor.u32(Subject::Header("the version"))?;
    match version {
        2 | 3 => Ok(version),
        // Versions are small, so that only the other byte order leaves the lower half empty.
        _ if version != 0 && version & 0xffff == 0 => {
            Err(ErrorKind::BigEndian { version: version.swap_bytes() }.into())
        }
        _ => Err(ErrorKind::Version { version }.into()),
    }
}

fn metadata(cursor: &mut Cursor<'_>, pairs: usize) -> Result<Metadata, Error> {
    let mut metadata = Metadata::new();
    for i in 0..pairs {
        let offset = cursor.offset();
        let key = cursor.string(Subject::Nth("metadata key", i as u64))?; // `usize` is at most 64 bits wide
        let value = value(cursor, &key)?;
        if metadata.set(&key, value).is_some() {
            return Err(ErrorKind::DuplicateKey { key, offset }.into());
        }
    }
    Ok(metadata)
}

/// A number in the file.
trait Scalar: Sized {
    const BYTES: usize;
    /// `bytes` has [`BYTES`](Self::BYTES) bytes.
    fn from_le(bytes: &[u8]) -> Self;
}

macro_rules! scalars {
    ($($ty:ty),*) => {$(
        impl Scalar for $ty {
            const BYTES: usize = size_of::<$ty>();
            fn from_le(bytes: &[u8]) -> Self {
                <$ty>::from_le_bytes(bytes.try_into().expect("callers pass BYTES bytes"))
            }
        }
    )*};
}
scalars!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

fn scalar<T: Scalar>(cursor: &mut Cursor<'_>, key: &str) -> Result<T, Error> {
    Ok(T::from_le(cursor.take(T::BYTES as u64, Subject::Value("value", key))?)) // at most 8
}

/// `count` numbers; [`Cursor::check_count`] has seen that they fit.
fn scalars<T: Scalar>(cursor: &mut Cursor<'_>, count: usize, key: &str) -> Result<Vec<T>, Error> {
    let bytes = cursor.take((count * T::BYTES) as u64, Subject::Value("value", key))?; // fits the file
    Ok(bytes.chunks_exact(T::BYTES).map(T::from_le).collect())
}

fn value_type(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, Error> {
    let offset = cursor.offset();
    let id = cursor.u32(Subject::Value("type", key))?;
    ValueType::from_id(id).ok_or_else(|| ErrorKind::ValueType { key: key.to_owned(), offset, id }.into())
}

fn value(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, Error> {
    Ok(match value_type(cursor, key)? {
        ValueType::U8 => Value::U8(scalar(cursor, key)?),
        ValueType::I8 => Value::I8(scalar(cursor, key)?),
        ValueType::U16 => Value::U16(scalar(cursor, key)?),
        ValueType::I16 => Value::I16(scalar(cursor, key)?),
        ValueType::U32 => Value::U32(scalar(cursor, key)?),
        ValueType::I32 => Value::I32(scalar(cursor, key)?),
        ValueType::U64 => Value::U64(scalar(cursor, key)?),
        ValueType::I64 => Value::I64(scalar(cursor, key)?),
        ValueType::F32 => Value::F32(scalar(cursor, key)?),
        ValueType::F64 => Value::F64(scalar(cursor, key)?),
        ValueType::Bool => Value::Bool(bools(cursor, 1, key)?[0]),
        ValueType::String => Value::String(cursor.string(Subject::Value("value", key))?),
        ValueType::Array => Value::Array(array(cursor, key)?),
    })
}

fn array(cursor: &mut Cursor<'_>, key: &str) -> Result<Array, Error> {
    let type_offset = cursor.offset();
    let element = value_type(cursor, key)?;
    let entry_bytes = match element {
        ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
        ValueType::U16 | ValueType::I16 => 2,
        ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
        // A string takes at least its length.
        ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
        ValueType::Array => {
            return Err(ErrorKind::NestedArray { key: key.to_owned(), offset: type_offset }.into());
        }
    };
    let count = cursor.count(entry_bytes, Subject::Value("element count", key))?;
    Ok(match element {
        ValueType::U8 => Array::U8(scalars(cursor, count, key)?),
        ValueType::I8 => Array::I8(scalars(cursor, count, key)?),
        ValueType::U16 => Array::U16(scalars(cursor, count, key)?),
        ValueType::I16 => Array::I16(scalars(cursor, count, key)?),
        ValueType::U32 => Array::U32(scalars(cursor, count, key)?),
        ValueType::I32 => Array::I32(scalars(cursor, count, key)?),
        ValueType::U64 => Array::U64(scalars(cursor, count, key)?),
        ValueType::I64 => Array::I64(scalars(cursor, count, key)?),
        ValueType::F32 => Array::F32(scalars(cursor, count, key)?),
        ValueType::F64 => Array::F64(scalars(cursor, count, key)?),
        ValueType::Bool => Array::Bool(bools(cursor, count, key)?),
        ValueType::String => Array::String(strings(cursor, count, key)?),
        ValueType::Array => unreachable!("refused above"),
    })
}

fn bools(cursor: &mut Cursor<'_>, count: usize, key: &str) -> Result<Vec<bool>, Error> {
    let start = cursor.offset();
    let bytes = cursor.take(count as u64, Subject::Value("value", key))?; // `usize` is at most 64 bits wide
    if let Some(i) = bytes.iter().position(|&byte| byte > 1) {
        let (offset, found) = (start + i, bytes[i]);
        return Err(ErrorKind::Bool { key: key.to_owned(), offset, found }.into());
    }
    Ok(bytes.iter().map(|&byte| byte == 1).collect())
}

fn strings(cursor: &mut Cursor<'_>, count: usize, key: &str) -> Result<Vec<String>, Error> {
    (0..count).map(|i| cursor.string(Subject::Element(i, key))).collect()
}

/// The `i`th entry of the tensor table.
fn entry(cursor: &mut Cursor<'_>, i: usize, alignment: u64) -> Result<Entry, Error> {
    let name = cursor.string(Subject::Nth("the name of tensor", i as u64))?; // `usize` is at most 64 bits wide
    let subject = Subject::Tensor(&name);
    let rank = cursor.u32(subject)? as usize; // at least 32 bits on every target with memory for a model
    if rank > MAX_RANK {
        return Err(ErrorKind::Rank { tensor: name, rank }.into());
    }
    let mut dims = [0; MAX_RANK];
    for dim in &mut dims[..rank] {
        *dim = cursor.u64(subject)?;
    }
    let id = cursor.u32(subject)?;
    let offset = cursor.u64(subject)?;
    let Some(dtype) = Dtype::from_id(id) else {
        return Err(ErrorKind::UnsupportedDtype { tensor: name, id }.into());
    };
    let (dims, size) = extent::tensor_extent(&name, dtype, &dims[..rank])?;
    if !offset.is_multiple_of(alignment) {
        return Err(ErrorKind::Misaligned { tensor: name, offset, alignment }.into());
    }
    Ok(Entry { name: name.into(), dtype, dims, offset, size })
}

/// Finds each tensor's data in `bytes`, whose table ends at `table_end`: within the file, none over another.
/// Gaps are allowed: they do no harm, and readers elsewhere that refuse them gain nothing by it.
fn place(entries: Vec<Entry>, bytes: &Bytes, table_end: usize, alignment: u64) -> Result<Vec<Tensor>, Error> {
    let len = bytes.len() as u64; // `usize` is at most 64 bits wide
    let data_start =
        (table_end as u64).checked_next_multiple_of(alignment).map_or(len, |start| start.min(len));
    let available = len - data_start;

    let mut tensors = Vec::with_capacity(entries.len());
    let mut spans = Vec::with_capacity(entries.len());
    for entry in entries {
        let Entry { name, dtype, dims, offset, size } = entry;
        let end = offset.checked_add(size).filter(|&end| end <= available);
        let Some(end) = end else {
            let tensor = name.as_ref().to_owned();
            return Err(ErrorKind::OutOfBounds { tensor, offset, size, available }.into());
        };
        let place = |at: u64| usize::try_from(data_start + at).expect("within the file, which is in memory");
        spans.push((offset, end, tensors.len()));
        tensors.push(Tensor { name, dtype, dims, data: bytes.slice(place(offset)..place(end)) });
    }

    spans.sort_unstable();
    for pair in spans.windows(2) {
        let [(_, end, first), (start, _, second)] = pair else { unreachable!("windows of two") };
        if start < end {
            let name = |i: usize| tensors[i].name.as_ref().to_owned();
            return Err(
                ErrorKind::Overlap { tensor: name(*second), other: name(*first), offset: *start }.into()
            );
        }
    }
    Ok(tensors)
}
