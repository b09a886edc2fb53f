//! Some answers computed a second time, on another backend, and compared bit for bit. Owns the second engine; knows nothing of
//! which backends they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engine::Sampler;
use tokio::sync::mpsc;

use crate::answer::Caller;
use crate::grammar::Matcher;
use crate::job::{Event, Finish, Job};
use crate::metrics::Metrics;
use crate::places::Owner;
use crate::worker::{Engine, EngineLimits, Factory};

/// Answers that wait to be compared; beyond them some are not.
const WAITING: usize = 16;
/// A second engine may be slow.
const PATIENCE: Duration = Duration::from_secs(3600);

/// See the module's documentation.
pub(crate) struct Verifier {
    engine: Engine,
    /// Every so many answers one is compared.
    every: u64,
    answers: AtomicU64,
    /// The server's own.
    metrics: Metrics,
}

/// What an answer was asked for, to ask for it again.
pub(crate) struct Question {
    pub(crate) caller: Caller,
    pub(crate) prompt: Vec<u32>,
    pub(crate) ends: Arc<[u32]>,
    pub(crate) max_tokens: usize,
    pub(crate) sampler: Sampler,
    pub(crate) grammar: Option<Matcher>,
}

/// An answer, as far as it is compared.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) tokens: Vec<u32>,
    pub(crate) finish: Finish,
    /// Of all logits that tokens were chosen by.
    pub(crate) checksum: Option<u64>,
}

impl Verifier {
    pub(crate) fn start(factory: Factory, every: u64, metrics: Metrics) -> std::io::Result<Verifier> {
        let limits = EngineLimits { running: 1, waiting: WAITING, ..EngineLimits::default() };
        // Its own counts are nobody's; it ends with the last handle.
        let (engine, _) = Engine::start(factory, limits, Metrics::new())?;
        Ok(Verifier { engine, every: every.max(1), answers: AtomicU64::new(0), metrics })
    }

    /// Whether the next answer is to be compared.
    pub(crate) fn wants_next(&self) -> bool {
        self.answers.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.every)
    }

    pub(crate) fn stop(&self) {
        self.engine.stop();
    }

    /// Computes the answer to `question` again, and compares it with `outcome`.
    pub(crate) async fn compare(self: Arc<Self>, question: Question, outcome: Outcome) {
        let Ok(mut tickets) = self.engine.reserve(Owner::Server, 1) else {
            tracing::debug!(request = &*question.caller.id, "not verified: too many wait");
            return;
        };
        let id = question.caller.id.clone();
        let (events, mut answers) = mpsc::unbounded_channel();
        self.engine.submit(Job {
            id: id.clone(),
            owner: Owner::Server,
            prompt: question.prompt,
            ends: question.ends,
            max_tokens: question.max_tokens,
            sampler: question.sampler,
            logprobs: None,
            prompt_logprobs: None,
            grammar: question.grammar,
            checksum: true,
            deadline: Instant::now() + PATIENCE,
            ticket: tickets.pop(),
            events,
        });
        let mut tokens = Vec::new();
        let again = loop {
            match answers.recv().await {
                Some(Event::Token { id, .. }) => tokens.push(id),
                Some(Event::End(finish, checksum)) => break Ok(Outcome { tokens, finish, checksum }),
                Some(Event::Failed(error)) => break Err(error.to_string()),
                Some(Event::Begun { .. } | Event::Prompt(_)) => {}
                None => return,
            }
        };
        self.metrics.verified.inc();
        match again {
            Ok(again) if again == outcome => tracing::debug!(request = &*id, "verified"),
            Ok(again) => {
                self.metrics.mismatches.inc();
                let at = again.tokens.iter().zip(&outcome.tokens).position(|(a, b)| a != b);
                tracing::error!(
                    request = &*id,
                    first_different_token = at,
                    tokens = outcome.tokens.len(),
                    "an answer differs from the second computation of it"
                );
            }
            Err(error) => {
                self.metrics.mismatches.inc();
                tracing::error!(request = &*id, error, "the second computation of an answer failed");
            }
        }
    }
}
