//! Statistics of one vector and of two: counts are exact, sums are in f64 and in order, so that no figure depends on the
//! machine.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::place::Number;

/// How much of a vector is numbers: printed before anything is claimed of it, so that a failure carries its data.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Finiteness {
    /// Values.
    pub total: usize,
    /// Neither NaN nor infinite.
    pub finite: usize,
    /// NaNs.
    pub nan: usize,
    /// Index of the first NaN.
    pub nan_first: Option<usize>,
    /// Infinities of either sign.
    pub inf: usize,
    /// Index of the first infinity.
    pub inf_first: Option<usize>,
    /// The smallest finite value.
    pub finite_min: Option<Number>,
    /// The largest finite value.
    pub finite_max: Option<Number>,
}

impl Finiteness {
    /// Counts `values`.
    pub fn of(values: &[f32]) -> Finiteness {
        let mut counts = Finiteness { total: values.len(), ..Finiteness::default() };
        for (i, &v) in values.iter().enumerate() {
            if v.is_nan() {
                counts.nan += 1;
                counts.nan_first.get_or_insert(i);
            } else if v.is_infinite() {
                counts.inf += 1;
                counts.inf_first.get_or_insert(i);
            } else {
                counts.finite += 1;
                counts.finite_min = Some(Number(counts.finite_min.map_or(v, |min| min.0.min(v))));
                counts.finite_max = Some(Number(counts.finite_max.map_or(v, |max| max.0.max(v))));
            }
        }
        counts
    }

    /// Whether every value is a number.
    pub fn all(&self) -> bool {
        self.finite == self.total
    }
}

impl fmt::Display for Finiteness {
    /// The finiteness block, in a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = |index: Option<usize>| index.map_or(String::new(), |i| format!(" (first at {i})"));
        let value = |v: Option<Number>| v.map_or("none".into(), |v| v.0.to_string());
        write!(
            f,
            "total {}, finite {}, nan {}{}, inf {}{}, finite_min {}, finite_max {}",
            self.total,
            self.finite,
            self.nan,
            first(self.nan_first),
            self.inf,
            first(self.inf_first),
            value(self.finite_min),
            value(self.finite_max)
        )
    }
}

/// The bits of a value, every NaN taken as one (ARCHITECTURE.md, rule 8).
pub fn canonical(v: f32) -> u32 {
    if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }
}

/// How many representable values lie from `a` to `b`; the two zeros are one step apart in bits and none here.
/// `None` unless both are finite.
pub fn ulps(a: f32, b: f32) -> Option<u64> {
    // Values in order have ordered keys: the magnitude's bits, with the sign of the value.
    let key = |v: f32| {
        let magnitude = i64::from(v.to_bits() & 0x7fff_ffff);
        if v.is_sign_negative() { -magnitude } else { magnitude }
    };
    (a.is_finite() && b.is_finite()).then(|| key(a).abs_diff(key(b)))
}

/// A place where two vectors differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Index.
    pub index: usize,
    /// The left's value there.
    pub left: f32,
    /// The right's value there.
    pub right: f32,
}

/// How two vectors compare.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Of the left.
    pub left: Finiteness,
    /// Of the right.
    pub right: Finiteness,
    /// Values whose bits differ, every NaN taken as one.
    pub differing: usize,
    /// The first of them.
    pub first: Option<Difference>,
    /// The largest magnitude of the difference, where both values are finite; the first of several.
    pub max_abs: Option<(Difference, f64)>,
    /// The most ULPs apart, where both values are finite; the first of several.
    pub max_ulps: Option<(Difference, u64)>,
    /// What is only defined where every value of both is a number.
    pub apart: Option<Apart>,
}

/// Distances of two vectors of numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Apart {
    /// Of the angle between the two; blind to scale, so it never stands alone. `None` if one of them is zero.
    pub cosine: Option<f64>,
    /// Squared error over the squares of the left; `None` if that is zero and the right is not.
    pub nmse: Option<f64>,
    /// Kullback-Leibler divergence of the right's softmax from the left's, in nats.
    pub kl: f64,
}

