//! The bytes before the data, and where each tensor goes. Writes nothing to any file.

use std::collections::BTreeSet;

use crate::{Array, Error, ErrorKind, Metadata, TensorSpec, Value, extent};

/// A file laid out.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Header, metadata and tensor table, without the padding that follows.
    pub(crate) head: Vec<u8>,
    /// In the order of the tensors.
    pub(crate) spans: Vec<Span>,
    /// The bytes of the whole file, padded to the alignment: some readers take the last tensor padded too.
    pub(crate) size: u64,
}

/// Where a tensor goes.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) name: String,
    /// From the start of the file.
    pub(crate) offset: u64,
    /// In bytes.
    pub(crate) size: u64,
}

/// Lays a version 3 file out: tensors in the order given, each at the next aligned offset.
///
/// Fails on what the reader would refuse: shapes, twice the same name, a bad `general.alignment`.
pub(crate) fn layout(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Layout, Error> {
    let alignment = extent::alignment(metadata)?;
    let pad = |at: u64| at.checked_next_multiple_of(alignment).ok_or(ErrorKind::FileSize);

    let mut head = Vec::new();
    head.extend(b"GGUF");
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes()); // `usize` is at most 64 bits wide
    head.extend((metadata.len() as u64).to_le_bytes()); // the same
    for (key, value) in metadata.iter() {
        put_str(&mut head, key);
        put_value(&mut head, value);
    }

    let mut names = BTreeSet::new();
    let mut spans = Vec::with_capacity(tensors.len());
    let mut end = 0u64;
    for TensorSpec { name, dtype, dims } in tensors {
        if !names.insert(name) {
            return Err(ErrorKind::DuplicateTensor { tensor: name.clone() }.into());
        }
        let dims: Vec<u64> = dims.iter().map(|&dim| dim as u64).collect(); // `usize` is at most 64 bits wide
        let (_, size) = extent::tensor_extent(name, *dtype, &dims)?;
        let offset = pad(end)?;
        end = offset.checked_add(size).ok_or(ErrorKind::FileSize)?;
        spans.push(Span { name: name.clone(), offset, size });

        put_str(&mut head, name);
        head.extend((dims.len() as u32).to_le_bytes()); // at most 4
        dims.iter().for_each(|dim| head.extend(dim.to_le_bytes()));
        head.extend(dtype.id().to_le_bytes());
        head.extend(offset.to_le_bytes());
    }

    let data_start = pad(head.len() as u64)?; // `usize` is at most 64 bits wide
    let size = pad(end)?.checked_add(data_start).ok_or(ErrorKind::FileSize)?;
    spans.iter_mut().for_each(|span| span.offset += data_start);
    Ok(Layout { head, spans, size })
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes()); // `usize` is at most 64 bits wide
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.extend(value.value_type().id().to_le_bytes());
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(text) => put_str(out, text),
        Value::Array(array) => put_array(out, array),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes()); // `usize` is at most 64 bits wide
    match array {
        Array::U8(items) => out.extend(items),
        Array::I8(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::U16(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::I16(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::U32(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::I32(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::U64(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::I64(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::F32(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::F64(items) => out.extend(items.iter().flat_map(|v| v.to_le_bytes())),
        Array::Bool(items) => out.extend(items.iter().map(|&v| u8::from(v))),
        Array::String(items) => items.iter().for_each(|text| put_str(out, text)),
    }
}
