//! Every way in which a file can lie, and the line that each gets. The classes are those of llama.cpp's and
//! Ollama's advisories (CVE numbers where one is known) and of what the format allows and nobody can use.

#[path = "raw/memory.rs"]
mod memory;
mod raw;

use std::path::Path;

use gguf::File;
use raw::{ARRAY, BOOL, F32, I32, Q2_K, Q8_0, STRING, U8, U16, U32, U64};
use raw::{array, file, file_aligned, header, pair, string, tensor};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Opens `bytes`, and checks that the memory for it is justified by their length. The worst a file can do is many
/// keys of no length: 13 bytes in the file, and an entry, its name and its place in the map here.
#[track_caller]
fn open(name: &str, bytes: Vec<u8>) -> Result<File, gguf::Error> {
    /// For one error message.
    const MESSAGE_BYTES: usize = 1 << 10;
    let bound = 24 * bytes.len() + MESSAGE_BYTES;
    let (peak, result) = memory::peak(|| File::from_vec(bytes));
    assert!(peak <= bound.cast_signed(), "{name}: held {peak} bytes, {bound} are justified");
    result
}

/// A tensor table of one and 32 bytes of data.
fn one(tensor: Vec<u8>) -> Vec<u8> {
    file(3, &[], &[tensor], 32)
}

/// A metadata of one.
fn only(pair: Vec<u8>) -> Vec<u8> {
    file(3, &[pair], &[], 0)
}