impl Comparison {
    /// Compares `left` with `right`.
    ///
    /// # Panics
    /// If their lengths differ.
    pub fn of(left: &[f32], right: &[f32]) -> Comparison {
        assert_eq!(left.len(), right.len(), "two runs of one model have as many logits");
        let mut differing = 0;
        let (mut first, mut max_abs, mut max_ulps) =
            (None, None::<(Difference, f64)>, None::<(Difference, u64)>);
        for (index, (&left, &right)) in left.iter().zip(right).enumerate() {
            let here = Difference { index, left, right };
            if canonical(left) != canonical(right) {
                differing += 1;
                first.get_or_insert(here);
            }
            let Some(steps) = ulps(left, right) else { continue };
            if max_ulps.is_none_or(|(_, max)| steps > max) {
                max_ulps = Some((here, steps));
            }
            let abs = (f64::from(left) - f64::from(right)).abs();
            if max_abs.is_none_or(|(_, max)| abs > max) {
                max_abs = Some((here, abs));
            }
        }
        let counts = [left, right].map(Finiteness::of);
        let finite = counts.iter().all(Finiteness::all) && !left.is_empty();
        let apart = finite.then(|| match differing {
            // What most buffers are, and what a bisection waits for.
            0 => Apart { cosine: left.iter().any(|&v| v != 0.0).then_some(1.0), nmse: Some(0.0), kl: 0.0 },
            _ => Apart { cosine: cosine(left, right), nmse: nmse(left, right), kl: kl(left, right) },
        });
        Comparison { left: counts[0], right: counts[1], differing, first, max_abs, max_ulps, apart }
    }

    /// Whether all bits agree, NaNs being one.
    pub fn bits_equal(&self) -> bool {
        self.differing == 0
    }

    /// Whether every value of both is a number.
    pub fn finite(&self) -> bool {
        self.left.all() && self.right.all()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn cosine(left: &[f32], right: &[f32]) -> Option<f64> {
    let norms = dot(left, left).sqrt() * dot(right, right).sqrt();
    (norms > 0.0).then(|| dot(left, right) / norms)
}

fn nmse(left: &[f32], right: &[f32]) -> Option<f64> {
    let error: f64 = left.iter().zip(right).map(|(&l, &r)| (f64::from(l) - f64::from(r)).powi(2)).sum();
    match dot(left, left) {
        0.0 if error == 0.0 => Some(0.0),
        0.0 => None,
        signal => Some(error / signal),
    }
}

/// Of `q`'s softmax from `p`'s. Never negative but for rounding, which is cut off.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    // ln of the sum of exponentials, with the largest taken out.
    let normaliser = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + x.iter().map(|&v| (f64::from(v) - f64::from(max)).exp()).sum::<f64>().ln()
    };
    let (p_norm, q_norm) = (normaliser(p), normaliser(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p) - p_norm, f64::from(q) - q_norm);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;

    #[test]
    fn finiteness() {
        let check = |values: &[f32], want: Finiteness| assert_eq!(Finiteness::of(values), want, "{values:?}");
        check(&[], Finiteness::default());
        let one = Finiteness {
            total: 1,
            finite: 1,
            finite_min: Some(Number(2.0)),
            finite_max: Some(Number(2.0)),
            ..Finiteness::default()
        };
        check(&[2.0], one);
        check(&[NAN, NAN], Finiteness { total: 2, nan: 2, nan_first: Some(0), ..Finiteness::default() });
        check(
            &[1.0, -INF, NAN, -3.0, INF, NAN],
            Finiteness {
                total: 6,
                finite: 2,
                nan: 2,
                nan_first: Some(2),
                inf: 2,
                inf_first: Some(1),
                finite_min: Some(Number(-3.0)),
                finite_max: Some(Number(1.0)),
            },
        );
        assert!(
            Finiteness::of(&[]).all() && Finiteness::of(&[0.0]).all() && !Finiteness::of(&[0.0, INF]).all()
        );
    }

    #[test]
    fn steps_between_values() {
        let check = |a: f32, b: f32, want| assert_eq!((ulps(a, b), ulps(b, a)), (want, want), "{a} {b}");
        check(1.0, 1.0, Some(0));
        check(1.0, 1.0f32.next_up(), Some(1));
        check(0.0, -0.0, Some(0));
        check(f32::from_bits(1), -f32::from_bits(1), Some(2));
        check(1.0, 2.0, Some(1 << 23));
        check(f32::MIN, f32::MAX, Some(2 * 0x7f7f_ffff));
        check(1.0, NAN, None);
        check(INF, INF, None);
    }

