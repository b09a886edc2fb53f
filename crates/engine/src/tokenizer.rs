//! Text to token ids and back, from a model file's metadata alone. Knows nothing of chat roles or of sampling.
//!
//! The steps are those of Qwen's own tokenizer, in its order: added tokens are found in the raw text; the text
//! between them is normalised to NFC, cut into pieces by the `qwen2` pre-tokenizer, spelled in the byte-level
//! alphabet and merged by BPE. GGUF does not record the normalisation, and llama.cpp does not apply it: on a text
//! that is not in NFC the ids here are those of Qwen's tokenizer, with which the models were trained.
//!
//! Sources: `tokenizer.json` of Qwen/Qwen3-0.6B; the GGUF specification, "Tokenizer"; BPE: Sennrich, Haddow and
//! Birch, ACL 2016.

mod byte_level;
mod qwen2;
mod vocab;

use std::fmt;

use aho_corasick::AhoCorasick;
use gguf::Metadata;
use tokenizers::models::bpe::BPE;
use tokenizers::{Model, NormalizedString};

pub use vocab::TokenKind;
use vocab::Vocab;

/// Names of tokens that end a turn or a document whatever the file's `eos_token_id` says: chat-tuned files often
/// name one of the two only.
const END_NAMES: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// How [`Tokenizer::encode`] takes the spelling of a control token in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// As that token: for text that the program wrote, such as a rendered chat template.
    Parse,
    /// As ordinary text: for text from a user, who must not be able to end a turn by spelling `<|im_end|>`.
    ///
    /// User-defined tokens, such as `<think>`, are found all the same: they are words of the vocabulary and not
    /// control tokens, to Qwen's tokenizer as well.
    AsText,
}

/// A byte-level BPE tokenizer. See the module's documentation.
pub struct Tokenizer {
    vocab: Vocab,
    bpe: BPE,
    /// Finds control and user-defined tokens.
    added: Added,
    /// Finds user-defined tokens only.
    user_defined: Added,
    eos: Vec<u32>,
    bos: Option<u32>,
    padding: Option<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// Builds the tokenizer that `metadata` describes, checking all of it.
    ///
    /// # Errors
    /// A missing key or one of the wrong type; a tokenizer model or pre-tokenizer other than `gpt2` and `qwen2`; an
    /// id, token, type or merge that contradicts the rest, named by key and index.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        supported(metadata, "tokenizer.ggml.model", "gpt2")?;
        supported(metadata, "tokenizer.ggml.pre", "qwen2")?;
        let (vocab, bpe) = Vocab::read(metadata)?;

        let added = Added::new(&vocab, |kind| matches!(kind, TokenKind::Control | TokenKind::UserDefined))?;
        let user_defined = Added::new(&vocab, |kind| kind == TokenKind::UserDefined)?;

        let id = |key: &'static str| -> Result<Option<u32>, TokenizerError> {
            match metadata.opt_u32(key)? {
                Some(id) if vocab.bytes(id).is_none() => Err(TokenizerError::invalid(
                    key,
                    format!("{id} is outside the vocabulary of {} tokens", vocab.len()),
                )),
                id => Ok(id),
            }
        };
        let mut eos = Vec::from_iter(id("tokenizer.ggml.eos_token_id")?);
        eos.extend(id("tokenizer.ggml.eot_token_id")?);
        eos.extend(id("tokenizer.ggml.eom_token_id")?);
        eos.extend(added.ids.iter().filter(|&&id| {
            vocab.kind(id) == Some(TokenKind::Control)
                && END_NAMES.iter().any(|name| vocab.bytes(id) == Some(name.as_bytes()))
        }));
        eos.sort_unstable();
        eos.dedup();

        Ok(Self {
            eos,
            bos: id("tokenizer.ggml.bos_token_id")?,
            padding: id("tokenizer.ggml.padding_token_id")?,
            add_bos: metadata.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            vocab,
            bpe,
            added,
            user_defined,
        })
    }

    /// The token ids of `text`. Adds neither BOS nor EOS: see [`Self::bos_to_add`].
    ///
    /// # Errors
    /// None that a tokenizer from [`Self::from_metadata`] is known to give; the BPE library's are passed on.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        let added = match specials {
            Specials::Parse => &self.added,
            Specials::AsText => &self.user_defined,
        };
        let mut ids = Vec::new();
        let mut done = 0;
        for found in added.automaton.find_iter(text) {
            self.encode_plain(&text[done..found.start()], &mut ids)?;
            ids.push(added.ids[found.pattern().as_usize()]);
            done = found.end();
        }
        self.encode_plain(&text[done..], &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of `text`, in which no added token is looked for.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let text = nfc(text);
        let mut spelled = String::new();
        for piece in qwen2::pieces(&text) {
            byte_level::spell(piece, &mut spelled);
            let tokens = self.bpe.tokenize(&spelled).map_err(|e| TokenizerError::Encode(e.to_string()))?;
            ids.extend(tokens.iter().map(|token| token.id));
        }
        Ok(())
    }

    /// The text of `ids`, control tokens as they are spelled. Bytes that are no UTF-8 become U+FFFD, one for each
    /// maximal invalid sequence, as [`String::from_utf8_lossy`] does it.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.token_bytes(id)?);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes that token `id` stands for: not always UTF-8 by themselves.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`].
    pub fn token_bytes(&self, id: u32) -> Result<&[u8], TokenizerError> {
        self.vocab.bytes(id).ok_or(TokenizerError::UnknownId { id, len: self.vocab.len() })
    }

    /// What sort of token `id` is, if it is one.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.vocab.kind(id)
    }

    /// Whether `id` is a control token, which a user's text never becomes under [`Specials::AsText`].
    pub fn is_special(&self, id: u32) -> bool {
        self.kind(id) == Some(TokenKind::Control)
    }

    /// The number of tokens; ids are below it. A model's logits may have more rows, never fewer.
    pub fn vocab_len(&self) -> usize {
        self.vocab.len()
    }

    /// One more than the highest id of a token that is in use. Beyond it are rows of the model that no training has touched:
    /// converters name them `[PAD151669]` and mark them unused, or leave them out. None of them is ever to be chosen.
    pub fn ids_in_use(&self) -> u32 {
        let last = self.vocab.ids_of(|kind| kind != TokenKind::Unused).last().copied();
        last.expect("every byte has a token") + 1
    }

    /// The ids that end generation, ascending: end of text, turn and message, as far as the file has them.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The beginning-of-sequence token, if the file names one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the file asks for BOS before a prompt (`add_bos_token`; Qwen's do not).
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The token to put before a prompt, where the file asks for it and names it.
    pub fn bos_to_add(&self) -> Option<u32> {
        self.bos.filter(|_| self.add_bos)
    }

    /// The padding token, if the file names one.
    pub fn padding(&self) -> Option<u32> {
        self.padding
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("Tokenizer");
        s.field("tokens", &self.vocab.len()).field("added", &self.added.ids.len()).field("eos", &self.eos);
        s.finish_non_exhaustive()
    }
}

