//! Vocabularies that contradict themselves: each is refused by key and index, and none panics.

use engine::{Specials, Tokenizer};
use gguf::{Metadata, Value};
use proptest::prelude::*;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// GPT-2's character for a byte, from its description: printable Latin-1 is itself, the rest count from U+0100.
fn alphabet() -> Vec<String> {
    let mut shifted = 0x100..;
    let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    (0..256)
        .map(|b| if printable(b) { b } else { shifted.next().unwrap() })
        .map(|c| char::from_u32(c).unwrap().into())
        .collect()
}

/// A small vocabulary without fault: the bytes as ids 0 to 255, `he`, `ll`, `hell`, a control and a user's token.
fn small() -> (Vec<String>, Vec<i32>, Metadata) {
    let mut tokens = alphabet();
    tokens.extend(["he", "ll", "hell", "<|im_end|>", "<think>"].map(String::from));
    let mut types = vec![1; tokens.len()];
    (types[259], types[260]) = (3, 4);
    let mut metadata = Metadata::new();
    metadata.set("tokenizer.ggml.model", "gpt2");
    metadata.set("tokenizer.ggml.pre", "qwen2");
    metadata.set(TOKENS, tokens.clone());
    metadata.set(TYPES, types.clone());
    metadata.set(MERGES, ["h e", "l l", "he ll"].map(String::from).to_vec());
    metadata.set("tokenizer.ggml.eos_token_id", 259u32);
    (tokens, types, metadata)
}

fn ids(tokenizer: &Tokenizer, text: &str, specials: Specials) -> Vec<u32> {
    tokenizer.encode(text, specials).unwrap()
}

#[test]
fn the_small_one_is_sound() {
    let tokenizer = Tokenizer::from_metadata(&small().2).unwrap();
    assert_eq!(ids(&tokenizer, "hello", Specials::Parse), [258, 111]);
    assert_eq!(ids(&tokenizer, "o<|im_end|>", Specials::Parse), [111, 259]);
    assert_eq!(ids(&tokenizer, "<think>", Specials::AsText), [260]);
    assert!(ids(&tokenizer, "<|im_end|>", Specials::AsText).iter().all(|&id| id < 256));
    assert_eq!(tokenizer.eos(), [259]);
}

/// Where the alphabet's character has no token, a byte token takes its place.
#[test]
fn byte_fallback() {
    let (mut tokens, mut types, mut metadata) = small();
    (tokens[10], types[10]) = ("<0x0A>".into(), 6);
    tokens.push("<0x41>".into()); // "A" has a normal token: this one is for decoding only
    types.push(6);
    metadata.set(TOKENS, tokens);
    metadata.set(TYPES, types);
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(ids(&tokenizer, "\nA", Specials::Parse), [10, 65]);
    assert_eq!(tokenizer.decode(&[10, 65, 261]).unwrap(), "\nAA");
}

/// What converters fill a vocabulary up with is beyond the ids in use, wherever it ends.
#[test]
fn tokens_that_fill_rows() {
    let (mut tokens, mut types, mut metadata) = small();
    assert_eq!(Tokenizer::from_metadata(&metadata).unwrap().ids_in_use(), 261);
    (types[258], types[260]) = (5, 5);
    tokens.extend(["[PAD261]", "[PAD262]"].map(String::from));
    types.extend([5, 5]);
    metadata.set(TOKENS, tokens);
    metadata.set(TYPES, types);
    metadata.set(MERGES, ["h e", "l l"].map(String::from).to_vec());
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!((tokenizer.ids_in_use(), tokenizer.vocab_len()), (260, 263));
    assert_eq!(tokenizer.decode(&[261]).unwrap(), "[PAD261]", "who asks for it gets it");
    assert!(ids(&tokenizer, "[PAD261]", Specials::Parse).iter().all(|&id| id < 260));
}

/// Applies `fault` to the small vocabulary; the error must be one line that starts with `want`.
fn check(fault: impl FnOnce(&mut Vec<String>, &mut Vec<i32>, &mut Metadata), want: &str) {
    let (mut tokens, mut types, mut metadata) = small();
    let before = metadata.clone();
    fault(&mut tokens, &mut types, &mut metadata);
    // A fault in the vectors is set here; one in the metadata stands.
    if metadata == before {
        metadata.set(TOKENS, tokens);
        metadata.set(TYPES, types);
    }
    let error = Tokenizer::from_metadata(&metadata).unwrap_err().to_string();
    assert!(error.starts_with(want) && !error.contains('\n'), "got {error}\nwanted {want}");
}