/// Name, bytes and message of each.
fn cases() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let eight_floats = |name, offset| tensor(name, &[8], F32, offset);
    vec![
        // What is no such file.
        ("empty", vec![], "the file is empty"),
        ("magic", b"GGML\0\0\0\0".to_vec(), r#"not a GGUF file: it starts with "GGML", not "GGUF""#),
        (
            "magic-lfs-pointer",
            b"version https://git-lfs.github.com/spec/v1".to_vec(),
            r#"not a GGUF file: it starts with "vers", not "GGUF" (a Git LFS pointer? fetch the file itself)"#,
        ),
        (
            "magic-control-characters",
            b"\x1b[2J".to_vec(),
            r#"not a GGUF file: it starts with "\x1b[2J", not "GGUF""#,
        ),
        ("version-0", header(0, 0, 0), "GGUF version 0; supported are 2 and 3"),
        ("version-1", header(1, 0, 0), "GGUF version 1; supported are 2 and 3"),
        ("version-4", header(4, 0, 0), "GGUF version 4; supported are 2 and 3"),
        (
            "big-endian",
            header(3u32.swap_bytes(), 0, 0),
            "a big-endian GGUF file (version 3); supported is little-endian",
        ),
        // Counts and lengths that drive allocation: CVE-2024-21802, CVE-2025-66960.
        (
            "tensor-count",
            header(3, 1 << 40, 0),
            "the number of tensors at byte 8 is 1099511627776, which the 8 bytes that follow cannot hold",
        ),
        (
            "pair-count",
            header(3, 0, u64::MAX),
            "the number of metadata keys at byte 16 is 18446744073709551615, which the 0 bytes that follow cannot hold",
        ),
        (
            "key-length",
            [header(3, 0, 1), (1u64 << 63).to_le_bytes().to_vec(), vec![b'k'; 8]].concat(),
            "the file ends within metadata key 0: 9223372036854775808 bytes needed at byte 32, 8 left; truncated?",
        ),
        (
            "string-length",
            only(pair("k", STRING, [0xff; 8])),
            "the file ends within the value of metadata key \"k\": 18446744073709551615 bytes needed at byte 45, 0 left; \
             truncated?",
        ),
        (
            "array-count",
            only(pair("k", ARRAY, array(U8, 1 << 32, [0; 64]))),
            "the element count of metadata key \"k\" at byte 41 is 4294967296, which the 64 bytes that follow cannot hold",
        ),
        (
            // 2^61 elements of 8 bytes: their size in bytes is 0 modulo 2^64.
            "array-count-wraps",
            only(pair("k", ARRAY, array(U64, 1 << 61, [0; 64]))),
            "the element count of metadata key \"k\" at byte 41 is 2305843009213693952, which the 64 bytes that follow \
             cannot hold",
        ),
        (
            "array-of-strings-count",
            only(pair("k", ARRAY, array(STRING, 9, [0; 64]))),
            "the element count of metadata key \"k\" at byte 41 is 9, which the 64 bytes that follow cannot hold",
        ),
        (
            "array-element-length",
            only(pair("k", ARRAY, array(STRING, 2, [string("ok"), vec![9, 0, 0, 0, 0, 0, 0, 0]].concat()))),
            "the file ends within element 1 of metadata key \"k\": 9 bytes needed at byte 67, 0 left; truncated?",
        ),
        (
            "tensor-name-length",
            [header(3, 1, 0), (1u64 << 40).to_le_bytes().to_vec(), vec![0; 64]].concat(),
            "the file ends within the name of tensor 0: 1099511627776 bytes needed at byte 32, 64 left; truncated?",
        ),
        // Metadata.
        (
            "value-type",
            only(pair("k", 13, [0; 8])),
            "metadata key \"k\" at byte 33 has the unknown value type 13",
        ),
        (
            "element-type",
            only(pair("k", ARRAY, array(u32::MAX, 0, []))),
            "metadata key \"k\" at byte 37 has the unknown value type 4294967295",
        ),
        (
            "nested-array",
            only(pair("k", ARRAY, array(ARRAY, 1 << 20, array(ARRAY, 1 << 20, [])))),
            "metadata key \"k\" at byte 37 is an array of arrays, which is not supported",
        ),
        (
            "bool",
            only(pair("k", BOOL, [2])),
            "metadata key \"k\" has a boolean of 2 at byte 37, neither 0 nor 1",
        ),
        (
            "bool-in-array",
            only(pair("k", ARRAY, array(BOOL, 3, [0, 1, 255]))),
            "metadata key \"k\" has a boolean of 255 at byte 51, neither 0 nor 1",
        ),
        ("key-utf8", only(pair(b"k\xff", U8, [0])), "metadata key 0 at byte 33 is not UTF-8"),
        (
            "value-utf8",
            only(pair("k", STRING, string(b"ab\xc3"))),
            "the value of metadata key \"k\" at byte 47 is not UTF-8",
        ),
        (
            "element-utf8",
            only(pair("k", ARRAY, array(STRING, 2, [string("ok"), string([0x80])].concat()))),
            "element 1 of metadata key \"k\" at byte 67 is not UTF-8",
        ),
        (
            "duplicate-key",
            file(3, &[pair("k", U8, [0]), pair("l", U8, [0]), pair("k", U8, [0])], &[], 0),
            "metadata key \"k\" occurs again at byte 52",
        ),
        (
            "key-controls-terminal",
            only(pair("\x1b[2Jk", 99, [0])),
            r#"metadata key "\u{1b}[2Jk" at byte 37 has the unknown value type 99"#,
        ),
        // Alignment.
        (
            "alignment-0",
            only(pair("general.alignment", U32, [0; 4])),
            "metadata key \"general.alignment\" is 0, not a power of two",
        ),
        (
            "alignment-24",
            only(pair("general.alignment", U32, [24, 0, 0, 0])),
            "metadata key \"general.alignment\" is 24, not a power of two",
        ),
        (
            "alignment-negative",
            only(pair("general.alignment", I32, [0xff; 4])),
            "metadata key \"general.alignment\" is -1, which does not fit u64",
        ),
        (
            "alignment-type",
            only(pair("general.alignment", STRING, string("32"))),
            "metadata key \"general.alignment\" is string, expected u64",
        ),
        (
            // The start of the data would be past the end of the file, and of the address space when padded again.
            "alignment-huge",
            file_aligned(
                3,
                &[pair("general.alignment", U64, (1u64 << 63).to_le_bytes())],
                &[eight_floats("t", 0)],
                32,
                32,
            ),
            "tensor \"t\" takes 32 bytes from byte 0 of the data, which has 0; truncated?",
        ),
        // Shapes.
        ("rank-0", one(tensor("t", &[], F32, 0)), "tensor \"t\" has 0 dimensions; supported are 1 to 4"),
        (
            "rank-5",
            one(tensor("t", &[1, 1, 1, 1, 1], F32, 0)),
            "tensor \"t\" has 5 dimensions; supported are 1 to 4",
        ),
        (
            "rank-huge",
            one([string("t"), vec![0xff; 4], vec![0; 64]].concat()),
            "tensor \"t\" has 4294967295 dimensions; supported are 1 to 4",
        ),
        (
            "dimension-0",
            one(tensor("t", &[8, 0, 4], F32, 0)),
            "tensor \"t\" has a dimension of zero: [8, 0, 4]",
        ),
        (
            "row-length",
            one(tensor("t", &[48, 2], Q8_0, 0)),
            "tensor \"t\" has rows of 48 elements, no multiple of the 32 in a block of Q8_0",
        ),
        // Size arithmetic that overflows: CVE-2025-53630, CVE-2026-27940, CVE-2026-33298.
        (
            // The elements are 0 modulo 2^64.
            "elements-wrap",
            one(tensor("t", &[1 << 32, 1 << 32], F32, 0)),
            "tensor \"t\" is too large to address: [4294967296, 4294967296] of F32",
        ),
        (
            // The elements fit 64 bits, and their bytes are 32 modulo 2^64.
            "bytes-wrap",
            one(tensor("t", &[(1 << 62) + 8], F32, 0)),
            "tensor \"t\" is too large to address: [4611686018427387912] of F32",
        ),
        (
            // The bytes, 84 for 256 elements, fit 64 bits, and the elements do not.
            "elements-wrap-bytes-fit",
            one(tensor("t", &[1 << 33, 1 << 31], Q2_K, 0)),
            "tensor \"t\" is too large to address: [8589934592, 2147483648] of Q2_K",
        ),
        (
            // A sign bit set: negative where dimensions are signed.
            "dimension-negative",
            one(tensor("t", &[8, u64::MAX], F32, 0)),
            "tensor \"t\" is too large to address: [8, 18446744073709551615] of F32",
        ),
        // Types.
        (
            "type-mxfp4",
            one(tensor("t", &[32], 39, 0)),
            "tensor \"t\" has the type MXFP4; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, \
             Q4_K, Q5_K, Q6_K",
        ),
        (
            "type-iq2-xxs",
            one(tensor("t", &[256], 16, 0)),
            "tensor \"t\" has the type IQ2_XXS; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, \
             Q4_K, Q5_K, Q6_K",
        ),
        (
            "type-negative",
            one(tensor("t", &[32], u32::MAX, 0)),
            "tensor \"t\" has the type 4294967295, which is not known; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, \
             Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
        ),
        // Places: CVE-2026-7482.
        (
            "misaligned",
            one(eight_floats("t", 4)),
            "tensor \"t\" starts at byte 4 of the data, no multiple of the alignment 32",
        ),
        (
            "past-the-end",
            one(tensor("t", &[9], F32, 0)),
            "tensor \"t\" takes 36 bytes from byte 0 of the data, which has 32; truncated?",
        ),
        (
            "starts-past-the-end",
            one(eight_floats("t", 1 << 40)),
            "tensor \"t\" takes 32 bytes from byte 1099511627776 of the data, which has 32; truncated?",
        ),
        (
            // Offset and size add up to 0 modulo 2^64.
            "end-wraps",
            one(eight_floats("t", u64::MAX - 31)),
            "tensor \"t\" takes 32 bytes from byte 18446744073709551584 of the data, which has 32; truncated?",
        ),
        (
            "overlap",
            file(3, &[], &[tensor("t", &[16], F32, 0), eight_floats("u", 32)], 64),
            "tensor \"u\" starts at byte 32 of the data, within tensor \"t\"",
        ),
        (
            "overlap-out-of-order",
            file(3, &[], &[eight_floats("t", 32), tensor("u", &[16], F32, 0)], 64),
            "tensor \"t\" starts at byte 32 of the data, within tensor \"u\"",
        ),
        (
            "same-place",
            file(3, &[], &[eight_floats("t", 0), eight_floats("u", 0)], 32),
            "tensor \"u\" starts at byte 0 of the data, within tensor \"t\"",
        ),
        (
            "duplicate-tensor",
            file(3, &[], &[eight_floats("t", 0), eight_floats("u", 32), eight_floats("t", 64)], 96),
            "tensor \"t\" occurs twice",
        ),
        ("name-utf8", one(tensor(b"t\xfe", &[8], F32, 0)), "the name of tensor 0 at byte 33 is not UTF-8"),
        (
            "shard-in-memory",
            only(pair("split.count", U16, [3, 0])),
            "one of 3 shards; the others are needed: open it from a file",
        ),
    ]
}

