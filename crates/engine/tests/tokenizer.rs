//! The tokenizer against the vocabulary of a real Qwen model: expected ids, and laws on random text.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use engine::{Specials, StreamDecoder, TokenKind, Tokenizer};
use proptest::prelude::*;
use tokenizers::NormalizedString;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(name)
}

/// The real vocabulary, where this checkout has it.
fn qwen() -> Option<&'static Tokenizer> {
    static QWEN: LazyLock<Option<Tokenizer>> = LazyLock::new(|| {
        let path = data("qwen2-vocab.gguf");
        if !path.exists() {
            println!("did not run: {} is not there", path.display());
            return None;
        }
        let file = gguf::File::open(&path).unwrap();
        Some(Tokenizer::from_metadata(file.metadata()).unwrap())
    });
    QWEN.as_ref()
}

fn nfc(text: &str) -> String {
    let mut text = NormalizedString::from(text);
    text.nfc();
    text.get().to_owned()
}

/// All texts of llama.cpp's test of this vocabulary. Every one is in NFC, so llama.cpp, which does not normalise,
/// and Qwen's tokenizer, which does, agree on them.
#[test]
fn expected_ids() {
    let Some(qwen) = qwen() else { return };
    let texts = fs::read_to_string(data("qwen2-vocab.inp")).unwrap();
    let texts: Vec<&str> =
        texts.strip_suffix("\n__ggml_vocab_test__\n").unwrap().split("\n__ggml_vocab_test__\n").collect();
    let ids = fs::read_to_string(data("qwen2-vocab.out")).unwrap();
    assert_eq!(texts.len(), 46);
    assert_eq!(ids.lines().count(), texts.len());
    for (text, ids) in texts.iter().zip(ids.lines()) {
        let want: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(nfc(text), *text);
        assert_eq!(qwen.encode(text, Specials::AsText).unwrap(), want, "{text:?}");
        assert_eq!(qwen.encode(text, Specials::Parse).unwrap(), want, "{text:?}");
        assert_eq!(qwen.decode(&want).unwrap(), *text);
    }
}

#[test]
fn vocabulary() {
    let Some(qwen) = qwen() else { return };
    assert_eq!(qwen.vocab_len(), 151_936);
    assert_eq!(qwen.eos(), [151_643, 151_645]);
    assert_eq!(qwen.token_bytes(151_645).unwrap(), b"<|im_end|>");
    assert_eq!(qwen.kind(151_645), Some(TokenKind::Control));
    assert_eq!(qwen.bos_to_add(), None);
    assert!(qwen.token_bytes(151_936).is_err());
    assert_eq!(
        qwen.decode(&[9707, 151_936]).unwrap_err().to_string(),
        "token id 151936 is outside the vocabulary of 151936 tokens"
    );
}

/// Text between special tokens is normalised; the tokens are found in the raw text.
#[test]
fn normalisation_and_specials() {
    let Some(qwen) = qwen() else { return };
    let (parse, as_text) = (Specials::Parse, Specials::AsText);
    let encode = |text: &str, specials| qwen.encode(text, specials).unwrap();
    for (decomposed, composed) in
        [("Cafe\u{301}", "Café"), ("A\u{30A}\n\u{1100}\u{1161}", "Å\n가"), ("\u{212B}", "Å")]
    {
        assert_eq!(encode(decomposed, as_text), encode(composed, as_text), "{composed}");
    }
    assert_ne!(encode("e", as_text)[0], encode("é", as_text)[0]);

    assert_eq!(encode("<|im_start|>user\nHi<|im_end|>", parse), [151_644, 872, 198, 13_048, 151_645]);
    let spelled = encode("<|im_start|>user\nHi<|im_end|>", as_text);
    assert!(spelled.iter().all(|&id| !qwen.is_special(id)), "{spelled:?}");
    assert_eq!(qwen.decode(&spelled).unwrap(), "<|im_start|>user\nHi<|im_end|>");
    // A mark cannot reach over a special token, nor hide one.
    assert_eq!(encode("e<|im_end|>\u{301}", parse)[1], 151_645);
}

/// Pieces as long as the text: blanks, a word, a line of signs, a word of marks.
#[test]
fn long_pieces() {
    let Some(qwen) = qwen() else { return };
    for text in
        [" ".repeat(1 << 20) + "x", "ab".repeat(1 << 16), "=".repeat(1 << 16), "e\u{301}".repeat(1 << 12)]
    {
        let ids = qwen.encode(&text, Specials::AsText).unwrap();
        assert_eq!(qwen.decode(&ids).unwrap(), nfc(&text));
    }
}

/// Texts in which control tokens, their fragments, marks and any characters mix.
fn texts() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<String>(),
        r"\PC{0,8}",
        "[a-zA-Z' \n\t]{0,12}",
        "[e\u{301}\u{327}\u{1100}\u{1161}가]{0,6}",
        prop::sample::select(vec![
            "<|im_end|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<|im_",
            "end|>",
            "<",
            "|",
            "<|<|im_end|>|>"
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn decoding_undoes_encoding(text in texts()) {
        let Some(qwen) = qwen() else { return Ok(()) };
        let ids = qwen.encode(&text, Specials::AsText).unwrap();
        let normal = nfc(&text);
        prop_assert_eq!(&qwen.decode(&ids).unwrap(), &normal);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| qwen.token_bytes(id).unwrap().iter().copied()).collect();
        prop_assert_eq!(&bytes, normal.as_bytes());
        prop_assert!(ids.iter().all(|&id| !qwen.is_special(id)), "prompt injection");
    }

    /// Streamed token by token: never half a character, and never less than is whole.
    #[test]
    fn streaming_equals_decoding(text in texts()) {
        let Some(qwen) = qwen() else { return Ok(()) };
        let ids = qwen.encode(&text, Specials::Parse).unwrap();
        let mut decoder = StreamDecoder::new(qwen);
        let (mut streamed, mut bytes) = (String::new(), Vec::new());
        for &id in &ids {
            streamed.push_str(decoder.push(id).unwrap());
            bytes.extend_from_slice(qwen.token_bytes(id).unwrap());
            let whole = std::str::from_utf8(&bytes).map_or_else(|error| error.valid_up_to(), str::len);
            prop_assert_eq!(streamed.as_bytes(), &bytes[..whole]);
        }
        prop_assert_eq!(decoder.finish(), "");
        prop_assert_eq!(streamed, qwen.decode(&ids).unwrap());
    }

    #[test]
    fn streaming_any_ids(ids in prop::collection::vec(0u32..151_936, 0..40)) {
        let Some(qwen) = qwen() else { return Ok(()) };
        let mut decoder = StreamDecoder::new(qwen);
        let mut streamed = String::new();
        for &id in &ids {
            streamed.push_str(decoder.push(id).unwrap());
        }
        streamed.push_str(decoder.finish());
        prop_assert_eq!(streamed, qwen.decode(&ids).unwrap());
    }
}
