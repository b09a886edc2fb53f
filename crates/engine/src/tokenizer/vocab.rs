//! The vocabulary and merges of a model file, checked. Knows nothing of texts.

use std::collections::HashMap;

use gguf::Metadata;
use tokenizers::models::bpe::{self, BPE};

use super::{TokenizerError, byte_level};

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// The sort of a token, by its number in `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// 1: made by merges; spelled in the byte-level alphabet.
    Normal,
    /// 2 and 3: steers the model, and is no text: `<|im_start|>`.
    Control,
    /// 4: text, but found whole before any merge: `<tool_call>`.
    UserDefined,
    /// 5: fills a row of the embedding; never produced from text.
    Unused,
    /// 6: one byte, spelled `<0x0A>`, where the alphabet's own character has no token.
    Byte,
}

impl TokenKind {
    fn from_number(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 | 3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// What each token id stands for.
pub(super) struct Vocab {
    /// The bytes of all tokens in id order, and where each token's end.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    kinds: Vec<TokenKind>,
}

impl Vocab {
    /// Reads the vocabulary, and the merges over its normal tokens.
    pub(super) fn read(metadata: &Metadata) -> Result<(Self, BPE), TokenizerError> {
        let tokens = metadata.strings(TOKENS)?;
        let types = metadata.i32s(TOKEN_TYPE)?;
        if tokens.is_empty() || u32::try_from(tokens.len()).is_err() {
            return Err(TokenizerError::invalid(TOKENS, format!("{} tokens", tokens.len())));
        }
        if types.len() != tokens.len() {
            let reason = format!("{} types for {} tokens", types.len(), tokens.len());
            return Err(TokenizerError::invalid(TOKEN_TYPE, reason));
        }

        let mut vocab = Self {
            bytes: Vec::with_capacity(tokens.iter().map(String::len).sum()),
            ends: Vec::with_capacity(tokens.len()),
            kinds: Vec::with_capacity(tokens.len()),
        };
        let mut seen = HashMap::with_capacity(tokens.len());
        let mut spelled = bpe::Vocab::with_capacity(tokens.len());
        let mut byte_tokens = Vec::new();
        for ((id, token), &number) in (0u32..).zip(tokens).zip(types) {
            let wrong = |key, reason| element(key, id, reason);
            let kind = TokenKind::from_number(number)
                .ok_or_else(|| wrong(TOKEN_TYPE, format!("{number} is no token type (1 to 6)")))?;
            if token.is_empty() {
                return Err(wrong(TOKENS, "an empty token".into()));
            }
            if let Some(first) = seen.insert(token.as_str(), id) {
                return Err(wrong(TOKENS, format!("\"{}\" is token {first} already", token.escape_debug())));
            }
            vocab.push(kind, token).map_err(|reason| wrong(TOKENS, reason))?;
            match kind {
                TokenKind::Normal => drop(spelled.insert(token.clone(), id)),
                TokenKind::Byte => byte_tokens.push(id),
                TokenKind::Control | TokenKind::UserDefined | TokenKind::Unused => {}
            }
        }
        // Byte fallback: the alphabet's character becomes the byte's token unless a normal token has it.
        for id in byte_tokens {
            let byte = vocab.bytes(id).and_then(|bytes| bytes.first()).copied();
            let c = byte_level::char_of(byte.expect("push() gave every byte token one byte"));
            spelled.entry(c.into()).or_insert(id);
        }
        require_bytes(&spelled)?;

        let merges = read_merges(metadata, &spelled)?;
        let bpe = BPE::builder().vocab_and_merges(spelled, merges).build();
        let bpe = bpe.map_err(|e| TokenizerError::invalid(MERGES, e.to_string()))?;
        Ok((vocab, bpe))
    }

    /// Appends a token; the error says what is wrong with its spelling.
    fn push(&mut self, kind: TokenKind, token: &str) -> Result<(), String> {
        let quoted = || token.escape_debug();
        match kind {
            TokenKind::Normal => {
                for c in token.chars() {
                    let byte = byte_level::byte_of(c).ok_or_else(|| {
                        format!("{c:?} in \"{}\" is outside the byte-level alphabet", quoted())
                    })?;
                    self.bytes.push(byte);
                }
            }
            TokenKind::Byte => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                let byte =
                    digits.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
                self.bytes.push(
                    byte.ok_or_else(|| format!("byte token \"{}\" is not <0x00> to <0xFF>", quoted()))?,
                );
            }
            TokenKind::Control | TokenKind::UserDefined | TokenKind::Unused => {
                self.bytes.extend_from_slice(token.as_bytes());
            }
        }
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(usize::try_from(id).ok()?).copied()
    }

    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = usize::try_from(id).ok()?;
        let end = *self.ends.get(id)?;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Some(&self.bytes[start..end])
    }

    /// Ids of the wanted kinds, ascending.
    pub(super) fn ids_of(&self, wanted: impl Fn(TokenKind) -> bool) -> Vec<u32> {
        (0u32..).zip(&self.kinds).filter(|&(_, &kind)| wanted(kind)).map(|(id, _)| id).collect()
    }
}

/// Every byte that UTF-8 can contain needs a token of its own: BPE would drop text without a word otherwise.
fn require_bytes(spelled: &bpe::Vocab) -> Result<(), TokenizerError> {
    let in_utf8 = |byte: &u8| !matches!(byte, 0xC0 | 0xC1 | 0xF5..=0xFF);
    for byte in (0..=u8::MAX).filter(in_utf8) {
        let c = byte_level::char_of(byte);
        if !spelled.contains_key(c.encode_utf8(&mut [0; 4]) as &str) {
            return Err(TokenizerError::invalid(
                TOKENS,
                format!("no token for the byte {byte:#04x} ({c:?})"),
            ));
        }
    }
    Ok(())
}

/// The merges in rank order. Both halves and the whole must be normal tokens; that the library finds the whole
/// matters to safety as well: it copies the halves into a buffer of the longest token's length.
fn read_merges(metadata: &Metadata, spelled: &bpe::Vocab) -> Result<bpe::Merges, TokenizerError> {
    let merges = metadata.strings(MERGES)?;
    let mut read = Vec::with_capacity(merges.len());
    let mut whole = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let wrong = |reason| TokenizerError::InvalidElement { key: MERGES, index: rank, reason };
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(wrong(format!("\"{}\" has no space between two tokens", merge.escape_debug())));
        };
        whole.clear();
        whole.extend([left, right]);
        if let Some(unknown) = [left, right, &whole].into_iter().find(|&token| !spelled.contains_key(token)) {
            return Err(wrong(format!("\"{}\" is no normal token", unknown.escape_debug())));
        }
        read.push((left.to_owned(), right.to_owned()));
    }
    Ok(read)
}

fn element(key: &'static str, id: u32, reason: String) -> TokenizerError {
    // A u32 fits the index of a vector that was indexed by it.
    TokenizerError::InvalidElement { key, index: id as usize, reason }
}
