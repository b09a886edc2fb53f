//! GGUF bytes put together without any check, as an attacker would.
#![allow(dead_code, reason = "each test takes what it needs")]

pub(crate) const U8: u32 = 0;
pub(crate) const U16: u32 = 2;
pub(crate) const U32: u32 = 4;
pub(crate) const I32: u32 = 5;
pub(crate) const BOOL: u32 = 7;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;
pub(crate) const U64: u32 = 10;

pub(crate) const F32: u32 = 0;
pub(crate) const Q8_0: u32 = 8;
pub(crate) const Q2_K: u32 = 10;

/// A string with its length before it.
pub(crate) fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// A key, the type of its value and the value's bytes.
pub(crate) fn pair(key: impl AsRef<[u8]>, value_type: u32, value: impl AsRef<[u8]>) -> Vec<u8> {
    [&string(key), &value_type.to_le_bytes()[..], value.as_ref()].concat()
}

/// The value of an array: the type and number of its elements and their bytes.
pub(crate) fn array(element_type: u32, count: u64, elements: impl AsRef<[u8]>) -> Vec<u8> {
    [&element_type.to_le_bytes()[..], &count.to_le_bytes(), elements.as_ref()].concat()
}

/// An entry of the tensor table.
pub(crate) fn tensor(name: impl AsRef<[u8]>, dims: &[u64], dtype: u32, offset: u64) -> Vec<u8> {
    let mut entry = string(name);
    entry.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| entry.extend(dim.to_le_bytes()));
    entry.extend(dtype.to_le_bytes());
    entry.extend(offset.to_le_bytes());
    entry
}

/// A header that claims what it likes.
pub(crate) fn header(version: u32, tensors: u64, pairs: u64) -> Vec<u8> {
    [&b"GGUF"[..], &version.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
}

/// A whole file whose data begin at the next multiple of `alignment` and are the bytes 0, 1, 2 and so on.
pub(crate) fn file_aligned(
    version: u32,
    pairs: &[Vec<u8>],
    tensors: &[Vec<u8>],
    data: u8,
    alignment: usize,
) -> Vec<u8> {
    let mut file = header(version, tensors.len() as u64, pairs.len() as u64);
    file.extend(pairs.concat());
    file.extend(tensors.concat());
    if data > 0 {
        file.resize(file.len().next_multiple_of(alignment), 0);
        file.extend(0..data);
    }
    file
}

/// A whole file with the default alignment.
pub(crate) fn file(version: u32, pairs: &[Vec<u8>], tensors: &[Vec<u8>], data: u8) -> Vec<u8> {
    file_aligned(version, pairs, tensors, data, 32)
}

/// A small file with a value of many types and two tensors; its last byte is the last of a tensor's data.
pub(crate) fn valid(version: u32) -> Vec<u8> {
    let pairs = [
        pair("general.architecture", STRING, string("qwen3")),
        pair("a.u8", U8, [7]),
        pair("a.bool", BOOL, [1]),
        pair("a.u64", U64, u64::MAX.to_le_bytes()),
        pair("a.ints", ARRAY, array(I32, 2, [1, 0, 0, 0, 255, 255, 255, 255])),
        pair("a.bools", ARRAY, array(BOOL, 3, [1, 0, 1])),
        pair("a.strings", ARRAY, array(STRING, 2, [string("<|im_end|>"), string("Ġthe")].concat())),
    ];
    let tensors = [tensor("a.weight", &[4, 2], F32, 0), tensor("b.weight", &[32, 2], Q8_0, 32)];
    file(version, &pairs, &tensors, 32 + 68)
}
