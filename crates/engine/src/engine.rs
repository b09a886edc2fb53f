//! Generation: prompts in chunks, then a token at a time.
//!
//! Owns a backend and the bookkeeping of its KV blocks. Generic over the backend; knows nothing of text.

use std::ops::ControlFlow;

use model::{BLOCK, Backend, Chosen, Fault, Lane, Row, Step, forward};

use crate::kv::{BlockPool, OutOfBlocks};
use crate::sampler::{Sampler, SamplerError, SamplerParams};

/// A backend and its KV blocks.
pub struct Engine<B> {
    backend: B,
    pool: BlockPool,
}

/// A sequence whose keys and values are in the cache. Ends with [`Engine::truncate`] to 0, which frees its blocks.
#[derive(Debug, Default)]
pub struct Session {
    tokens: Vec<u32>,
    table: Vec<u32>,
}

impl Session {
    /// The tokens in the cache.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// KV blocks that the session holds.
    pub fn blocks(&self) -> usize {
        self.table.len()
    }
}

/// Why generation stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its answer.
    EndOfText,
    /// As many tokens as asked for.
    Length,
    /// The context is full.
    ContextFull,
    /// The caller had enough: a stop string, an interruption, a closed pipe.
    Stopped,
}

/// Why a token could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The backend failed.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The sequence does not fit.
    #[error("the context of {context} positions is too short: {tokens} tokens are needed")]
    Context {
        /// Positions there are.
        context: usize,
        /// Positions needed.
        tokens: usize,
    },
    /// Other sequences hold the blocks.
    #[error(transparent)]
    Blocks(#[from] OutOfBlocks),
    /// The logits are not finite, or the sampler's parameters exclude every token.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// Generation needs logits, and a session without tokens has none.
    #[error("the prompt is empty")]
    EmptyPrompt,
}

