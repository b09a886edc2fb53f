//! When two values agree: by bits where both sides follow the same rules, else by a bound with its reason.

use model::{Buffer, Stage};

use crate::dump::Arithmetic;
use crate::report::NearTie;
use crate::stats::canonical;

/// What the two sides' values are held to.
#[derive(Debug, Clone, PartialEq)]
pub enum Judge {
    /// The same rules: equality, every NaN taken as one.
    Bits,
    /// Different rules: an error relative to the root mean square of the line (a head, an expert's row, the residual
    /// stream of a row; or of the median line, if that is larger) on the same inputs.
    Bounds {
        /// Of a stage that is a product.
        product: f64,
        /// Of attention.
        attention: f64,
    },
}

/// From a deviation to a limit: the largest of thousands of errors lies about four deviations out, and a line may be
/// six times as ill-conditioned as those that the deviations were measured on (the value rows of an attention sink are:
/// spikes in the input that cancel in the output). Clean runs of random and of trained models stay below half of the
/// limit, which a test holds; a weight, row, lane or head that is wrong is off by the size of the line, hundreds of times
/// more in the default arithmetic.
const MARGIN: f64 = 24.0;

/// The relative error of a product and of attention in one arithmetic (ARCHITECTURE.md, what it costs in accuracy;
/// spiked activations, which trained models have). For f32 and f64: sums of a few thousand terms in f32, which outputs are stored in.
fn deviations(arithmetic: &Arithmetic) -> (f64, f64) {
    match arithmetic {
        Arithmetic::Tally { activations } if activations == "a8" => (3.2e-2, 5.1e-4),
        Arithmetic::Tally { .. } => (1.2e-4, 5.1e-4),
        Arithmetic::Float { precision } => match precision.as_str() {
            "f64" | "f32" => (1.0e-6, 1.0e-6),
            "f16" => (2.3e-4, 3.3e-4),
            _ => (1.6e-3, 2.0e-3),
        },
    }
}

impl Judge {
    /// For sides of these rules.
    pub fn of(left: &Arithmetic, right: &Arithmetic) -> Judge {
        if left == right && matches!(left, Arithmetic::Tally { .. }) {
            return Judge::Bits;
        }
        let ((lp, la), (rp, ra)) = (deviations(left), deviations(right));
        Judge::Bounds { product: lp.hypot(rp) * MARGIN, attention: la.hypot(ra) * MARGIN }
    }

    /// What it does, and why so, for people.
    pub fn reason(&self) -> String {
        match self {
            Judge::Bits => {
                "bits: both sides follow the same rules, so every value must agree in every bit".into()
            }
            Judge::Bounds { product, attention } => format!(
                "bounds: the sides follow different rules; each stage is given the same inputs, and a value may be off \
                 by {product:.1e} of its line's root mean square in a product and {attention:.1e} in attention: the \
                 errors of the two arithmetics, times 4 for the largest of thousands, times 6 for lines worse \
                 conditioned than those the errors were measured on"
            ),
        }
    }

    /// The error that `buffer` may have after `stage` when `unforced` stages before it went on with values of their
    /// own; none for bits.
    pub fn limit(&self, stage: Stage, buffer: Buffer, unforced: u32) -> Option<f64> {
        let Judge::Bounds { product, attention } = *self else { return None };
        let own = match (stage, buffer) {
            (Stage::Attend, _) => attention,
            // A product of two products: the largest of each meet.
            (_, Buffer::Hidden) => 4.0 * product,
            (Stage::FeedForward, Buffer::Down | Buffer::X) => 4.0 * product,
            // An exponential of the scores: an error there becomes a relative one here, times the scores' size.
            (_, Buffer::ExpertWeights) => 8.0 * product,
            _ => product,
        };
        // Errors of stages in a row are independent.
        Some((own.powi(2) + f64::from(unforced) * attention.max(4.0 * product).powi(2)).sqrt())
    }

    /// Indices at which `left` and `right` do not agree. `line` values stand together.
    pub fn wrong(&self, left: &[f32], right: &[f32], line: usize, limit: Option<f64>) -> Vec<usize> {
        let Some(limit) = limit else {
            let differs = |&i: &usize| canonical(left[i]) != canonical(right[i]);
            return (0..left.len()).filter(differs).collect();
        };
        let line = line.max(1);
        let lines = left.chunks(line).zip(right.chunks(line)).zip(scales(left, line)).enumerate();
        lines
            .flat_map(|(at, ((left, right), rms))| {
                let off = move |(&l, &r): (&f32, &f32)| {
                    let error = error(l, r, rms);
                    error > limit || error.is_nan()
                };
                let found: Vec<usize> = left
                    .iter()
                    .zip(right)
                    .enumerate()
                    .filter(|(_, pair)| off(*pair))
                    .map(|(i, _)| i)
                    .collect();
                found.into_iter().map(move |i| at * line + i)
            })
            .collect()
    }

    /// The largest error, relative as in [`Judge::wrong`].
    pub fn error(left: &[f32], right: &[f32], line: usize) -> f64 {
        let line = line.max(1);
        let lines = left.chunks(line).zip(right.chunks(line)).zip(scales(left, line));
        lines
            .flat_map(|((left, right), rms)| left.iter().zip(right).map(move |(&l, &r)| error(l, r, rms)))
            // A NaN is the largest error of all.
            .fold(0.0, |max, e| if e > max || e.is_nan() { e } else { max })
    }
}

fn rms(line: &[f32]) -> f64 {
    (line.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / line.len() as f64).sqrt()
}

