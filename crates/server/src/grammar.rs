//! Decoding held to a grammar: which tokens may come next. Owns the vocabulary in the form that llguidance wants, and when a
//! grammar is in force. Knows nothing of sampling or of protocols.
//!
//! Control tokens are never part of a grammar's text: they cannot be spelled by it.

use std::sync::Arc;

use engine::{TokenKind, Tokenizer};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher as Parser, ParserFactory};
use serde_json::{Value as Json, json};

/// The longest grammar or schema, in bytes of its source.
pub(crate) const LONGEST: usize = 256 << 10;
/// White space between the parts of a JSON text: a small model could otherwise write it for ever.
const SPACE: &str = r"[\x20\x0A]{0,12}";

/// What a text is held to.
#[derive(Debug, Clone)]
pub(crate) enum Grammar {
    /// A JSON schema.
    Schema(Json),
    /// A regular expression that the whole text matches.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// When a grammar is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Since {
    /// From the first token on; the text ends with it.
    Start,
    /// Once this was written, for instance where reasoning ends; the text ends with the grammar.
    Once(&'static str),
    /// Each time that this was written; afterwards the text is free again.
    Each(&'static str),
}

/// Makes matchers for one vocabulary.
pub(crate) struct Grammars {
    factory: ParserFactory,
    tokenizer: Arc<Tokenizer>,
}

/// Why a grammar cannot be used. One line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct GrammarError(String);

impl GrammarError {
    fn of(error: impl std::fmt::Display) -> GrammarError {
        let text = format!("{error:#}");
        let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it cannot be compiled");
        GrammarError(line.chars().take(300).collect())
    }
}

impl Grammars {
    /// Prepares the vocabulary.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Result<Grammars, GrammarError> {
        let word = |id: u32| -> Vec<u8> {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            if tokenizer.kind(id) == Some(TokenKind::Unused) {
                // A word of no bytes is never allowed.
                Vec::new()
            } else if tokenizer.is_special(id) {
                [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
            } else {
                bytes.to_vec()
            }
        };
        // A vocabulary's ids are u32.
        let size = tokenizer.vocab_len() as u32;
        let words: Vec<Vec<u8>> = (0..size).map(word).collect();
        let ends = tokenizer.eos();
        let info = TokRxInfo::new(size, ends.last().copied().unwrap_or(u32::MAX));
        let trie = TokTrie::from(&info, &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(ends) };
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(GrammarError::of)?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Grammars { factory, tokenizer })
    }

    /// A matcher at the start of a text. May take a while for a large grammar.
    ///
    /// # Errors
    /// [`GrammarError`] where the grammar is malformed or too large.
    pub(crate) fn matcher(&self, grammar: &Grammar, since: Since) -> Result<Matcher, GrammarError> {
        let size = match grammar {
            Grammar::Schema(schema) => schema.to_string().len(),
            Grammar::Regex(text) | Grammar::Lark(text) => text.len(),
        };
        if size > LONGEST {
            return Err(GrammarError(format!("it has {size} bytes, more than {LONGEST}")));
        }
        let top = match grammar {
            Grammar::Schema(schema) => TopLevelGrammar::from_json_schema(spaced(schema)),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let parser = Parser::new(self.factory.create_parser(top));
        if let Some(error) = parser.get_error() {
            return Err(GrammarError::of(error));
        }
        let state = if since == Since::Start { State::Held } else { State::Free(Vec::new()) };
        Ok(Matcher { fresh: parser.deep_clone(), parser, since, state, tokenizer: self.tokenizer.clone() })
    }
}

/// `schema` with the white space that it allows bounded.
pub(crate) fn spaced(schema: &Json) -> Json {
    let mut schema = match schema {
        Json::Object(fields) => Json::Object(fields.clone()),
        // `true` allows everything.
        Json::Bool(true) => json!({}),
        _ => json!({ "not": {} }),
    };
    schema["x-guidance"] = json!({ "whitespace_pattern": SPACE });
    schema
}

enum State {
    /// Anything goes; the end of what was written, in which the word is looked for that puts the grammar in force.
    Free(Vec<u8>),
    /// The grammar is in force.
    Held,
}

/// Follows one text.
pub(crate) struct Matcher {
    parser: Parser,
    /// As it was at the start, for grammars that come into force again.
    fresh: Parser,
    since: Since,
    state: State,
    tokenizer: Arc<Tokenizer>,
}

impl Matcher {
    /// Another one at the same place.
    pub(crate) fn fork(&self) -> Matcher {
        Matcher {
            parser: self.parser.deep_clone(),
            fresh: self.fresh.deep_clone(),
            since: self.since.clone(),
            state: match &self.state {
                State::Free(tail) => State::Free(tail.clone()),
                State::Held => State::Held,
            },
            tokenizer: self.tokenizer.clone(),
        }
    }

    /// The tokens that may come next; none if any may.
    pub(crate) fn mask(&mut self) -> Result<Option<SimpleVob>, GrammarError> {
        match self.state {
            State::Free(_) => Ok(None),
            State::Held => self.parser.compute_mask_or_eos().map(Some).map_err(GrammarError::of),
        }
    }

    /// Takes the next token; says whether the text ends with it.
    pub(crate) fn accept(&mut self, token: u32) -> Result<bool, GrammarError> {
        match &mut self.state {
            State::Free(tail) => {
                let (Since::Once(word) | Since::Each(word)) = self.since else { return Ok(false) };
                tail.extend_from_slice(self.tokenizer.token_bytes(token).unwrap_or_default());
                // The words are tokens of their own in the vocabularies of the models that know them; what a longer token
                // spells beyond the word stands before the grammar.
                if tail.windows(word.len()).any(|window| window == word.as_bytes()) {
                    self.state = State::Held;
                } else {
                    let keep = tail.len().saturating_sub(word.len());
                    tail.drain(..keep);
                }
                Ok(false)
            }
            State::Held => {
                self.parser.consume_token(token).map_err(GrammarError::of)?;
                if !self.parser.is_stopped() {
                    return Ok(false);
                }
                if let Since::Each(_) = self.since {
                    self.parser = self.fresh.deep_clone();
                    self.state = State::Free(Vec::new());
                    return Ok(false);
                }
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vocabulary of bytes with `<|endoftext|>` 297, `<|im_start|>` 298, `<|im_end|>` 299.
    fn grammars() -> Grammars {
        let mut shape = synth::Shape::named("tiny-moe").expect("a name that is known");
        shape.config.vocab = 300;
        let tokenizer = Tokenizer::from_metadata(&synth::metadata(&shape, 1)).expect("a valid vocabulary");
        Grammars::new(Arc::new(tokenizer)).expect("a small vocabulary")
    }

    /// The bytes that may come next, those that are ASCII; `$` for the end, `*` for anything.
    fn next(matcher: &mut Matcher) -> String {
        let Some(mask) = matcher.mask().expect("in a known state") else { return "*".into() };
        let bytes = (0u8..128).filter(|&byte| mask.get(byte.into())).map(char::from);
        bytes.chain(mask.get(299).then_some('$')).collect()
    }

    /// Writes `text` a byte at a time; whether it ended there, and what may come next.
    fn check(grammar: &Grammar, since: &Since, text: &str, ended: bool, want: &str) {
        let mut matcher = grammars().matcher(grammar, since.clone()).expect("a grammar");
        let mut over = false;
        for byte in text.bytes() {
            assert!(!over, "{text} goes on");
            if let Some(mask) = matcher.mask().expect("in a known state") {
                assert!(mask.get(byte.into()), "{:?} is not allowed in {text:?}", char::from(byte));
            }
            over = matcher.accept(byte.into()).expect("an allowed token");
        }
        assert_eq!(over, ended, "{text:?}");
        if !over {
            assert_eq!(next(&mut matcher), want, "after {text:?}");
            assert_eq!(next(&mut matcher.fork()), want, "a fork after {text:?}");
        }
    }

    #[test]
    fn grammars_come_into_force() {
        let regex = Grammar::Regex("a[bc]+d".into());
        check(&regex, &Since::Start, "", false, "a");
        check(&regex, &Since::Start, "ab", false, "bcd");
        check(&regex, &Since::Start, "abd", true, "");
        let open = Grammar::Regex("ab?".into());
        check(&open, &Since::Start, "a", false, "b$");
        let once = Since::Once("</think>");
        check(&regex, &once, "anything </thin", false, "*");
        check(&regex, &once, "anything </think>", false, "a");
        check(&regex, &once, "</think>abcd", true, "");
        let each = Since::Each("<x>");
        check(&regex, &each, "y <x>ab", false, "bcd");
        check(&regex, &each, "y <x>abd free again <x>", false, "a");
        check(&regex, &each, "y <x>abd ", false, "*");
    }

    #[test]
    fn control_tokens_cannot_be_spelled() {
        let any = Grammar::Regex("(?s:.*)".into());
        let mut matcher = grammars().matcher(&any, Since::Start).expect("a grammar");
        let mask = matcher.mask().expect("at the start").expect("in force");
        assert!(mask.get(65) && mask.get(299) && !mask.get(298));
    }

    /// A token that no training has touched spells nothing, wherever it stands.
    #[test]
    fn unused_tokens_cannot_be_spelled() {
        let mut shape = synth::Shape::named("tiny-moe").expect("a name that is known");
        shape.config.vocab = 300;
        let mut metadata = synth::metadata(&shape, 1);
        let mut tokens = metadata.strings("tokenizer.ggml.tokens").expect("tokens").to_vec();
        let mut types = metadata.i32s("tokenizer.ggml.token_type").expect("types").to_vec();
        tokens[270] = "no".into();
        let spells = |types: &[i32], metadata: &mut gguf::Metadata| {
            metadata.set("tokenizer.ggml.tokens", tokens.clone());
            metadata.set("tokenizer.ggml.token_type", types.to_vec());
            let tokenizer = Arc::new(Tokenizer::from_metadata(metadata).expect("a valid vocabulary"));
            let grammars = Grammars::new(tokenizer).expect("a small vocabulary");
            let mut matcher =
                grammars.matcher(&Grammar::Regex("no".into()), Since::Start).expect("a grammar");
            let mask = matcher.mask().expect("at the start").expect("in force");
            (mask.get(b'n'.into()), mask.get(270))
        };
        for (kind, spelled) in [(1, true), (5, false)] {
            types[270] = kind;
            assert_eq!(spells(&types, &mut metadata), (true, spelled));
        }
    }

    #[test]
    fn bad_grammars_are_refused_in_one_line() {
        for grammar in [
            Grammar::Regex("(".into()),
            Grammar::Lark("start: nothing".into()),
            Grammar::Schema(json!({ "type": 3 })),
            Grammar::Schema(json!(7)),
            Grammar::Regex("a".repeat(LONGEST + 1)),
        ] {
            match grammars().matcher(&grammar, Since::Start) {
                Err(error) => {
                    assert!(!error.to_string().contains('\n') && error.to_string().len() <= 310, "{error}")
                }
                // What nothing satisfies may compile: then no token is allowed.
                Ok(mut matcher) => {
                    assert!(matcher.mask().is_err() || next(&mut matcher).is_empty(), "{grammar:?}")
                }
            }
        }
    }
}
