//! Token ids to text, one at a time, as early as the text is certain. Knows nothing of stop strings.

use std::ops::Deref;

use crate::{Tokenizer, TokenizerError};

/// Decodes a stream of tokens without ever emitting half a character.
///
/// What all calls return together equals [`Tokenizer::decode`] of all ids together, and each call returns as
/// much of it as no later token can change: whole characters, and U+FFFD as soon as bytes are known to be no UTF-8.
#[derive(Debug)]
pub struct StreamDecoder<T> {
    tokenizer: T,
    text: Utf8Stream,
}

impl<T: Deref<Target = Tokenizer>> StreamDecoder<T> {
    /// A decoder at the start of a text. `tokenizer`: borrowed or shared.
    pub fn new(tokenizer: T) -> Self {
        Self { tokenizer, text: Utf8Stream::default() }
    }

    /// The text that token `id` completes; empty where it ends within a character.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`]; the decoder is as it was.
    pub fn push(&mut self, id: u32) -> Result<&str, TokenizerError> {
        Ok(self.text.push(self.tokenizer.token_bytes(id)?))
    }

    /// Ends the text: U+FFFD if it ends within a character, else nothing. The decoder is at the start again.
    pub fn finish(&mut self) -> &str {
        self.text.finish()
    }
}

/// Bytes to text, incrementally.
#[derive(Debug, Default)]
struct Utf8Stream {
    /// A valid but incomplete prefix of a character: at most 3 bytes between calls.
    pending: Vec<u8>,
    /// What the last call returned.
    ready: String,
}

impl Utf8Stream {
    fn push(&mut self, bytes: &[u8]) -> &str {
        self.ready.clear();
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.ready.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, tail) = rest.split_at(error.valid_up_to());
            self.ready.push_str(std::str::from_utf8(valid).expect("from_utf8 said that it is valid"));
            rest = tail;
            match error.error_len() {
                Some(invalid) => {
                    self.ready.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid..];
                }
                // Incomplete: the bytes to come may make a character of it.
                None => break,
            }
        }
        self.pending.drain(..self.pending.len() - rest.len());
        &self.ready
    }

    fn finish(&mut self) -> &str {
        self.ready.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.ready.push(char::REPLACEMENT_CHARACTER);
        }
        &self.ready
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `parts` and returns what each gave, the end included.
    fn stream(parts: &[&[u8]]) -> Vec<String> {
        let mut text = Utf8Stream::default();
        let mut out: Vec<String> = parts.iter().map(|part| text.push(part).to_owned()).collect();
        out.push(text.finish().to_owned());
        out
    }

    #[test]
    fn as_early_as_possible() {
        for (parts, want) in [
            (&[b"ab" as &[u8]] as &[&[u8]], &["ab", ""] as &[&str]),
            (&[b"\xF0", b"\x9F\xA6", b"\x99!"], &["", "", "🦙!", ""]),
            (&[b"x\xE2\x82", b"\xAC"], &["x", "€", ""]),
            (&[b"x\xE2\x82", b"y"], &["x", "\u{FFFD}y", ""]),
            (&[b"\xE2\x82"], &["", "\u{FFFD}"]),
            (&[b"\xFF", b"a"], &["\u{FFFD}", "a", ""]),
            // An overlong form and a surrogate are wrong at their second byte; the first is held until then.
            (&[b"\xE0", b"\x80"], &["", "\u{FFFD}\u{FFFD}", ""]),
            (&[b"\xED", b"\xA0", b"\x80"], &["", "\u{FFFD}\u{FFFD}", "\u{FFFD}", ""]),
            (&[b"\xE2", b"\xE2", b"\x82\xAC"], &["", "\u{FFFD}", "€", ""]),
        ] {
            assert_eq!(stream(parts), want, "{parts:x?}");
        }
    }

    proptest! {
        /// Any bytes, cut anywhere: the parts join to the lossy text, and no call withholds a finished prefix.
        #[test]
        fn equal_to_lossy(parts in prop::collection::vec(prop::collection::vec(
            prop_oneof![0u8..=255, 0x80u8..0xC0, 0xE0u8..0xF5, Just(0xF0), Just(0x9F)], 0..6), 0..12)) {
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let all = parts.concat();
            prop_assert_eq!(stream(&slices).concat(), String::from_utf8_lossy(&all));
        }

        /// A valid text, cut at every byte: what is out after each byte is the text's longest whole prefix.
        #[test]
        fn whole_characters_at_once(text in any::<String>()) {
            let mut decoder = Utf8Stream::default();
            let mut out = String::new();
            for (i, byte) in text.bytes().enumerate() {
                out.push_str(decoder.push(&[byte]));
                prop_assert_eq!(&out, &text[..text.floor_char_boundary(i + 1)]);
            }
            prop_assert_eq!(decoder.finish(), "");
        }
    }
}
