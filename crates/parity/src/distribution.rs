//! How the values of a buffer are spread on both sides, and how far apart pairs of them are: what a report draws. Counts
//! are over all values; no verdict rests on them.

use serde::{Deserialize, Serialize};

use crate::stats::{canonical, ulps};
use crate::trace::Summary;

/// Bins of a histogram of values.
pub const BINS: usize = 48;
/// Bins of [`Distributions::ulps`]: equal, then one for each power of two up to all 2^32 floats.
const DISTANCES: usize = 34;

/// Both sides of a buffer, over the same bins.
///
/// A value `v` is binned by `asinh(v / scale)`, which is linear near zero and logarithmic far from it, so that one axis
/// holds the bulk and an overflow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distributions {
    /// The left's root mean square; 1 where that is 0.
    pub scale: f64,
    /// Where the first bin begins, as `asinh(v / scale)`.
    pub low: f64,
    /// Where the last one ends.
    pub high: f64,
    /// The left's values.
    pub left: Distribution,
    /// The right's; none if all its bits are the left's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right: Option<Distribution>,
    /// Pairs by distance: equal bits at 0, less than `2^i` ULPs at `i`; what lies beyond the end is 0. Pairs of which one
    /// is no number, and whose bits differ, are in none.
    pub ulps: Vec<u32>,
}

/// One side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Mean of the finite values.
    pub mean: f64,
    /// Root of their mean square.
    pub rms: f64,
    /// Finite values by bin, [`BINS`] of them; none if there is no finite value on either side.
    pub bins: Vec<u32>,
}

impl Distributions {
    /// Of two buffers of the same length; of one alone, give it twice.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn of(left: &[f32], right: &[f32]) -> Distributions {
        assert_eq!(left.len(), right.len(), "one buffer of two runs");
        let same = left.iter().zip(right).all(|(&l, &r)| canonical(l) == canonical(r));
        let sides = [Summary::of(left), Summary::of(right)];
        let scale = if sides[0].rms > 0.0 { sides[0].rms } else { 1.0 };
        let at = |v: f32| (f64::from(v) / scale).asinh();
        let ends = |pick: fn(&Summary) -> Option<crate::Number>| {
            sides.iter().filter_map(pick).map(|number| at(number.0)).collect::<Vec<_>>()
        };
        let low = ends(|side| side.min).into_iter().reduce(f64::min);
        let high = ends(|side| side.max).into_iter().reduce(f64::max);
        let (low, high) = match low.zip(high) {
            // A single value still has a bin around it.
            Some((low, high)) if low == high => (low - 0.5, high + 0.5),
            ends => ends.unwrap_or((0.0, 0.0)),
        };
        let distribution = |values: &[f32], side: &Summary| {
            let mut bins = if low < high { vec![0; BINS] } else { Vec::new() };
            for &v in values.iter().filter(|v| v.is_finite()) {
                // In 0..=1, so the product is a bin, or one past the last at the very end.
                let bin = ((at(v) - low) / (high - low) * BINS as f64) as usize;
                bins[bin.min(BINS - 1)] += 1;
            }
            Distribution { mean: side.mean, rms: side.rms, bins }
        };
        Distributions {
            scale,
            low,
            high,
            left: distribution(left, &sides[0]),
            right: (!same).then(|| distribution(right, &sides[1])),
            ulps: distances(left, right),
        }
    }
}

fn distances(left: &[f32], right: &[f32]) -> Vec<u32> {
    let mut counts = vec![0; DISTANCES];
    for (&l, &r) in left.iter().zip(right) {
        if canonical(l) == canonical(r) {
            counts[0] += 1;
        } else if let Some(steps) = ulps(l, r) {
            // The two zeros differ in bits and are no step apart: the nearest bin there is.
            counts[(64 - steps.leading_zeros() as usize).max(1)] += 1;
        }
    }
    while counts.last() == Some(&0) {
        counts.pop();
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(bins: &[u32]) -> u32 {
        bins.iter().sum()
    }

    #[test]
    fn every_finite_value_is_in_a_bin() {
        let check = |left: &[f32], right: &[f32], counts: (u32, Option<u32>)| {
            let found = Distributions::of(left, right);
            let got = (total(&found.left.bins), found.right.as_ref().map(|right| total(&right.bins)));
            assert_eq!(got, counts, "{left:?} {right:?}");
            let text = serde_json::to_string(&found).expect("numbers");
            assert_eq!(serde_json::from_str::<Distributions>(&text).expect("just written"), found);
        };
        check(&[], &[], (0, None));
        check(&[f32::NAN], &[f32::NAN], (0, None));
        check(&[0.0], &[0.0], (1, None));
        check(&[3.0, -3.0, 0.0], &[3.0, -3.0, 0.0], (3, None));
        check(&[1.0, 2.0], &[f32::NAN, f32::INFINITY], (2, Some(0)));
        check(&[f32::NAN, f32::INFINITY], &[1.0, 2.0], (0, Some(2)));
        check(&[1e-30, f32::MIN], &[f32::MAX, f32::MIN_POSITIVE], (2, Some(2)));
    }

    #[test]
    fn ends_and_order() {
        let found = Distributions::of(&[-1.0, 0.0, 1.0], &[-1.0, 0.0, 100.0]);
        let right = found.right.expect("another value");
        assert_eq!((found.left.bins[0], right.bins[0], right.bins[BINS - 1]), (1, 1, 1));
        let place =
            |bins: &[u32]| bins.iter().enumerate().filter(|b| *b.1 > 0).map(|b| b.0).collect::<Vec<_>>();
        let bins = place(&found.left.bins);
        assert!(bins.len() == 3 && bins[2] < BINS - 1, "{bins:?}");
    }

    #[test]
    fn pairs_by_distance() {
        let check = |left: &[f32], right: &[f32], want: &[u32]| {
            assert_eq!(Distributions::of(left, right).ulps, want, "{left:?} {right:?}")
        };
        let up = |n: u32| f32::from_bits(1f32.to_bits() + n);
        check(&[], &[], &[]);
        check(&[1.0, f32::NAN], &[1.0, -f32::NAN], &[2]);
        check(&[1.0; 5], &[up(1), up(2), up(3), up(4), 1.0], &[1, 1, 2, 1]);
        check(&[0.0], &[-0.0], &[0, 1]);
        check(&[1.0], &[f32::NAN], &[]);
        let far = Distributions::of(&[f32::MIN], &[f32::MAX]).ulps;
        assert_eq!((far.len(), far.last()), (33, Some(&1)));
    }
}
