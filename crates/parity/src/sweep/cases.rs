//! The cases of a sweep: which lengths, positions, companies, cuts and repeats, and their steps. Runs nothing.

use model::{BLOCK, Row, Step};

use super::{Axis, Options};
use crate::scenario::Limits;

/// One way to some logits: steps from empty caches on.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) name: String,
    pub(super) steps: Vec<Step>,
    /// Whether a buffer is read after every stage.
    pub(super) watched: bool,
    /// In what order the rows of logits are to be compared, where that is not as they come: index in the result, of each.
    pub(super) order: Option<Vec<usize>>,
}

pub(super) struct Case {
    pub(super) axis: Axis,
    pub(super) name: String,
    pub(super) ways: Vec<Way>,
    /// Whether both sides are compared, too.
    pub(super) across: bool,
}

/// What a case may take.
#[derive(Clone, Copy)]
pub(super) struct Room {
    pub(super) limits: Limits,
    pub(super) context: usize,
    pub(super) vocab: usize,
}

impl Room {
    /// Positions that a single sequence may have.
    fn positions(self) -> usize {
        self.context.min(self.limits.kv_blocks * BLOCK)
    }

    /// Token ids without a pattern that a fault could hide in.
    fn ids(self, seed: usize, n: usize) -> Vec<u32> {
        // Below a vocabulary, which is below 2^32.
        (0..n)
            .map(|i| ((seed.wrapping_mul(0x61c8_8647) ^ i.wrapping_mul(0x9e37_79b9)) % self.vocab) as u32)
            .collect()
    }

    /// The steps of one sequence in these chunks; logits of the last row alone.
    fn steps(self, ids: &[u32], chunks: &[usize]) -> Vec<Step> {
        // Backwards: a block's id is not its place. Positions and blocks are below 2^32.
        let table: Vec<u32> = (0..ids.len().div_ceil(BLOCK) as u32).rev().collect();
        let (mut steps, mut start) = (Vec::new(), 0);
        for &chunk in chunks {
            for part in ids[start..start + chunk].chunks(self.limits.max_rows) {
                let mut step = Step::prefill(part, start as u32, table.clone());
                step.logits.clear();
                steps.push(step);
                start += part.len();
            }
        }
        if let Some(last) = steps.last_mut() {
            last.logits.push(last.rows.len() as u32 - 1);
        }
        steps
    }
}

/// Around the borders of tiles, spans and chunks.
const LENGTHS: [usize; 17] = [1, 2, 3, 8, 9, 17, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1025, 4097];
const POSITIONS: [usize; 14] = [1, 2, 62, 63, 64, 65, 127, 128, 255, 256, 257, 512, 1024, 4096];
const STREAMS: [usize; 6] = [1, 2, 3, 8, 17, 64];
/// Rows of steps that are repeated: one, few, and more than are recorded.
const ROWS: [usize; 3] = [1, 3, 65];

fn plain(name: &str, steps: Vec<Step>) -> Way {
    Way { name: name.into(), steps, watched: false, order: None }
}

