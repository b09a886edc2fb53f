//! A vocabulary for models that never saw text: the 256 bytes, filler, and the special tokens of ChatML.

use gguf::{Array, Value};

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Hands the tokenizer's keys for `size` tokens to `set`. Below 259 tokens there is no room for one: none is written.
pub(crate) fn describe(size: usize, mut set: impl FnMut(&str, Value)) {
    let Some(filler) = size.checked_sub(256 + SPECIAL.len()) else { return };
    let fill = (0..filler).map(|i| format!("<filler {i}>"));
    let tokens: Vec<String> =
        byte_alphabet().into_iter().map(String::from).chain(fill).chain(SPECIAL.map(String::from)).collect();
    // Types as llama.cpp numbers them: 1 normal, 3 control, 5 unused.
    let types = [vec![1; 256], vec![5; filler], vec![3; SPECIAL.len()]].concat();
    // Below u32's range: a vocabulary's size comes from a checked configuration.
    let id = |i: usize| Value::U32((256 + filler + i) as u32);
    set("tokenizer.ggml.model", Value::String("gpt2".into()));
    set("tokenizer.ggml.pre", Value::String("qwen2".into()));
    set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    set("tokenizer.ggml.merges", Value::Array(Array::String(Vec::new())));
    set("tokenizer.ggml.bos_token_id", id(0));
    set("tokenizer.ggml.eos_token_id", id(2));
    set("tokenizer.ggml.padding_token_id", id(0));
    set("tokenizer.ggml.add_bos_token", Value::Bool(false));
}

/// GPT-2's printable stand-in for each byte (Radford et al. 2019): printable Latin-1 stands for itself, the rest is
/// moved to U+0100 and up in order.
fn byte_alphabet() -> [char; 256] {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut moved = (0x100u32..).filter_map(char::from_u32);
    std::array::from_fn(|b| {
        let b = b as u8;
        if printable(b) { char::from(b) } else { moved.next().expect("there are far more than 256") }
    })
}