#[test]
fn each_gets_its_line() {
    for (name, bytes, message) in cases() {
        match open(name, bytes) {
            Ok(_) => panic!("{name}: accepted"),
            Err(error) => assert_eq!(error.to_string(), message, "{name}"),
        }
    }
}

/// The fuzzer starts from these files and the valid ones: `cargo test -p gguf --test hostile -- --ignored`
/// writes them anew.
#[test]
#[ignore = "writes the fuzzer's corpus"]
fn write_fuzz_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/reader");
    std::fs::create_dir_all(&corpus).unwrap();
    let valid = [("valid-v2", raw::valid(2), ""), ("valid-v3", raw::valid(3), "")];
    for (name, bytes, _) in cases().into_iter().chain(valid) {
        std::fs::write(corpus.join(name), bytes).unwrap();
    }
}

#[test]
fn every_prefix_is_truncated() {
    for version in [2, 3] {
        let whole = raw::valid(version);
        File::from_vec(whole.clone()).expect("the whole file is valid");
        for len in 0..whole.len() {
            let Err(error) = open("prefix", whole[..len].to_vec()) else { panic!("accepted {len} bytes") };
            let message = error.to_string();
            let said = ["the file is empty", "truncated?", "bytes that follow cannot hold"];
            assert!(said.iter().any(|said| message.contains(said)), "{len} bytes: {message}");
        }
    }
}