fn set(
    key: &'static str,
    value: impl Into<Value>,
) -> impl FnOnce(&mut Vec<String>, &mut Vec<i32>, &mut Metadata) {
    let value = value.into();
    move |_, _, metadata| drop(metadata.set(key, value))
}

#[test]
fn refused_by_name() {
    check(
        set("tokenizer.ggml.model", "llama"),
        "tokenizer.ggml.model: \"llama\" is not supported (supported: \"gpt2\")",
    );
    check(set("tokenizer.ggml.pre", "llama-\n3"), "tokenizer.ggml.pre: \"llama-\\n3\" is not supported");
    for key in ["tokenizer.ggml.pre", TOKENS, TYPES, MERGES] {
        let (.., mut metadata) = small();
        metadata.retain(|other| other != key);
        let error = Tokenizer::from_metadata(&metadata).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
    for key in ["bos", "eos", "eot", "eom", "padding"] {
        let key: &'static str = format!("tokenizer.ggml.{key}_token_id").leak();
        check(set(key, 261u32), &format!("{key}: 261 is outside the vocabulary of 261 tokens"));
    }
    check(set(TOKENS, Vec::<String>::new()), "tokenizer.ggml.tokens: 0 tokens");
    check(set(TYPES, vec![1; 260]), "tokenizer.ggml.token_type: 260 types for 261 tokens");
    check(|_, types, _| types[7] = 9, "tokenizer.ggml.token_type[7]: 9 is no token type (1 to 6)");
    check(|_, types, _| types[7] = -1, "tokenizer.ggml.token_type[7]: -1");
    check(
        |tokens, _, _| tokens[257] = "he".into(),
        "tokenizer.ggml.tokens[257]: \"he\" is token 256 already",
    );
    check(
        |tokens, _, _| tokens[260] = "<|im_end|>".into(),
        "tokenizer.ggml.tokens[260]: \"<|im_end|>\" is token 259",
    );
    check(|tokens, _, _| tokens[259].clear(), "tokenizer.ggml.tokens[259]: an empty token");
    check(
        |tokens, _, _| tokens[256] = "世".into(),
        "tokenizer.ggml.tokens[256]: '世' in \"世\" is outside the byte-level",
    );
    check(|tokens, _, _| tokens[256] = "a b".into(), "tokenizer.ggml.tokens[256]: ' ' in \"a b\" is outside");
    check(|tokens, _, _| tokens[10] = "zz".into(), "tokenizer.ggml.tokens: no token for the byte 0x0a ('Ċ')");
    check(|_, types, _| types[65] = 3, "tokenizer.ggml.tokens: no token for the byte 0x41 ('A')");
    check(|_, types, _| types[65] = 6, "tokenizer.ggml.tokens[65]: byte token \"A\" is not <0x00> to <0xFF>");
}

#[test]
fn merges() {
    for (merge, want) in [
        ("hell", "\"hell\" has no space between two tokens"),
        ("h zz", "\"zz\" is no normal token"),
        ("zz h", "\"zz\" is no normal token"),
        ("h ", "\"\" is no normal token"),
        ("h l", "\"hl\" is no normal token"),
        ("h e l", "\"e l\" is no normal token"),
        // Longer together than any token: the library would write past its buffer's end.
        ("hell hell", "\"hellhell\" is no normal token"),
        ("hell <|im_end|>", "\"<|im_end|>\" is no normal token"),
    ] {
        check(
            set(MERGES, vec!["h e".to_owned(), merge.to_owned()]),
            &format!("tokenizer.ggml.merges[1]: {want}"),
        );
    }
}

proptest! {
    /// Whatever the arrays hold: an error or a tokenizer, which then encodes without loss.
    #[test]
    fn no_metadata_panics(
        changes in prop::collection::vec((0usize..261, prop_oneof![Just("a".to_owned()), "\\PC{0,3}", "<0x[0-9A-F]{2}>"], -1i32..8), 0..3),
        merges in prop::collection::vec(prop_oneof!["[hel]{1,3} [hel]{1,3}", "\\PC{0,4}"], 0..4),
    ) {
        let (mut tokens, mut types, mut metadata) = small();
        for (id, token, kind) in changes {
            (tokens[id], types[id]) = (token, kind);
        }
        metadata.set(TOKENS, tokens);
        metadata.set(TYPES, types);
        metadata.set(MERGES, merges);
        if let Ok(tokenizer) = Tokenizer::from_metadata(&metadata) {
            let ids = ids(&tokenizer, "hello he\nA<|im_end|>", Specials::AsText);
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), "hello he\nA<|im_end|>");
        }
    }
}
