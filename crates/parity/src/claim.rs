//! The claim that two sides give the same logits, and how it falls: falsifier FALSIFY-QW3-MOE-GPU-PARITY-001. What there
//! is of both sides is said before anything is judged, so that a failure always carries its data.

use crate::stats::{Comparison, Difference, Finiteness};

/// The weaker form of the claim, which other projects state: the least cosine between two sides' logits.
pub const COSINE_AT_LEAST: f64 = 0.99;

/// How the claim falls: the first of these, in this order.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refuted {
    /// Nothing was computed, which proves nothing.
    #[error("there are no logits")]
    Nothing,
    /// The two do not have as many values.
    #[error("{} logits against {}", .0[0], .0[1])]
    Lengths([usize; 2]),
    /// A side has values that are no numbers.
    #[error("{side}: {} of {} logits are no numbers", .counts.total - .counts.finite, .counts.total)]
    NonFinite {
        /// Which side.
        side: String,
        /// Of that side.
        counts: Finiteness,
    },
    /// The two point elsewhere; undefined where a side is nothing but zeros.
    #[error("cosine {}, where at least {COSINE_AT_LEAST} is claimed", .0.map_or("undefined".into(), |c| c.to_string()))]
    Cosine(Option<f64>),
    /// Bits differ.
    #[error(
        "{differing} of {total} logits differ, the first at {}: {} ({:08x}) and {} ({:08x})",
        .first.index, .first.left, .first.left.to_bits(), .first.right, .first.right.to_bits()
    )]
    Bits {
        /// Logits whose bits differ.
        differing: usize,
        /// Of how many.
        total: usize,
        /// The first of them.
        first: Difference,
    },
}

/// Holds `right` against `left`: all numbers, then a cosine of at least [`COSINE_AT_LEAST`], then all bits. `say` hears
/// how much of each side is numbers, a line each, before anything is judged.
pub fn same_logits(
    names: [&str; 2],
    left: &[f32],
    right: &[f32],
    say: &mut dyn FnMut(String),
) -> Result<(), Refuted> {
    let counts = [left, right].map(Finiteness::of);
    for (name, counts) in names.iter().zip(&counts) {
        say(format!("{name}: {counts}"));
    }
    if left.is_empty() && right.is_empty() {
        return Err(Refuted::Nothing);
    }
    if left.len() != right.len() {
        return Err(Refuted::Lengths([left.len(), right.len()]));
    }
    if let Some(i) = counts.iter().position(|counts| !counts.all()) {
        return Err(Refuted::NonFinite { side: names[i].into(), counts: counts[i] });
    }
    let compared = Comparison::of(left, right);
    let cosine = compared.apart.and_then(|apart| apart.cosine);
    if cosine.is_none_or(|cosine| cosine < COSINE_AT_LEAST) {
        return Err(Refuted::Cosine(cosine));
    }
    match compared.first {
        Some(first) => Err(Refuted::Bits { differing: compared.differing, total: left.len(), first }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_way_of_falling_is_named_after_the_data() {
        let check = |left: &[f32], right: &[f32], want: &str| {
            let mut said = Vec::new();
            let found = same_logits(["cpu", "gpu"], left, right, &mut |line| said.push(line));
            let text = found.err().map_or(String::new(), |refuted| refuted.to_string());
            assert_eq!(text, want, "{left:?} {right:?}");
            assert_eq!(said[0], format!("cpu: {}", Finiteness::of(left)), "said whatever comes of it");
            assert_eq!(said[1], format!("gpu: {}", Finiteness::of(right)));
        };
        let nan = f32::NAN;
        check(&[1.0, 2.0], &[1.0, 2.0], "");
        check(&[], &[], "there are no logits");
        check(&[1.0], &[1.0, nan], "1 logits against 2");
        // The same NaN on both sides is no agreement.
        check(&[nan, 2.0], &[nan, 2.0], "cpu: 1 of 2 logits are no numbers");
        check(&[1.0, 2.0], &[f32::INFINITY, nan], "gpu: 2 of 2 logits are no numbers");
        check(&[1.0, 0.0], &[0.0, 1.0], "cosine 0, where at least 0.99 is claimed");
        check(&[0.0, 0.0], &[0.0, 0.0], "cosine undefined, where at least 0.99 is claimed");
        let bits = "1 of 2 logits differ, the first at 1: 2 (40000000) and 2.0000002 (40000001)";
        check(&[1.0, 2.0], &[1.0, 2.0f32.next_up()], bits);
    }
}
