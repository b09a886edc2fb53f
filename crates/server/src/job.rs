//! What the engine's thread is asked and what it answers: one sequence of tokens. Knows nothing of text, protocols or HTTP.

use std::sync::Arc;
use std::time::Instant;

use engine::{Sampler, TokenLogprob};
use tokio::sync::mpsc::UnboundedSender;

use crate::grammar::Matcher;
use crate::places::{Owner, Ticket};

/// A sequence to generate.
pub(crate) struct Job {
    /// The request's id, in logs and captures.
    pub(crate) id: Arc<str>,
    /// Whose it is: owners take turns.
    pub(crate) owner: Owner,
    /// At least one token; with [`Job::max_tokens`] no longer than the context.
    pub(crate) prompt: Vec<u32>,
    /// Tokens that end the sequence and are not part of it.
    pub(crate) ends: Arc<[u32]>,
    /// At least 1.
    pub(crate) max_tokens: usize,
    pub(crate) sampler: Sampler,
    /// Log-probabilities of each token, and of so many of the likeliest.
    pub(crate) logprobs: Option<usize>,
    /// Log-probabilities of the prompt's tokens, likewise.
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) grammar: Option<Matcher>,
    /// Whether [`Event::End`] tells a checksum of the logits.
    pub(crate) checksum: bool,
    /// When it is given up.
    pub(crate) deadline: Instant,
    /// Its place in the queue, while it waits.
    pub(crate) ticket: Option<Ticket>,
    /// Nobody listens any more: the sequence is given up before the next step. Never blocks: what is not yet heard is bounded
    /// by [`Job::max_tokens`].
    pub(crate) events: UnboundedSender<Event>,
}

/// What becomes of a sequence.
#[derive(Debug)]
pub(crate) enum Event {
    /// Its turn has come.
    Begun {
        /// Tokens of the prompt whose keys and values were there.
        cached: usize,
    },
    /// Log-probabilities of the prompt's tokens from the second on, in parts.
    Prompt(Vec<Logprobs>),
    /// The next token.
    Token {
        /// Which.
        id: u32,
        /// Its log-probabilities, if asked for.
        logprobs: Option<Box<Logprobs>>,
    },
    /// No more comes.
    End(Finish, Option<u64>),
    /// No more comes: it went wrong.
    Failed(JobError),
}

/// A token's log-probability, and the likeliest ones in its place.
#[derive(Debug, Clone)]
pub(crate) struct Logprobs {
    pub(crate) chosen: TokenLogprob,
    pub(crate) top: Vec<TokenLogprob>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model, or the grammar, ended it.
    Stop,
    /// As many tokens as asked for, or the context is full.
    Length,
}

/// Why a sequence failed. Each is one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum JobError {
    /// The model computed no numbers.
    #[error("the model computed {what} at {site}; nothing of it was sent as an answer")]
    NumericFault {
        /// How many NaN and infinities, and where among the logits.
        what: String,
        /// Stage and layer.
        site: String,
    },
    /// Its time is over.
    #[error("the request was not done in time ({tokens} tokens were generated)")]
    TimedOut {
        /// So far.
        tokens: usize,
    },
    /// The engine failed, by a panic or a fault of the device.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The server is ending.
    #[error("the server is shutting down")]
    Stopping,
    /// The sampler or the grammar has no token.
    #[error("no token can be chosen: {0}")]
    Choice(String),
}
