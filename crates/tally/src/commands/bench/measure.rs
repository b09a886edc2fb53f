//! The measurements: which rows there are, and the seconds that each repeat takes.
//!
//! Tokens are random, a function of a fixed seed and their position: every repeat does the same work, and what a
//! model would answer plays no part. Sampling is not timed.

use std::ops::ControlFlow;
use std::time::Instant;

use engine::{Engine, EngineError, Session, bits_at};
use model::Backend;

/// Seed of the random tokens.
pub(super) const SEED: u64 = 1;
/// Tokens generated before the clock starts.
const WARM_TOKENS: usize = 4;

/// What a row measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    /// So many tokens, fed in chunks; the logits of the last one.
    Prompt(usize),
    /// So many tokens of each stream, one of each stream a step; the logits of each.
    Generate { tokens: usize, streams: usize },
}

impl Test {
    /// Tokens of a repeat, of each stream.
    pub(super) fn tokens(self) -> usize {
        match self {
            Test::Prompt(tokens) | Test::Generate { tokens, .. } => tokens,
        }
    }

    /// Sequences that are computed together.
    pub(super) fn streams(self) -> usize {
        match self {
            Test::Prompt(_) => 1,
            Test::Generate { streams, .. } => streams,
        }
    }

    /// `prompt` or `generate`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Test::Prompt(_) => "prompt",
            Test::Generate { .. } => "generate",
        }
    }
}

/// One row of the table.
pub(super) struct Row {
    pub(super) test: Test,
    /// Tokens in the cache before the first one of the test.
    pub(super) depth: usize,
    /// Of each repeat.
    pub(super) seconds: Vec<f64>,
}

impl Row {
    /// Tokens a second of each repeat, of all streams together.
    pub(super) fn speeds(&self) -> Vec<f64> {
        let tokens = (self.test.tokens() * self.test.streams()) as f64;
        self.seconds.iter().map(|seconds| tokens / seconds).collect()
    }
}

/// A model under measurement.
pub(super) struct Bench<'a, B> {
    engine: Engine<B>,
    /// One for each stream.
    sessions: Vec<Session>,
    /// The tokens of every position that is reached; every stream starts at another place.
    tokens: Vec<u32>,
    /// Is told tokens that were computed; never while the clock runs, but for the chunks of a prompt.
    progress: &'a dyn Fn(usize),
}

impl<'a, B: Backend> Bench<'a, B> {
    /// `streams` is the most that a test has.
    pub(super) fn new(engine: Engine<B>, streams: usize, progress: &'a dyn Fn(usize)) -> Bench<'a, B> {
        let vocab = engine.backend().model().config.vocab as u64;
        // The remainder is below the vocabulary's size, which is a u32's.
        let token = |position| (bits_at(SEED, position) % vocab) as u32;
        let tokens = (0..(engine.context() + streams) as u64).map(token).collect();
        let sessions = (0..streams).map(|_| Session::default()).collect();
        Bench { engine, sessions, tokens, progress }
    }

    /// Cuts the caches of the first `streams` back, or fills them, to `depth` tokens.
    pub(super) fn set_depth(&mut self, depth: usize, streams: usize) -> Result<(), EngineError> {
        for stream in 0..streams {
            self.engine.truncate(&mut self.sessions[stream], depth);
            self.feed(stream, depth - self.sessions[stream].tokens().len())?;
        }
        Ok(())
    }

    /// Measures `test` on top of `depth` tokens, `repeats` times after a warm-up.
    pub(super) fn measure(&mut self, test: Test, depth: usize, repeats: usize) -> Result<Row, EngineError> {
        let streams = test.streams();
        self.set_depth(depth, streams)?;
        self.warm_up(test)?;
        let mut seconds = Vec::new();
        for _ in 0..repeats {
            // Truncating drops keys and values of the last repeat; what it fed lies at or above the depth.
            self.set_depth(depth, streams)?;
            let start = Instant::now();
            match test {
                Test::Prompt(tokens) => self.feed(0, tokens)?,
                Test::Generate { tokens, streams } => self.generate(tokens, streams)?,
            }
            // A backend may run behind its host: the last logits are there when everything is done.
            self.engine.logits()?;
            seconds.push(start.elapsed().as_secs_f64());
            if let Test::Generate { tokens, streams } = test {
                (self.progress)(tokens * streams);
            }
        }
        self.set_depth(depth, streams)?;
        Ok(Row { test, depth, seconds })
    }

    /// Brings buffers to their size and code and weights into caches: one chunk, or a few tokens.
    fn warm_up(&mut self, test: Test) -> Result<(), EngineError> {
        match test {
            Test::Prompt(tokens) => self.feed(0, tokens.min(self.engine.backend().max_rows()))?,
            Test::Generate { tokens, streams } => self.generate(tokens.min(WARM_TOKENS), streams)?,
        }
        self.engine.logits()?;
        Ok(())
    }

    /// Tokens that are computed for a row, besides those that fill the caches.
    pub(super) fn work(test: Test, max_rows: usize, repeats: usize) -> usize {
        let warm_up = if let Test::Prompt(tokens) = test { tokens.min(max_rows) } else { 0 };
        warm_up + repeats * test.tokens() * test.streams()
    }

    fn feed(&mut self, stream: usize, tokens: usize) -> Result<(), EngineError> {
        let session = &mut self.sessions[stream];
        let from = stream + session.tokens().len();
        let mut reported = 0;
        let progress = |done| {
            (self.progress)(done - std::mem::replace(&mut reported, done));
            ControlFlow::Continue(())
        };
        let flow = self.engine.feed(session, &self.tokens[from..from + tokens], progress)?;
        debug_assert!(flow.is_continue());
        Ok(())
    }

    fn generate(&mut self, tokens: usize, streams: usize) -> Result<(), EngineError> {
        for _ in 0..tokens {
            let sessions = &mut self.sessions[..streams];
            let next = |(stream, session): (usize, &Session)| self.tokens[stream + session.tokens().len()];
            let tokens: Vec<u32> = sessions.iter().enumerate().map(next).collect();
            self.engine.feed_each(sessions, &tokens)?;
        }
        Ok(())
    }
}