/// Added tokens, and the automaton that finds them in a text: leftmost first, then longest.
struct Added {
    automaton: AhoCorasick,
    /// Token id of each pattern.
    ids: Vec<u32>,
}

impl Added {
    fn new(vocab: &Vocab, wanted: impl Fn(TokenKind) -> bool) -> Result<Self, TokenizerError> {
        let ids = vocab.ids_of(wanted);
        let patterns = ids.iter().filter_map(|&id| vocab.bytes(id));
        let automaton = AhoCorasick::builder()
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(patterns)
            .map_err(|e| TokenizerError::invalid(vocab::TOKENS, format!("too many added tokens: {e}")))?;
        Ok(Self { automaton, ids })
    }
}

/// `text` in Unicode normalisation form C.
///
/// Line by line: a line break composes with nothing, and the library needs 16 bytes of memory for each byte of a
/// text. Every character below U+0300, the first combining mark, is in NFC already.
fn nfc(text: &str) -> std::borrow::Cow<'_, str> {
    let is_nfc = |text: &str| text.chars().all(|c| c < '\u{300}');
    if is_nfc(text) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if is_nfc(line) {
            out.push_str(line);
        } else {
            let mut line = NormalizedString::from(line);
            line.nfc();
            out.push_str(line.get());
        }
    }
    out.into()
}

/// Refuses a value of `key` other than the one `supported`.
fn supported(metadata: &Metadata, key: &'static str, supported: &'static str) -> Result<(), TokenizerError> {
    match metadata.str(key)? {
        found if found == supported => Ok(()),
        found => Err(TokenizerError::Unsupported { key, found: found.into(), supported }),
    }
}

/// Why a tokenizer cannot be built, or a call not be answered. Each is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key is missing or has another type.
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    /// A kind of tokenizer that is not implemented.
    #[error("{key}: \"{}\" is not supported (supported: \"{supported}\")", found.escape_debug())]
    #[allow(missing_docs, reason = "the message says it")]
    Unsupported { key: &'static str, found: String, supported: &'static str },
    /// A value contradicts the rest of the vocabulary.
    #[error("{key}: {reason}")]
    #[allow(missing_docs, reason = "the message says it")]
    Invalid { key: &'static str, reason: String },
    /// An element of an array contradicts the rest of the vocabulary.
    #[error("{key}[{index}]: {reason}")]
    #[allow(missing_docs, reason = "the message says it")]
    InvalidElement { key: &'static str, index: usize, reason: String },
    /// No token has this id.
    #[error("token id {id} is outside the vocabulary of {len} tokens")]
    #[allow(missing_docs, reason = "the message says it")]
    UnknownId { id: u32, len: usize },
    /// The BPE library failed.
    #[error("cannot encode the text: {0}")]
    Encode(String),
}

impl TokenizerError {
    fn invalid(key: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { key, reason: reason.into() }
    }
}
