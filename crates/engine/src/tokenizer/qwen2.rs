//! The `qwen2` pre-tokenizer: cuts a text into the pieces that no merge crosses. Knows nothing of tokens.

use std::sync::LazyLock;

use regex::Regex;

/// Qwen's published pattern, less its look-ahead `\s+(?!\S)`, which [`pieces`] does by hand.
///
/// Why by hand: a back-tracking engine is needed for a look-ahead, and it gives up on long runs of white space
/// (the `tokenizers` crate then takes the rest of the text as one piece, without an error). An automaton takes
/// time linear in the text.
static PATTERN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    )
    .expect("a constant pattern, compiled by every test")
});

/// The pieces of `text` in order; together they are `text`.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        // Every character is matched by one of the alternatives, so a match starts where the text does.
        let found = PATTERN.find(rest)?.end();
        let (piece, tail) = rest.split_at(found - given_back(&rest[..found], &rest[found..]));
        rest = tail;
        Some(piece)
    })
}

/// How many bytes a match leaves to the next piece. `\s+(?!\S)` matches white space that ends the text whole, and
/// leaves the last character of any other run, if the run has more, to the word after it.
///
/// Only `\s+` and `\s*[\r\n]+` match white space alone, and a match of the latter ends with a line break.
fn given_back(found: &str, tail: &str) -> usize {
    let last = found.chars().next_back().map_or(0, char::len_utf8);
    let is_space_run = found.chars().next().is_some_and(char::is_whitespace)
        && found.chars().all(char::is_whitespace)
        && !found.ends_with(['\r', '\n']);
    if is_space_run && !tail.is_empty() && found.len() > last { last } else { 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    use super::*;

    /// The pattern as published in Qwen's `tokenizer.json`, run as `tokenizers` runs it.
    fn published(text: &str) -> Vec<String> {
        static SPLIT: LazyLock<Split> = LazyLock::new(|| {
            let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
            Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false).unwrap()
        });
        let mut split = PreTokenizedString::from(text);
        SPLIT.pre_tokenize(&mut split).unwrap();
        let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.to_owned()).filter(|piece| !piece.is_empty()).collect()
    }

    #[test]
    fn cuts() {
        for (text, want) in [
            ("", &[] as &[&str]),
            ("Hello world", &["Hello", " world"]),
            ("a  b", &["a", " ", " b"]),
            ("a   ", &["a", "   "]),
            ("a \t\u{3000}b", &["a", " \t", "\u{3000}b"]),
            ("x\n\n  y", &["x", "\n\n", " ", " y"]),
            ("3141 I'LL", &["3", "1", "4", "1", " I", "'LL"]),
            (" !?\r\n(", &[" !?\r\n", "("]),
        ] {
            assert_eq!(pieces(text).collect::<Vec<_>>(), want, "{text:?}");
            assert_eq!(published(text), want, "published, {text:?}");
        }
    }

    proptest! {
        #[test]
        fn equal_to_the_published_pattern(text in r"([ \t\r\n\u{85}\u{A0}\u{3000}]{0,4}('[sStTdDlLvVeE]{0,2}|[a-z]{0,3}|\PC|\pN|[!?.-]{1,2})){0,12}") {
            prop_assert_eq!(pieces(&text).collect::<Vec<_>>(), published(&text));
        }

        #[test]
        fn lossless(text in any::<String>()) {
            prop_assert_eq!(pieces(&text).collect::<String>(), text);
        }
    }

    /// A million blanks before a word: the published pattern's engine gives up here.
    #[test]
    fn long_white_space() {
        let text = format!("{}x", " ".repeat(1_200_000));
        let lengths: Vec<_> = pieces(&text).map(str::len).collect();
        assert_eq!(lengths, [1_199_999, 2]);
    }
}
