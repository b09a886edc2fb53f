//! A request in no protocol's words, and its answer piece by piece: what is checked before anything is asked of the engine.
//! Each choice is then followed by a task of its own (`choice.rs`).

use std::sync::Arc;

use engine::{Sampler, SamplerParams};
use tokio::sync::{mpsc, watch};

use crate::choice::Choice;
use crate::error::ApiError;
use crate::grammar::{Grammar, Matcher, Since};
use crate::job::Logprobs;
use crate::places::Owner;
use crate::service::Service;
use crate::spans::Span;
use crate::text::{Delta, Syntax, Text};

/// Pieces that wait for a slow reader; beyond them its task waits, and tokens do.
const PIECES: usize = 64;

/// What is to be generated.
#[derive(Debug, Clone)]
pub(crate) struct Generation {
    /// Ids, at least one.
    pub(crate) prompt: Vec<u32>,
    /// Answers wanted, each with a seed of its own: the seed, the seed plus one, ...
    pub(crate) choices: usize,
    pub(crate) sampling: SamplerParams,
    /// As many as fit, where nothing is said.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) grammar: Option<(Grammar, Since)>,
    /// The field that the grammar came from.
    pub(crate) grammar_field: &'static str,
    pub(crate) syntax: Syntax,
    /// Goes on where the model would end.
    pub(crate) ignore_end: bool,
    /// The answer ends with its first call.
    pub(crate) one_call: bool,
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// The request's id.
    pub(crate) id: Arc<str>,
    pub(crate) owner: Owner,
    /// Ends with the work on the request.
    pub(crate) span: Span,
}

/// A part of an answer.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Log-probabilities of the prompt's tokens, from the second on.
    Prompt(Vec<Logprobs>),
    /// A token was generated. What it means follows, at once or later.
    Token(u32, Option<Box<Logprobs>>),
    Delta(Delta),
    End(End),
    Failed(ApiError),
}

/// How an answer ended.
#[derive(Debug, Clone)]
pub(crate) struct End {
    pub(crate) why: Why,
    pub(crate) usage: Usage,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Why {
    /// The model ended it.
    Model,
    /// The model ended it after calling tools.
    Calls,
    /// This stop string came.
    StopString(String),
    /// As many tokens as asked for, or as there is room for.
    Length,
}

/// Tokens of a choice.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    /// Of the prompt, found in the cache.
    pub(crate) cached: usize,
    pub(crate) generated: usize,
    /// Of those generated, reasoning.
    pub(crate) reasoning: usize,
}

/// An answer that is being given. Dropping it ends the work.
pub(crate) struct Answer {
    pieces: mpsc::Receiver<(usize, Piece)>,
    pub(crate) choices: usize,
    pub(crate) seed: u64,
    /// In tokens.
    pub(crate) prompt: Vec<u32>,
}

impl Answer {
    /// The next piece of any choice; none when all have ended.
    pub(crate) async fn next(&mut self) -> Option<(usize, Piece)> {
        self.pieces.recv().await
    }

    /// The next piece if it is there already.
    pub(crate) fn ready(&mut self) -> Option<(usize, Piece)> {
        self.pieces.try_recv().ok()
    }
}

impl Service {
    /// Begins to answer.
    ///
    /// # Errors
    /// What is wrong with the request, or that there is no room for it now.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        generation: Generation,
        caller: &Caller,
    ) -> Result<Answer, ApiError> {
        let Generation { prompt, choices, sampling, grammar, .. } = &generation;
        if *choices == 0 || *choices > self.options.max_choices {
            let most = self.options.max_choices;
            return Err(ApiError::invalid("n", format!("n is {choices}; it must be from 1 to {most}")));
        }
        // Before the prompt is looked at: an engine that is not there has no context.
        let tickets = self.engine.reserve(caller.owner, *choices).map_err(|why| self.unavailable(why))?;
        let max_tokens = self.room(prompt.len(), generation.max_tokens)?;
        let sampler = |i: u64| {
            let seed = sampling.seed.wrapping_add(i);
            Sampler::new(SamplerParams { seed, ..sampling.clone() })
                .map_err(|error| ApiError::invalid(parameter(&error), error.to_string()))
        };
        // Checked before anything is asked of the engine.
        sampler(0)?;
        let matcher = match grammar {
            Some((grammar, since)) => Some(self.matcher(grammar.clone(), since.clone(), &generation).await?),
            None => None,
        };
        let (send, pieces) = mpsc::channel(PIECES);
        let (first, begun) = watch::channel(false);
        let mut first = Some(first);
        for (index, ticket) in tickets.into_iter().enumerate() {
            let text = Text::new(self.tokenizer().clone(), &generation.stop, generation.syntax.clone())
                .map_err(|error| ApiError::invalid("stop", error.to_string()))?;
            let choice = Choice {
                service: self.clone(),
                generation: generation.clone(),
                caller: caller.clone(),
                span: Span::default(),
                outcome: "cancelled",
                index,
                sampler: sampler(index as u64)?, // exact: few choices
                matcher: matcher.as_ref().map(Matcher::fork),
                max_tokens,
                ticket: Some(ticket),
                text,
                usage: Usage { prompt: prompt.len(), ..Usage::default() },
                out: send.clone(),
            };
            tokio::spawn(choice.follow(first.take(), begun.clone()));
        }
        Ok(Answer { pieces, choices: *choices, seed: sampling.seed, prompt: generation.prompt })
    }

    /// Tokens that an answer may have.
    fn room(&self, prompt: usize, wanted: Option<usize>) -> Result<usize, ApiError> {
        let context = self.engine.shared().context();
        if prompt == 0 {
            return Err(ApiError::invalid("prompt", "the prompt is empty"));
        }
        if prompt > context {
            let message = format!("the prompt has {prompt} tokens; the context has {context}");
            let error = ApiError::invalid("messages", message);
            return Err(ApiError { code: "context_length_exceeded", ..error });
        }
        // The last token is chosen and needs no place.
        let room = context - prompt + 1;
        match wanted {
            Some(0) => Err(ApiError::invalid("max_tokens", "max_tokens is 0; it must be at least 1")),
            wanted => Ok(wanted.map_or(room, |wanted| wanted.min(room))),
        }
    }

    async fn matcher(
        self: &Arc<Self>,
        grammar: Grammar,
        since: Since,
        generation: &Generation,
    ) -> Result<Matcher, ApiError> {
        let (service, field) = (self.clone(), generation.grammar_field);
        let made = self.blocking(move || service.grammars()?.matcher(&grammar, since)).await?;
        made.map_err(|error| ApiError::invalid(field, format!("{field}: {error}")))
    }
}

/// The field of a request that the sampler's parameter comes from.
fn parameter(error: &engine::SamplerError) -> &'static str {
    match error {
        engine::SamplerError::Parameter { name: "repeat_penalty", .. } => "repetition_penalty",
        engine::SamplerError::Parameter { name, .. } => name,
        _ => "logit_bias",
    }
}
