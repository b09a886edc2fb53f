//! What a backend must be, and what one step of work is.
//!
//! A backend owns its memory (activations, KV cache) and its stages. It is driven by [`crate::forward()`] alone;
//! decorators (tracing, pairing, fault injection) wrap it and implement the same trait.

use crate::{Buffer, Chooser, Config, Model, Site};

/// Positions in one KV block. Attention works in tiles of this many keys counted from position 0, so a block is
/// exactly one tile and no tile ever crosses a block (ARCHITECTURE.md, rule 5).
pub const BLOCK: usize = 64;

/// One row of a step: a token of some sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Token id, below the vocabulary's size.
    pub token: u32,
    /// Position in its sequence, counted from 0.
    pub position: u32,
    /// Index into [`Step::tables`].
    pub sequence: u32,
}

/// One step: rows of any number of sequences, in prefill or decode, with the KV blocks they live in.
///
/// The rows of a sequence stand together, in ascending and gapless order of position. What a row computes does not
/// depend on the other rows that share its step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// `T` rows.
    pub rows: Vec<Row>,
    /// For each sequence, the ids of its KV blocks: position `p` lives in `tables[s][p / BLOCK]`.
    pub tables: Vec<Vec<u32>>,
    /// Indices into `rows`, ascending: the `R` rows whose logits are wanted.
    pub logits: Vec<u32>,
}

/// Why a [`Step`] is not well formed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A step without rows would do nothing.
    #[error("a step needs at least one row")]
    Empty,
    /// A token id that the vocabulary does not have.
    #[error("row {row}: token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// Offending row.
        row: usize,
        /// Its token.
        token: u32,
        /// The vocabulary's size.
        vocab: usize,
    },
    /// A row's sequence has no block table, or the table does not reach the row's position.
    #[error("row {row}: position {position} of sequence {sequence} has no KV block")]
    Unmapped {
        /// Offending row.
        row: usize,
        /// Its position.
        position: u32,
        /// Its sequence.
        sequence: u32,
    },
    /// Rows of one sequence must stand together and ascend by one.
    #[error("row {row}: rows of a sequence must be adjacent with consecutive positions")]
    Order {
        /// Offending row.
        row: usize,
    },
    /// A logits index outside the rows, or not ascending.
    #[error("logits index {index} is not an ascending row index")]
    Logits {
        /// Offending entry of [`Step::logits`].
        index: u32,
    },
}

impl Step {
    /// A step of one sequence: `tokens` at consecutive positions from `start`, logits of the last row.
    pub fn prefill(tokens: &[u32], start: u32, table: Vec<u32>) -> Step {
        let rows: Vec<Row> = tokens
            .iter()
            .zip(start..)
            .map(|(&token, position)| Row { token, position, sequence: 0 })
            .collect();
        let last = rows.len().saturating_sub(1) as u32;
        Step { rows, tables: vec![table], logits: vec![last] }
    }

    /// Checks the promises in the type's description against `config`. Backends call it on entry to a step and trust
    /// the step inside.
    pub fn check(&self, config: &Config) -> Result<(), StepError> {
        if self.rows.is_empty() {
            return Err(StepError::Empty);
        }
        let mut seen = vec![false; self.tables.len()];
        for (i, row) in self.rows.iter().enumerate() {
            if row.token as usize >= config.vocab {
                return Err(StepError::Token { row: i, token: row.token, vocab: config.vocab });
            }
            let mapped = self.tables.get(row.sequence as usize).map_or(0, |t| t.len() * BLOCK);
            if row.position as usize >= mapped {
                return Err(StepError::Unmapped { row: i, position: row.position, sequence: row.sequence });
            }
            let follows = i > 0
                && self.rows[i - 1].sequence == row.sequence
                && self.rows[i - 1].position.checked_add(1) == Some(row.position);
            if !follows && std::mem::replace(&mut seen[row.sequence as usize], true) {
                return Err(StepError::Order { row: i });
            }
        }
        let ascending = self.logits.windows(2).find(|w| w[0] >= w[1]).map(|w| w[1]);
        let outside = self.logits.last().copied().filter(|&l| l as usize >= self.rows.len());
        match ascending.or(outside) {
            Some(index) => Err(StepError::Logits { index }),
            None => Ok(()),
        }
    }
}

