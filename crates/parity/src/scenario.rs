//! Ways of running the same tokens, simplest first. What errs only in a later one is a matter of state: of the cut of the
//! prompt, of company in the batch, of what was left behind by an earlier run, or of being watched.

use std::fmt;

use model::{BLOCK, Row, Step};
use serde::{Deserialize, Serialize};

/// A way of running the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// In as few steps as the backends allow.
    Whole,
    /// In chunks whose borders are no tile's.
    Chunked,
    /// The last tokens one at a time.
    Decode,
    /// Beside another sequence.
    Batch,
    /// As `Whole`, again on the same backends.
    Repeat,
    /// As `Whole`, thrice, then as `Decode`, with nothing read but logits: what is fused, recorded and replayed only then.
    Unobserved,
    /// The steps of a dump.
    Dump,
}

impl Scenario {
    /// The ways that two backends can be run, simplest first.
    pub const LIVE: [Scenario; 6] = [
        Scenario::Whole,
        Scenario::Chunked,
        Scenario::Decode,
        Scenario::Batch,
        Scenario::Repeat,
        Scenario::Unobserved,
    ];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Scenario::Whole => "whole",
            Scenario::Chunked => "chunked",
            Scenario::Decode => "decode",
            Scenario::Batch => "batch",
            Scenario::Repeat => "repeat",
            Scenario::Unobserved => "unobserved",
            Scenario::Dump => "dump",
        }
    }

    /// The scenario of this name, of those that can be run.
    pub fn named(name: &str) -> Option<Scenario> {
        Scenario::LIVE.into_iter().find(|scenario| scenario.name() == name)
    }

    /// When an error shows only in it.
    pub const fn only(self) -> &'static str {
        match self {
            Scenario::Whole => "in one step",
            Scenario::Chunked => "when the prompt is cut into chunks",
            Scenario::Decode => "when tokens are fed one at a time",
            Scenario::Batch => "in a batch with another sequence",
            Scenario::Repeat => "when it is run again",
            Scenario::Unobserved => "when nothing is read between the stages",
            Scenario::Dump => "in the steps of the dump",
        }
    }

    /// The steps, or why it cannot be run within `limits`. Logits are wanted of the last row of each step.
    pub fn steps(self, ids: &[u32], limits: Limits) -> Result<Vec<Step>, String> {
        let blocks = ids.len().div_ceil(BLOCK);
        if blocks > limits.kv_blocks {
            return Err(format!(
                "{} tokens need {blocks} KV blocks; there are {}",
                ids.len(),
                limits.kv_blocks
            ));
        }
        let cut = |chunks: Vec<usize>| sequence(ids, &chunks, limits.max_rows);
        match self {
            Scenario::Whole | Scenario::Repeat => Ok(cut(vec![ids.len()])),
            Scenario::Chunked if ids.len() < 3 => Err("fewer than three tokens".into()),
            // Thirds, but never whole tiles.
            Scenario::Chunked => {
                let third = (ids.len() / 3).max(1);
                let third = if third.is_multiple_of(BLOCK) { third - 1 } else { third };
                Ok(cut(vec![third, third, ids.len() - 2 * third]))
            }
            Scenario::Decode | Scenario::Unobserved if ids.len() < 2 => Err("a single token".into()),
            Scenario::Decode => {
                let singles = (ids.len() - 1).min(DECODED);
                let mut chunks = vec![ids.len() - singles];
                chunks.resize(1 + singles, 1);
                Ok(cut(chunks))
            }
            // The first time a backend may get ready, the second record, the third replay.
            Scenario::Unobserved => {
                let (whole, decode) = (cut(vec![ids.len()]), Scenario::Decode.steps(ids, limits)?);
                Ok([vec![whole; 3].concat(), decode].concat())
            }
            Scenario::Batch => batch(ids, limits),
            Scenario::Dump => Err("a dump has its own steps".into()),
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Tokens that are fed one at a time in [`Scenario::Decode`].
const DECODED: usize = 4;

/// What both backends were built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a step.
    pub max_rows: usize,
    /// KV blocks.
    pub kv_blocks: usize,
}

/// KV blocks `first..` for `n` positions.
fn table(first: usize, n: usize) -> Vec<u32> {
    // Below the backend's number of blocks, which are u32.
    (first as u32..(first + n.div_ceil(BLOCK)) as u32).collect()
}

fn sequence(ids: &[u32], chunks: &[usize], max_rows: usize) -> Vec<Step> {
    let (mut steps, mut start) = (Vec::new(), 0);
    for &chunk in chunks {
        for part in ids[start..start + chunk].chunks(max_rows) {
            // Positions are below the context, which is below 2^32.
            steps.push(Step::prefill(part, start as u32, table(0, ids.len())));
            start += part.len();
        }
    }
    steps
}

/// The tokens beside their reverse, which stands first in every step; half of the step's rows each.
fn batch(ids: &[u32], limits: Limits) -> Result<Vec<Step>, String> {
    let blocks = ids.len().div_ceil(BLOCK);
    if limits.kv_blocks < 2 * blocks {
        return Err(format!("two sequences need {} KV blocks; there are {}", 2 * blocks, limits.kv_blocks));
    }
    if limits.max_rows < 2 {
        return Err("steps of a single row".into());
    }
    let tables = vec![table(0, ids.len()), table(blocks, ids.len())];
    let company: Vec<u32> = ids.iter().rev().copied().collect();
    let chunk = limits.max_rows / 2;
    let step = |start: usize| {
        let rows = |sequence: u32, ids: &[u32]| -> Vec<Row> {
            let part = ids[start..(start + chunk).min(ids.len())].iter().enumerate();
            part.map(|(i, &token)| Row { token, position: (start + i) as u32, sequence }).collect()
        };
        // The company has the later blocks, so that a table mixed up shows.
        let rows = [rows(1, &company), rows(0, ids)].concat();
        let last = rows.len() as u32 - 1;
        Step { rows, tables: tables.clone(), logits: vec![last] }
    };
    Ok((0..ids.len()).step_by(chunk).map(step).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_well_formed_and_reach_every_token() {
        let config = crate::testing::shape(false, 1).config;
        for n in [1usize, 2, 3, 7, 64, 65, 192, 200] {
            for max_rows in [1, 2, 5, 512] {
                let limits = Limits { max_rows, kv_blocks: 2 * n.div_ceil(BLOCK) };
                let ids: Vec<u32> = (0..n as u32).map(|i| i % 60).collect();
                for scenario in Scenario::LIVE {
                    let Ok(steps) = scenario.steps(&ids, limits) else {
                        assert!(n < 3 || max_rows < 2, "{scenario} {n} {max_rows}");
                        continue;
                    };
                    let mut fed = Vec::new();
                    for step in &steps {
                        step.check(&config).unwrap_or_else(|e| panic!("{scenario} {n} {max_rows}: {e}"));
                        assert!(step.rows.len() <= max_rows);
                        fed.extend(step.rows.iter().filter(|r| r.sequence == 0).map(|r| r.token));
                    }
                    let times = if scenario == Scenario::Unobserved { 4 } else { 1 };
                    assert_eq!(fed, vec![ids.clone(); times].concat(), "{scenario} {n} {max_rows}");
                }
            }
        }
        let limits = Limits { max_rows: 512, kv_blocks: 1 };
        assert!(Scenario::Whole.steps(&[0; 65], limits).is_err());
        assert!(Scenario::Batch.steps(&[0; 64], limits).is_err());
        assert!(Scenario::Dump.steps(&[0], limits).is_err());
    }
}
