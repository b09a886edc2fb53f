//! The reader of model files: whatever the bytes, an error of one line or a file that keeps every promise.
#![no_main]

use std::collections::BTreeSet;
use std::hint::black_box;

use gguf::{Array, File, Value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match File::from_vec(bytes.to_vec()) {
        Ok(file) => check(&file, bytes),
        Err(error) => {
            let line = error.to_string();
            assert!(!line.is_empty() && !line.contains(char::is_control), "{line:?}");
        }
    }
});

/// Reads everything in `file`, and checks what its documentation says.
fn check(file: &File, bytes: &[u8]) {
    assert_eq!(file.size(), bytes.len() as u64);
    assert!(matches!(file.version(), 2 | 3));

    let metadata = file.metadata();
    for (key, value) in metadata.iter() {
        // A NaN differs from itself, so that the places are compared.
        assert!(std::ptr::eq(metadata.get(key).expect("iterated over"), value));
        black_box((metadata.opt_str(key).ok(), metadata.opt_u32(key).ok(), metadata.opt_f32(key).ok()));
        if let Value::Array(Array::String(items)) = value {
            black_box(items.iter().map(String::len).sum::<usize>());
        }
    }

    let mut names = BTreeSet::new();
    let mut held = 0;
    for tensor in file.tensors() {
        assert!(names.insert(&*tensor.name), "{:?} twice", tensor.name);
        assert!(std::ptr::eq(file.tensor(&tensor.name).expect("is in the file"), tensor));
        assert!((1..=4).contains(&tensor.dims.len()) && !tensor.dims.contains(&0));
        assert_eq!(tensor.len(), tensor.rows() * tensor.row_len());
        assert_eq!(tensor.data.len(), tensor.rows() * tensor.row_bytes());
        black_box(tensor.data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
        held += tensor.data.len();
    }
    assert!(held <= bytes.len(), "tensors overlap");
}
