//! Float operations in their written order (ARCHITECTURE.md, rules 2, 3, 4 and 6), as lane-wise scalar text that the
//! compiler widens. Nothing here may depend on a vector width.

/// `sum a b` by rule 2: partial sum `p` takes `k = p (mod W)` with fused multiply-adds in ascending `k`, then the
/// partial sums meet in a butterfly.
#[inline(always)]
pub(crate) fn dot<const W: usize>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut sums = [0f32; W];
    let (a, a_tail) = a.as_chunks::<W>();
    let (b, b_tail) = b.as_chunks::<W>();
    for (a, b) in a.iter().zip(b) {
        for p in 0..W {
            sums[p] = a[p].mul_add(b[p], sums[p]);
        }
    }
    for (p, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        sums[p] = a.mul_add(*b, sums[p]);
    }
    butterfly(sums)
}

/// Sums lanes `p` and `p xor W/2`, then `xor W/4`, ... as a warp's shuffles do; all lanes end equal, so one is kept.
#[inline(always)]
pub(crate) fn butterfly<const W: usize>(mut sums: [f32; W]) -> f32 {
    let mut w = W / 2;
    while w > 0 {
        for p in 0..w {
            sums[p] += sums[p + w];
        }
        w /= 2;
    }
    sums[0]
}

/// `sum x` in the order of [`dot`], without the products.
#[inline(always)]
pub(crate) fn sum<const W: usize>(x: &[f32]) -> f32 {
    let mut sums = [0f32; W];
    for x in x.chunks(W) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x;
        }
    }
    butterfly(sums)
}

/// Root mean square norm (Zhang and Sennrich 2019): `(x * (1 / sqrt(mean(x^2) + eps))) * weight`, in place.
#[inline(always)]
pub(crate) fn rms_norm<const W: usize>(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = dot::<W>(x, x) / x.len() as f32;
    let r = 1.0 / (mean + eps).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x = (*x * r) * w;
    }
}

/// Rotates a head half-split: pair `i` is `(x[i], x[i + HD/2])`.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], table: &[[f32; 2]]) {
    let (a, b) = head.split_at_mut(table.len());
    for ((a, b), [cos, sin]) in a.iter_mut().zip(b).zip(table) {
        let (x, y) = (*a, *b);
        *a = x.mul_add(*cos, -(y * sin));
        *b = y.mul_add(*cos, x * sin);
    }
}

/// SwiGLU (Shazeer 2020): `out = silu(gate) * up`.
#[inline(always)]
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
        *out = model::math::silu(*g) * u;
    }
}

/// `softmax(logits)` in place: exact maximum, `exp`, the sum of rule 2 over 32 partial sums, division.
#[inline(always)]
pub(crate) fn softmax(x: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    x.iter_mut().for_each(|v| *v = model::math::exp(*v - max));
    let total = sum::<32>(x);
    x.iter_mut().for_each(|v| *v /= total);
}

/// The smallest divisor when the chosen experts' probabilities are renormalised: 2^-14, the smallest normal f16.
/// The best of `E` probabilities is at least `1 / E`, so it only ever meets a row that is not finite.
const RENORMALISE_FLOOR: f32 = 6.103_515_6e-5;

/// Chooses `ids.len()` experts by probability, then by lower index; a NaN ranks below every number, so the ids are
/// valid and distinct whatever the probabilities are. Writes ids and weights in rank order.
pub(crate) fn choose(
    probabilities: &[f32],
    renormalise: bool,
    scale: f32,
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let rank = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    for r in 0..ids.len() {
        let mut best: Option<usize> = None;
        for (e, &p) in probabilities.iter().enumerate() {
            if ids[..r].contains(&(e as u32)) {
                continue;
            }
            if best.is_none_or(|b| rank(p) > rank(probabilities[b])) {
                best = Some(e);
            }
        }
        let best = best.expect("no more experts are chosen than there are");
        (ids[r], weights[r]) = (best as u32, probabilities[best]);
    }
    if renormalise {
        let total = weights.iter().fold(0f32, |s, w| s + w);
        let divisor = if total > RENORMALISE_FLOOR { total } else { RENORMALISE_FLOOR };
        weights.iter_mut().for_each(|w| *w /= divisor);
    }
    weights.iter_mut().for_each(|w| *w *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_follow_the_written_order() {
        // 2^24 + 1 is lost when added alone but kept when the small terms meet first: the order shows.
        let mut x = vec![1.0f32; 64];
        x[0] = 16_777_216.0;
        let ones = vec![1.0f32; 64];
        // Partial 0 is 2^24 + 1 -> 2^24; the butterfly then adds 2 (lane 16), 4, 8, 16, 32 to it.
        assert_eq!(dot::<32>(&x, &ones), 16_777_216.0 + 62.0);
        assert_eq!(sum::<32>(&x), 16_777_216.0 + 62.0);
        // One partial sum: every 1 is lost.
        assert_eq!(dot::<1>(&x, &ones), 16_777_216.0);
    }

    #[test]
    fn experts_are_chosen_by_value_then_index() {
        let check = |p: &[f32], want: &[u32]| {
            let (mut ids, mut weights) = (vec![9; want.len()], vec![0.0; want.len()]);
            choose(p, true, 1.0, &mut ids, &mut weights);
            assert_eq!(ids, want, "{p:?}");
            weights
        };
        assert_eq!(check(&[0.1, 0.4, 0.4, 0.1], &[1, 2]), [0.5, 0.5]);
        assert_eq!(check(&[0.25; 4], &[0, 1, 2]), [1.0 / 3.0; 3]);
        check(&[0.0; 4], &[0, 1]);
        // The failure that made another engine repeat one expert and read past the end.
        let weights = check(&[f32::NAN; 4], &[0, 1, 2, 3]);
        assert!(weights.iter().all(|w| w.is_nan()));
        check(&[f32::NAN, 0.3, f32::NAN, 0.7], &[3, 1, 0, 2]);
    }
}