    #[test]
    fn bits() {
        let check = |left: &[f32], right: &[f32], differing, first| {
            let found = Comparison::of(left, right);
            assert_eq!(
                (found.differing, found.first.map(|d| d.index)),
                (differing, first),
                "{left:?} {right:?}"
            );
            assert_eq!(found.bits_equal(), differing == 0);
        };
        check(&[], &[], 0, None);
        check(&[1.0, 2.0], &[1.0, 2.0], 0, None);
        check(&[1.0, 2.0, 3.0], &[1.0, 2.5, 3.0f32.next_down()], 2, Some(1));
        // Every NaN is one; a zero's sign is a bit.
        check(&[NAN, f32::from_bits(0xffc0_0001)], &[f32::from_bits(0x7f80_0001), -NAN], 0, None);
        check(&[NAN], &[1.0], 1, Some(0));
        check(&[0.0], &[-0.0], 1, Some(0));
        check(&[INF], &[-INF], 1, Some(0));
    }

    #[test]
    fn distances() {
        let check = |left: &[f32], right: &[f32], cosine: Option<f64>, nmse: Option<f64>, kl: f64| {
            let apart = Comparison::of(left, right).apart.expect("numbers");
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs().max(1.0);
            let near_some = |a: Option<f64>, b: Option<f64>| match (a, b) {
                (Some(a), Some(b)) => near(a, b),
                (a, b) => a == b,
            };
            assert!(
                near_some(apart.cosine, cosine) && near_some(apart.nmse, nmse) && near(apart.kl, kl),
                "{apart:?}"
            );
        };
        check(&[1.0, 0.0], &[1.0, 0.0], Some(1.0), Some(0.0), 0.0);
        check(&[3.0, 4.0], &[6.0, 8.0], Some(1.0), Some(1.0), {
            // Softmax of a gap of 1 and of 2: p = 1 / (1 + e), q = 1 / (1 + e^2).
            let (p, q) = (1.0 / (1.0 + 1f64.exp()), 1.0 / (1.0 + 2f64.exp()));
            p * (p / q).ln() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).ln()
        });
        check(&[1.0, 0.0], &[0.0, 1.0], Some(0.0), Some(2.0), {
            let p = 1.0 / (1.0 + 1f64.exp());
            (1.0 - 2.0 * p) * ((1.0 - p) / p).ln()
        });
        check(&[0.0, 0.0], &[0.0, 0.0], None, Some(0.0), 0.0);
        check(&[0.0, 0.0], &[1.0, 1.0], None, None, 0.0);
        // A constant changes no probability, and no overflow happens.
        check(&[1e30, 1e30], &[-1e30, -1e30], Some(-1.0), Some(4.0), 0.0);
    }

    #[test]
    fn the_largest_difference_is_found_among_numbers() {
        let found = Comparison::of(&[NAN, 1.0, 5.0, 0.5, INF], &[0.0, 1.5, 4.0, 0.0, INF]);
        assert_eq!(found.max_abs.map(|(at, abs)| (at.index, abs)), Some((2, 1.0)));
        assert_eq!(
            found.max_ulps.map(|(at, steps)| (at.index, steps)),
            Some((3, u64::from(0.5f32.to_bits())))
        );
        assert!(found.apart.is_none() && !found.finite());
        assert_eq!(Comparison::of(&[NAN], &[NAN]).max_abs, None);
    }

    proptest! {
        /// A single changed bit anywhere is found, wherever it is and whatever the value.
        #[test]
        fn no_bit_is_missed(values in prop::collection::vec(any::<f32>(), 1..50), at in any::<prop::sample::Index>(), bit in 0..32u32) {
            let at = at.index(values.len());
            let mut other = values.clone();
            other[at] = f32::from_bits(values[at].to_bits() ^ 1 << bit);
            let found = Comparison::of(&values, &other);
            let same = values[at].is_nan() && other[at].is_nan();
            prop_assert_eq!(found.first.map(|d| d.index), if same { None } else { Some(at) });
        }
    }
}