/// What each line's errors are relative to: its root mean square or, if that is more, the median of all lines'. A line may
/// be small because what goes into it cancels (the values of an attention sink do), and then its errors do not.
fn scales(values: &[f32], line: usize) -> Vec<f64> {
    let own: Vec<f64> = values.chunks(line).map(rms).collect();
    let mut sorted: Vec<f64> = own.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    // A NaN stays one: `max` would drop it.
    own.into_iter().map(|v| if v < median { median } else { v }).collect()
}

/// Zero for the same bits, whatever they are; NaN or infinite where one is no number and the other is.
fn error(left: f32, right: f32, rms: f64) -> f64 {
    if canonical(left) == canonical(right) {
        return 0.0;
    }
    (f64::from(left) - f64::from(right)).abs() / rms
}

/// Whether experts that differ do so by no fault: each pair that was exchanged is nearer in the left's scores than the
/// error there may be. Returns those rows, and the rows for which it does not hold.
pub(crate) fn near_ties(
    left: &[f32],
    right: &[f32],
    scores: &[f32],
    used: usize,
    limit: f64,
) -> (Vec<NearTie>, Vec<usize>) {
    let experts = scores.len() / (left.len() / used);
    let (mut ties, mut wrong) = (Vec::new(), Vec::new());
    let rows = left.chunks(used).zip(right.chunks(used)).zip(scores.chunks(experts));
    for (row, ((left, right), scores)) in rows.enumerate() {
        // Twice: either score may be off.
        let limit = 2.0 * limit * rms(scores);
        for (rank, (&l, &r)) in left.iter().zip(right).enumerate().filter(|(_, (l, r))| l != r) {
            // Ids are small integers; one that is none was refused where it was written.
            let (l, r) = (l as usize, r as usize);
            let margin = match (scores.get(l), scores.get(r)) {
                (Some(a), Some(b)) => (f64::from(*a) - f64::from(*b)).abs(),
                _ => f64::NAN,
            };
            if margin <= limit {
                ties.push(NearTie { row, left: l as u32, right: r as u32, margin, limit });
            } else {
                wrong.push(row * used + rank);
            }
        }
    }
    (ties, wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(activations: &str) -> Arithmetic {
        Arithmetic::Tally { activations: activations.into() }
    }

    fn float(precision: &str) -> Arithmetic {
        Arithmetic::Float { precision: precision.into() }
    }

    #[test]
    fn bits_only_for_the_same_rules() {
        assert_eq!(Judge::of(&tally("a16"), &tally("a16")), Judge::Bits);
        for (l, r) in
            [(tally("a16"), tally("a8")), (tally("a16"), float("f64")), (float("f32"), float("f32"))]
        {
            let judge = Judge::of(&l, &r);
            assert!(
                matches!(judge, Judge::Bounds { .. }) && judge.reason().contains("of its line's"),
                "{l:?} {r:?}"
            );
        }
    }

    #[test]
    fn what_is_wrong() {
        let bounds = Judge::Bounds { product: 1e-3, attention: 1e-2 };
        let check = |left: &[f32], right: &[f32], bits: &[usize], bounded: &[usize]| {
            assert_eq!(Judge::Bits.wrong(left, right, 2, None), bits, "{left:?} {right:?}");
            assert_eq!(bounds.wrong(left, right, 2, Some(1e-3)), bounded, "{left:?} {right:?}");
        };
        check(&[1.0, 2.0], &[1.0, 2.0], &[], &[]);
        check(&[1.0, 2.0], &[1.001, 2.0], &[0], &[]);
        check(&[1.0, 2.0], &[1.002, 2.0], &[0], &[0]);
        // Relative to the line, or to what is common: of three lines one is a thousand times larger, one smaller.
        let lines = [1e3, 2e3, 1.0, 2.0, 1e-3, 2e-3];
        check(&lines, &[1e3, 2e3, 1.0, 2.1, 1e-3, 2.1e-3], &[3, 5], &[3]);
        check(&lines, &[1e3, 2.1e3, 1.0, 2.0, 1e-3, 2.1e-2], &[1, 5], &[1, 5]);
        check(&[f32::NAN, 2.0], &[f32::NAN, 2.0], &[], &[]);
        check(&[1.0, 2.0], &[f32::NAN, 2.0], &[0], &[0]);
        check(&[1.0, f32::INFINITY], &[1.0, 3.0], &[1], &[1]);
        check(&[0.0, 0.0], &[0.0, 1e-9], &[1], &[1]);
        assert!(Judge::error(&[1.0, 2.0], &[f32::NAN, 2.0], 2).is_nan());
    }

    #[test]
    fn near_ties_are_told_from_wrong_choices() {
        let scores = [1.0, 0.999, -3.0, 0.5];
        let check = |left: &[f32], right: &[f32], ties, wrong: &[usize]| {
            let (found, bad) = near_ties(left, right, &scores, 2, 1e-3);
            assert_eq!((found.len(), &bad[..]), (ties, wrong), "{left:?} {right:?}");
        };
        check(&[0.0, 3.0], &[0.0, 3.0], 0, &[]);
        check(&[0.0, 3.0], &[1.0, 3.0], 1, &[]);
        check(&[0.0, 1.0], &[1.0, 0.0], 2, &[]);
        check(&[0.0, 3.0], &[0.0, 2.0], 0, &[1]);
        check(&[0.0, 3.0], &[9.0, 3.0], 0, &[0]);
    }
}