impl<B: Backend> Engine<B> {
    /// Takes a backend whose whole cache belongs to this engine.
    pub fn new(backend: B) -> Engine<B> {
        Engine { pool: BlockPool::new(backend.kv_blocks()), backend }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Positions that one sequence can reach if it has the cache to itself.
    pub fn context(&self) -> usize {
        self.backend.context().min(self.backend.kv_blocks() * BLOCK)
    }

    /// Appends `tokens` to the session in chunks of the backend's size. Afterwards [`Engine::logits`] holds the
    /// logits of the last token. `progress` hears how many tokens are done and may break off between chunks; the
    /// session then holds what was done.
    pub fn feed(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        mut progress: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, EngineError> {
        self.reserve(session, tokens.len())?;
        let mut done = 0;
        for chunk in tokens.chunks(self.backend.max_rows()) {
            done += chunk.len();
            let mut step = self.step(session, chunk);
            // Only the end of the prompt needs the head, which costs as much as a few layers.
            if done < tokens.len() {
                step.logits.clear();
            }
            forward(&mut self.backend, &step)?;
            session.tokens.extend_from_slice(chunk);
            if progress(done).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn reserve(&mut self, session: &mut Session, more: usize) -> Result<(), EngineError> {
        let tokens = session.tokens.len() + more;
        let context = self.context();
        if tokens > context {
            return Err(EngineError::Context { context, tokens });
        }
        Ok(self.pool.extend(&mut session.table, tokens.div_ceil(BLOCK))?)
    }

    fn step(&self, session: &Session, tokens: &[u32]) -> Step {
        // Positions are below the context, which is below 2^32.
        Step::prefill(tokens, session.tokens.len() as u32, session.table.clone())
    }

    /// Appends one token to each session, all in one step. Afterwards [`Engine::logits`] holds a row for each, `[S, V]`.
    ///
    /// # Panics
    /// If there are not as many tokens as sessions.
    pub fn feed_each(&mut self, sessions: &mut [Session], tokens: &[u32]) -> Result<(), EngineError> {
        assert_eq!(sessions.len(), tokens.len(), "a token for each session");
        for session in &mut *sessions {
            self.reserve(session, 1)?;
        }
        let mut step = Step::default();
        // Sequences, and positions below the context, are below 2^32.
        for (sequence, (session, &token)) in (0..).zip(sessions.iter().zip(tokens)) {
            step.rows.push(Row { token, position: session.tokens.len() as u32, sequence });
            step.tables.push(session.table.clone());
            step.logits.push(sequence);
        }
        forward(&mut self.backend, &step)?;
        for (session, &token) in sessions.iter_mut().zip(tokens) {
            session.tokens.push(token);
        }
        Ok(())
    }

    /// The logits of the last token fed, `[V]`.
    pub fn logits(&mut self) -> Result<&[f32], EngineError> {
        Ok(self.backend.logits()?)
    }

    /// Every position's logits of `tokens`, a chunk at a time: for perplexity. `each` gets the position within
    /// `tokens` of a chunk's first row, and its `[rows, V]` logits.
    pub fn score(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        chunk: usize,
        mut each: impl FnMut(usize, &[f32]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        self.reserve(session, tokens.len())?;
        let chunk = chunk.min(self.backend.max_rows());
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let mut step = self.step(session, tokens);
            step.logits = (0..tokens.len() as u32).collect();
            forward(&mut self.backend, &step)?;
            session.tokens.extend_from_slice(tokens);
            if each(i * chunk, self.backend.logits()?).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Samples from the logits that the last [`Engine::feed`] left, and goes on from there until `max_tokens`, an id
    /// of `eos` (which is not handed out), a full context, or `each` has had enough.
    ///
    /// A token handed to `each` is in the session unless it was the last one.
    pub fn generate(
        &mut self,
        session: &mut Session,
        sampler: &mut Sampler,
        eos: &[u32],
        max_tokens: usize,
        mut each: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Finish, EngineError> {
        if session.tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if self.chooses(session, sampler.params(), max_tokens)? {
            return self.generate_on_device(session, sampler.params(), eos, max_tokens, each);
        }
        for generated in 0..max_tokens {
            let position = session.tokens.len();
            let token = sampler.sample(self.backend.logits()?, &session.tokens, position as u64)?;
            if eos.contains(&token) {
                return Ok(Finish::EndOfText);
            }
            if each(token).is_break() {
                return Ok(Finish::Stopped);
            }
            if generated + 1 == max_tokens {
                break;
            }
            if position == self.context() {
                return Ok(Finish::ContextFull);
            }
            // One token is one chunk: nothing to report, nothing to break off.
            let _ = self.feed(session, &[token], |_| ControlFlow::Continue(()))?;
        }
        Ok(Finish::Length)
    }

    /// Whether the backend chooses the tokens itself.
    fn chooses(
        &mut self,
        session: &Session,
        params: &SamplerParams,
        tokens: usize,
    ) -> Result<bool, SamplerError> {
        let (length, len) = (session.tokens.len(), self.backend.model().config.vocab);
        let choices = tokens.min((self.context() + 1).saturating_sub(length)) + BLOCK;
        let Some(chooser) = self.backend.chooser() else { return Ok(false) };
        params.check_bias(len)?;
        Ok(!params.adjusts() || params.adjusted(length) + choices <= chooser.places())
    }

    /// [`Engine::generate`] with a backend that chooses tokens itself: the host hears of each a step late, and a step
    /// that computes past the end leaves nothing that is ever read.
    fn generate_on_device(
        &mut self,
        session: &mut Session,
        params: &SamplerParams,
        eos: &[u32],
        max_tokens: usize,
        mut each: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Finish, EngineError> {
        let start = session.tokens.len();
        // The last token chosen is not fed.
        let steps = max_tokens.min(self.context() + 1 - start);
        let reached = start + steps.saturating_sub(1);
        self.pool.extend(&mut session.table, reached.div_ceil(BLOCK))?;
        // Positions are below the context, which is below 2^32.
        let lane = Lane {
            position: start as u32,
            table: session.table.clone(),
            choice: params.choice(),
            adjustment: params.adjustment(&session.tokens),
        };
        let chooser = self.backend.chooser().expect("the caller has just asked");
        chooser.start(&[lane])?;
        let mut finish = if steps < max_tokens { Finish::ContextFull } else { Finish::Length };
        let mut asked = 0;
        for done in 0..steps {
            while asked < (done + 2).min(steps) {
                chooser.advance()?;
                asked += 1;
            }
            let token = match chooser.collect()?[..] {
                [Chosen::Token(token)] => token,
                [Chosen::NonFinite { nan, infinite, first }] => {
                    let [nan, infinite, first] = [nan, infinite, first].map(|n| n as usize);
                    let len = self.backend.model().config.vocab;
                    return Err(SamplerError::NonFinite { nan, infinite, first, len }.into());
                }
                _ => unreachable!("one sequence was started"),
            };
            if eos.contains(&token) {
                finish = Finish::EndOfText;
                break;
            }
            // As on the host: a token is in the session unless it was the last one.
            if each(token).is_break() {
                finish = Finish::Stopped;
                break;
            }
            if done + 1 < steps {
                session.tokens.push(token);
            }
        }
        // What is in flight ends before the cache is anyone else's: every launch is on one stream.
        self.pool.truncate(&mut session.table, session.tokens.len().div_ceil(BLOCK));
        Ok(finish)
    }

    /// Forgets what follows the first `len` tokens and frees the blocks it held.
    pub fn truncate(&mut self, session: &mut Session, len: usize) {
        session.tokens.truncate(len);
        self.pool.truncate(&mut session.table, session.tokens.len().div_ceil(BLOCK));
    }
}