/// A failure inside a step: where it happened and what it was.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The step handed in breaks its promises.
    #[error("malformed step: {0}")]
    Step(#[from] StepError),
    /// The step does not fit what the backend was built for.
    #[error("{what} of {got} exceeds the {limit} this backend was built for")]
    Capacity {
        /// Which limit.
        what: &'static str,
        /// What was asked.
        got: usize,
        /// What is there.
        limit: usize,
    },
    /// A stage was asked for that this model or layer does not have.
    #[error("{site}: this model has no such stage")]
    NoSuchStage {
        /// Where.
        site: Site,
    },
    /// A buffer that cannot be read or written here.
    #[error("buffer {buffer:?}: {why}")]
    Buffer {
        /// Which buffer.
        buffer: Buffer,
        /// Why not.
        why: String,
    },
    /// The device is lost: whatever was on it is gone, and nothing more can run on this backend. Where it happened is not
    /// known, since devices work behind the host's back.
    #[error("{source}")]
    Lost {
        /// What the device said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The device failed.
    #[error("{site}: {source}")]
    Device {
        /// Where.
        site: Site,
        /// What the device said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A machine that can run the stages of a model.
///
/// A step is `begin`, then [`Backend::run`] for each site in the order of [`crate::forward()`]; afterwards the logits
/// can be read. Between two stages any named buffer can be read, or replaced, which is all that tracing, pairing and
/// replay need.
pub trait Backend {
    /// The model this backend runs.
    fn model(&self) -> &Model;

    /// The most rows a step may have.
    fn max_rows(&self) -> usize;

    /// The positions a sequence may reach: what the rotary table and the step's buffers were made for.
    fn context(&self) -> usize;

    /// The number of KV blocks of [`BLOCK`] positions; valid ids are below it.
    fn kv_blocks(&self) -> usize;

    /// Checks a step against the model and what this backend was built for: first in [`Backend::begin`].
    fn admit(&self, step: &Step) -> Result<(), Fault> {
        step.check(&self.model().config)?;
        let within = |what, got: usize, limit| {
            if got <= limit { Ok(()) } else { Err(Fault::Capacity { what, got, limit }) }
        };
        within("a step", step.rows.len(), self.max_rows())?;
        let longest = step.rows.iter().map(|r| r.position as usize + 1).max().unwrap_or(0);
        within("a context", longest, self.context())?;
        let highest = step.tables.iter().flatten().map(|&b| b as usize + 1).max().unwrap_or(0);
        within("a KV block id", highest, self.kv_blocks())
    }

    /// Takes up a step: checks it and places its rows where the stages will find them.
    fn begin(&mut self, step: &Step) -> Result<(), Fault>;

    /// Runs one stage on the current step.
    fn run(&mut self, site: Site) -> Result<(), Fault>;

    /// Copies a buffer of the current step out, in the shape that [`Buffer`] names; a backend that launches its stages
    /// late runs first what was asked for.
    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault>;

    /// Replaces a buffer of the current step.
    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault>;

    /// The logits of the finished step, `[R, V]`, without a copy where the memory allows it.
    fn logits(&mut self) -> Result<&[f32], Fault>;

    /// Keeps, or stops keeping, what goes on inside stages ([`crate::Stage::inside`]), from the next stage on, and says whether
    /// it can. No bit of anything else changes.
    fn observe(&mut self, on: bool) -> bool {
        let _ = on;
        false
    }

    /// The backend as one that chooses tokens itself, if it can.
    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        None
    }
}

/// Who holds a backend is one.
macro_rules! held {
    ($holder:ty) => {
        impl<B: Backend + ?Sized> Backend for $holder {
            fn model(&self) -> &Model {
                (**self).model()
            }

            fn max_rows(&self) -> usize {
                (**self).max_rows()
            }

            fn context(&self) -> usize {
                (**self).context()
            }

            fn kv_blocks(&self) -> usize {
                (**self).kv_blocks()
            }

            fn begin(&mut self, step: &Step) -> Result<(), Fault> {
                (**self).begin(step)
            }

            fn run(&mut self, site: Site) -> Result<(), Fault> {
                (**self).run(site)
            }

            fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
                (**self).read(buffer)
            }

            fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
                (**self).write(buffer, values)
            }

            fn logits(&mut self) -> Result<&[f32], Fault> {
                (**self).logits()
            }

            fn observe(&mut self, on: bool) -> bool {
                (**self).observe(on)
            }

            fn chooser(&mut self) -> Option<&mut dyn Chooser> {
                (**self).chooser()
            }
        }
    };
}
// Chosen when the program runs; and lent.
held!(Box<B>);
held!(&mut B);
