//! Tokens in, tokens out: tokenizer, chat template, sampler, KV blocks, generation.

mod chat;
mod detokenizer;
mod engine;
mod kv;
mod numeric;
mod prefix;
mod prompt;
mod rng;
mod sampler;
mod stop;
mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Conversation, Limits};
pub use detokenizer::StreamDecoder;
pub use engine::{Engine, EngineError, Finish, Session};
pub use kv::{BlockPool, OutOfBlocks};
pub use numeric::{NonFinite, first_non_finite};
pub use prefix::PrefixCache;
pub use prompt::{ChatEncoder, raw_prompt};
pub use rng::{bits_at, philox4x32};
pub use sampler::{Sampler, SamplerError, SamplerParams, TokenLogprob, logprobs};
pub use stop::{EmptyStop, StopStrings};
pub use tokenizer::{Specials, TokenKind, Tokenizer, TokenizerError};
