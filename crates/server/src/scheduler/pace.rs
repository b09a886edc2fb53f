//! How much of the prompts a step may take: as much as there is room for while nobody is decoding, else so much that those
//! who are notice little. Knows rows and seconds.
//!
//! The cut of a prompt changes no bit of what is computed, so it may depend on the clock.

use std::time::Duration;

/// Rows that a step takes at least: below, a prompt would hardly move, and products of few rows cost as much as one.
const LEAST: usize = 16;
/// How much of the old estimate a new measurement leaves.
const MEMORY: f64 = 0.8;

/// Measures steps, and says how large the next may be.
#[derive(Debug)]
pub(crate) struct Pace {
    /// What prompts may add to a step in which others decode.
    target: f64,
    /// Seconds of a step that decodes only; none until one was seen.
    decode: Option<f64>,
    /// Seconds that a prompt's row adds.
    row: Option<f64>,
}

impl Pace {
    pub(crate) fn new(target: Duration) -> Pace {
        Pace { target: target.as_secs_f64(), decode: None, row: None }
    }

    /// Rows of prompts for a step of at most `most` rows in which `decoding` sequences decode.
    pub(crate) fn rows(&self, decoding: usize, most: usize) -> usize {
        let room = most.saturating_sub(decoding);
        match self.row {
            Some(row) if decoding > 0 => {
                // Rounded down; as large as `room` at most.
                let rows = (self.target / row.max(1e-9)) as usize;
                rows.max(LEAST).min(room)
            }
            // Nothing was measured yet.
            None if decoding > 0 => LEAST.min(room),
            _ => room,
        }
    }

    /// A step of `prompt` rows of prompts, beside `decoding` ones, took `elapsed`.
    pub(crate) fn observe(&mut self, prompt: usize, decoding: usize, elapsed: Duration) {
        let elapsed = elapsed.as_secs_f64();
        let blend =
            |old: Option<f64>, new: f64| Some(old.map_or(new, |old| MEMORY * old + (1.0 - MEMORY) * new));
        if prompt == 0 {
            self.decode = blend(self.decode, elapsed);
        } else if prompt >= LEAST {
            let beside = if decoding > 0 { self.decode.unwrap_or(0.0) } else { 0.0 };
            let rows = prompt as f64; // exact: a step has fewer than 2^53 rows
            self.row = blend(self.row, (elapsed - beside).max(elapsed * 0.1) / rows);
        }
    }
}

/// Divides `rows` among prompts of which `pending` rows are to be computed, in the order of arrival: a quarter to the first
/// to come, so that it ends whoever follows; the rest to those that are soonest done, so that a short prompt need not wait
/// for a long one. Equal ones end one after the other: in even shares all would end when the last one does, and each step
/// would hold a few rows of everyone, which attention likes least.
pub(crate) fn share(pending: &[usize], rows: usize) -> Vec<usize> {
    let mut shares = vec![0; pending.len()];
    let Some(&oldest) = pending.first() else { return shares };
    shares[0] = oldest.min(rows.div_ceil(4));
    let mut left = rows - shares[0];
    let mut order: Vec<usize> = (0..pending.len()).collect();
    order.sort_by_key(|&i| pending[i]);
    for i in order {
        let take = (pending[i] - shares[i]).min(left);
        shares[i] += take;
        left -= take;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        let check = |pending: &[usize], rows, want: &[usize]| {
            let got = share(pending, rows);
            assert_eq!(got, want, "{pending:?} {rows}");
            // Nothing is left over that could be used.
            assert_eq!(got.iter().sum::<usize>(), rows.min(pending.iter().sum()), "{pending:?} {rows}");
        };
        check(&[], 512, &[]);
        check(&[10], 512, &[10]);
        check(&[1000], 512, &[512]);
        check(&[1000, 10], 100, &[90, 10]);
        check(&[1000, 1000], 100, &[100, 0]);
        check(&[1000, 900, 900], 100, &[25, 75, 0]);
        check(&[10, 1000, 1000], 100, &[10, 90, 0]);
        check(&[1000, 20, 30], 100, &[50, 20, 30]);
        check(&[1000; 5], 4, &[4, 0, 0, 0, 0]);
        check(&[1000, 1], 1, &[1, 0]);
    }

    #[test]
    fn decoding_is_not_starved() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(ms(50));
        assert_eq!(pace.rows(0, 512), 512, "nobody else is there");
        assert_eq!(pace.rows(3, 512), LEAST, "nothing is known yet");
        pace.observe(0, 3, ms(10));
        pace.observe(100, 3, ms(110));
        assert_eq!(pace.rows(3, 512), 50, "a millisecond a row");
        assert_eq!(pace.rows(500, 512), 12, "no more than there is room for");
        pace.observe(100, 3, ms(100_000));
        assert_eq!(pace.rows(3, 512), LEAST);
        (0..200).for_each(|_| pace.observe(100, 0, ms(1)));
        assert_eq!(pace.rows(3, 512), 509);
    }
}