#[test]
fn every_flipped_byte_is_survived() {
    let whole = raw::valid(3);
    for at in 0..whole.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            // Either answer is right, as long as what is accepted can be used.
            let Ok(file) = open("flipped", bytes) else { continue };
            for tensor in file.tensors() {
                assert_eq!(tensor.data.len(), tensor.rows() * tensor.row_bytes(), "byte {at} = {value}");
            }
        }
    }
}

#[test]
fn many_of_the_smallest_are_justified_too() {
    const MANY: u64 = 5_000;
    let keys: Vec<_> = (0..MANY).map(|i| pair(i.to_string(), U8, [0])).collect();
    assert_eq!(open("keys", file(3, &keys, &[], 0)).unwrap().metadata().len(), keys.len());
    let strings = pair("k", ARRAY, array(STRING, MANY, vec![0; 8 * 5_000]));
    open("strings", file(3, &[strings], &[], 0)).unwrap();
    let tensors: Vec<_> = (0..MANY).map(|i| tensor(i.to_string(), &[1], F32, 32 * i)).collect();
    let mut bytes = file(3, &[], &tensors, 32);
    bytes.resize(bytes.len() + 32 * tensors.len(), 0);
    // The data, which cost nothing, are not to justify the table.
    let (table, whole) = (tensors.concat().len(), bytes.len());
    let (peak, opened) = memory::peak(|| File::from_vec(bytes));
    assert_eq!(opened.unwrap().tensors().len(), tensors.len());
    assert!(
        peak <= (24 * table).cast_signed(),
        "tensors: held {peak} bytes for a table of {table} of {whole}"
    );
}

#[test]
fn long_names_are_cut_in_messages() {
    let error = File::from_vec(only(pair("é".repeat(1000), 13, []))).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("metadata key \"{}\"... at byte 2032 has the unknown value type 13", "é".repeat(80))
    );
}
