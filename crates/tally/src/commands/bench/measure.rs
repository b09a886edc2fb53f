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
    /// So many tokens, one after the other; the logits of each.
    Generate(usize),
}

impl Test {
    /// Tokens of a repeat.
    pub(super) fn tokens(self) -> usize {
        match self {
            Test::Prompt(tokens) | Test::Generate(tokens) => tokens,
        }
    }

    /// `prompt` or `generate`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Test::Prompt(_) => "prompt",
            Test::Generate(_) => "generate",
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
    /// Tokens a second of each repeat.
    pub(super) fn speeds(&self) -> Vec<f64> {
        self.seconds.iter().map(|seconds| self.test.tokens() as f64 / seconds).collect()
    }
}

/// A model under measurement.
pub(super) struct Bench<'a, B> {
    engine: Engine<B>,
    session: Session,
    /// The tokens of every position that is reached.
    tokens: Vec<u32>,
    /// Is told tokens that were computed; never while the clock runs, but for the chunks of a prompt.
    progress: &'a dyn Fn(usize),
}

impl<'a, B: Backend> Bench<'a, B> {
    pub(super) fn new(engine: Engine<B>, progress: &'a dyn Fn(usize)) -> Bench<'a, B> {
        let vocab = engine.backend().model().config.vocab as u64;
        // The remainder is below the vocabulary's size, which is a u32's.
        let token = |position| (bits_at(SEED, position) % vocab) as u32;
        let tokens = (0..engine.context() as u64).map(token).collect();
        Bench { engine, session: Session::default(), tokens, progress }
    }

    /// Cuts the cache back, or fills it, to `depth` tokens.
    pub(super) fn set_depth(&mut self, depth: usize) -> Result<(), EngineError> {
        self.engine.truncate(&mut self.session, depth);
        self.feed(depth - self.session.tokens().len())
    }

    /// Measures `test` on top of `depth` tokens, `repeats` times after a warm-up.
    pub(super) fn measure(&mut self, test: Test, depth: usize, repeats: usize) -> Result<Row, EngineError> {
        self.set_depth(depth)?;
        self.warm_up(test)?;
        let mut seconds = Vec::new();
        for _ in 0..repeats {
            // Truncating drops keys and values of the last repeat; what it fed lies at or above the depth.
            self.engine.truncate(&mut self.session, depth);
            let start = Instant::now();
            match test {
                Test::Prompt(tokens) => self.feed(tokens)?,
                Test::Generate(tokens) => self.generate(tokens)?,
            }
            seconds.push(start.elapsed().as_secs_f64());
            if let Test::Generate(tokens) = test {
                (self.progress)(tokens);
            }
        }
        self.engine.truncate(&mut self.session, depth);
        Ok(Row { test, depth, seconds })
    }

    /// Brings buffers to their size and code and weights into caches: one chunk, or a few tokens.
    fn warm_up(&mut self, test: Test) -> Result<(), EngineError> {
        match test {
            Test::Prompt(tokens) => self.feed(tokens.min(self.engine.backend().max_rows())),
            Test::Generate(tokens) => self.generate(tokens.min(WARM_TOKENS)),
        }
    }

    /// Tokens that are computed for a row, besides those that fill the cache.
    pub(super) fn work(test: Test, max_rows: usize, repeats: usize) -> usize {
        let warm_up = if let Test::Prompt(tokens) = test { tokens.min(max_rows) } else { 0 };
        warm_up + repeats * test.tokens()
    }

    fn feed(&mut self, tokens: usize) -> Result<(), EngineError> {
        let from = self.session.tokens().len();
        let mut reported = 0;
        let progress = |done| {
            (self.progress)(done - std::mem::replace(&mut reported, done));
            ControlFlow::Continue(())
        };
        let flow = self.engine.feed(&mut self.session, &self.tokens[from..from + tokens], progress)?;
        debug_assert!(flow.is_continue());
        Ok(())
    }

    fn generate(&mut self, tokens: usize) -> Result<(), EngineError> {
        let from = self.session.tokens().len();
        for token in from..from + tokens {
            let one = &self.tokens[token..=token];
            // One token is one chunk: nothing to report, nothing to break off.
            let _ = self.engine.feed(&mut self.session, one, |_| ControlFlow::Continue(()))?;
        }
        Ok(())
    }
}