pub(super) fn cases(axis: Axis, options: &Options, room: Room) -> Vec<Case> {
    let longest = options.longest.min(room.positions());
    let tokens = |n: usize| format!("{n} token{}", if n == 1 { "" } else { "s" });
    let case = |name: String, ways: Vec<Way>, across| Case { axis, name, ways, across };
    match axis {
        Axis::Length => LENGTHS
            .into_iter()
            .filter(|&n| n <= longest)
            .map(|n| case(tokens(n), vec![plain("whole", room.steps(&room.ids(n, n), &[n]))], true))
            .collect(),
        Axis::Position => POSITIONS
            .into_iter()
            .filter(|&at| at < longest)
            .map(|at| {
                let steps = room.steps(&room.ids(at, at + 1), &[at, 1]);
                case(format!("position {at}"), vec![plain("decode", steps)], true)
            })
            .collect(),
        Axis::Batch => STREAMS
            .into_iter()
            .filter(|&n| n <= options.streams)
            .filter_map(|n| {
                Some(case(format!("{n} sequence{}", if n == 1 { "" } else { "s" }), batch(n, room)?, true))
            })
            .collect(),
        Axis::Cut => [3, 65, 130]
            .into_iter()
            .filter(|&n| n <= longest)
            .map(|n| case(tokens(n), cuts(n, room), true))
            .collect(),
        Axis::Replay => ROWS
            .into_iter()
            .filter(|&n| n < longest)
            .map(|n| {
                let way = |name: &str, watched| Way {
                    watched,
                    ..plain(name, room.steps(&room.ids(n, n + 1), &[1, n]))
                };
                // The first run is made stage by stage, the second is recorded, the third is a replay.
                let mut ways = vec![way("looked at", true)];
                ways.extend(["first", "recorded", "replayed"].map(|name| way(name, false)));
                case(format!("{n} row{}", if n == 1 { "" } else { "s" }), ways, true)
            })
            .collect(),
        Axis::Repeat => ROWS
            .into_iter()
            .filter(|&n| n <= longest)
            .map(|n| {
                let way = plain("again", room.steps(&room.ids(n, n), &[n]));
                case(
                    format!("{} {} times", tokens(n), options.repeats),
                    vec![way; options.repeats.max(2)],
                    false,
                )
            })
            .collect(),
    }
}

/// A prompt whole, in thirds, and its last tokens one at a time.
fn cuts(n: usize, room: Room) -> Vec<Way> {
    let ids = room.ids(n, n);
    let third = n / 3;
    let singles = (n - 1).min(4);
    let decode = [vec![n - singles], vec![1; singles]].concat();
    vec![
        plain("prefill", room.steps(&ids, &[n])),
        plain("in chunks", room.steps(&ids, &[third, third, n - 2 * third])),
        plain("decode", room.steps(&ids, &decode)),
    ]
}

/// Sequences of different lengths whose last tokens are one step, the longest first in it; and each by itself.
fn batch(n: usize, room: Room) -> Option<Vec<Way>> {
    // Of 1 to 90 tokens, as far as there is room.
    let most = room.positions().min(90);
    let blocks = most.div_ceil(BLOCK);
    if n * blocks > room.limits.kv_blocks || n > room.limits.max_rows {
        return None;
    }
    // Below the number of blocks, which are u32.
    let table = |s: usize| (s * blocks..(s + 1) * blocks).map(|block| block as u32).collect::<Vec<_>>();
    let prompts: Vec<Vec<u32>> = (0..n).map(|s| room.ids(s, 1 + s * 37 % most)).collect();
    let last = |s: usize, sequence: usize| Row {
        token: *prompts[s].last().expect("a prompt has a token"),
        position: prompts[s].len() as u32 - 1,
        sequence: sequence as u32,
    };
    let before = prompts.iter().enumerate().flat_map(|(s, prompt)| {
        let rows = &prompt[..prompt.len() - 1];
        rows.chunks(room.limits.max_rows)
            .scan(0, move |start, part| {
                let mut step = Step::prefill(part, *start, table(s));
                step.logits.clear();
                *start += part.len() as u32;
                Some(step)
            })
            .collect::<Vec<_>>()
    });
    let before: Vec<Step> = before.collect();
    let together = Step {
        rows: (0..n).rev().map(|s| last(s, s)).collect(),
        tables: (0..n).map(table).collect(),
        logits: (0..n as u32).collect(),
    };
    let alone = (0..n).map(|s| Step { rows: vec![last(s, 0)], tables: vec![table(s)], logits: vec![0] });
    let of = |steps: Vec<Step>| [before.clone(), steps].concat();
    let alone = Way { order: Some((0..n).rev().collect()), ..plain("alone", of(alone.collect())) };
    Some(vec![plain("together", of(vec![together])), alone])
}
