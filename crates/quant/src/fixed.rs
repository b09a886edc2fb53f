//! Activations in fixed point: what turns a product with quantised weights into exact integer arithmetic.
//!
//! Owns rule 1 of ARCHITECTURE.md. A row of `f32` is cut into blocks that share one scale; each value becomes an
//! integer, kept as one or two planes of `i8`. Knows nothing of weights: that both sides of a product are integers,
//! and so may be summed in any order, is all that the products rely on.

/// Values to a sub-block sum. The finest sub-block scale of any weight type covers 16 weights.
pub const SUB: usize = 16;

/// How precisely activations are kept. Part of the arithmetic: two runs agree in bits only if they agree in this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// Two planes, |q| <= 32639 = 127 * 256 + 127: an error of about 1e-5 of a block's largest value.
    #[default]
    A16,
    /// One plane, |q| <= 127: half the integer work, and the error that llama.cpp's CPU path has.
    A8,
}

impl Activations {
    /// The largest magnitude a value can take.
    pub const fn limit(self) -> f32 {
        match self {
            Activations::A16 => 32639.0,
            Activations::A8 => 127.0,
        }
    }

    /// `a16` or `a8`, as the command line and traces spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Activations::A16 => "a16",
            Activations::A8 => "a8",
        }
    }
}

/// Values that share a scale in a row of length `k`: 256, or 32 where `k` is no multiple of 256.
pub const fn block_len(k: usize) -> usize {
    if k.is_multiple_of(256) { 256 } else { 32 }
}

/// `T` rows of `K` activations in fixed point, `x ~ scale * (256 hi + lo)` (`A16`) or `scale * hi` (`A8`).
#[derive(Debug, Clone, Default)]
pub struct Fixed {
    /// `K`.
    k: usize,
    activations: Activations,
    /// `[T, K]`.
    hi: Vec<i8>,
    /// `[T, K]`; empty for `A8`.
    lo: Vec<i8>,
    /// Sums of `hi` over [`SUB`] values, `[T, K / SUB]`.
    sum_hi: Vec<i16>,
    /// Sums of `lo`, likewise; empty for `A8`.
    sum_lo: Vec<i16>,
    /// `[T, K / block_len(K)]`.
    scale: Vec<f32>,
}

/// One row of [`Fixed`]; the `lo` parts are empty for `A8`.
#[derive(Debug, Clone, Copy)]
pub struct FixedRow<'a> {
    /// High plane, `[K]`.
    pub hi: &'a [i8],
    /// Low plane, `[K]` or empty.
    pub lo: &'a [i8],
    /// Sub-block sums of the high plane, `[K / SUB]`.
    pub sum_hi: &'a [i16],
    /// Sub-block sums of the low plane, or empty.
    pub sum_lo: &'a [i16],
    /// Block scales, `[K / block_len(K)]`.
    pub scale: &'a [f32],
}

impl Fixed {
    /// Makes room for `rows` rows of `k` values (`k` a multiple of 32), to be filled by [`Fixed::rows_mut`].
    pub fn reset(&mut self, rows: usize, k: usize, activations: Activations) {
        assert!(k.is_multiple_of(32), "a fixed-point row has whole blocks of 32, not {k} values");
        let low = if activations == Activations::A16 { rows } else { 0 };
        self.k = k;
        self.activations = activations;
        self.hi.resize(rows * k, 0);
        self.lo.resize(low * k, 0);
        self.sum_hi.resize(rows * (k / SUB), 0);
        self.sum_lo.resize(low * (k / SUB), 0);
        self.scale.resize(rows * (k / block_len(k)), 0.0);
    }

    /// `K`.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Precision of the rows.
    pub fn activations(&self) -> Activations {
        self.activations
    }

    /// Row `t`.
    pub fn row(&self, t: usize) -> FixedRow<'_> {
        let (k, subs, blocks) = self.strides();
        let low = |n: usize| if self.lo.is_empty() { 0..0 } else { t * n..(t + 1) * n };
        FixedRow {
            hi: &self.hi[t * k..][..k],
            lo: &self.lo[low(k)],
            sum_hi: &self.sum_hi[t * subs..][..subs],
            sum_lo: &self.sum_lo[low(subs)],
            scale: &self.scale[t * blocks..][..blocks],
        }
    }

    /// The rows, to be filled with [`FixedRowMut::fill`], in order; they may be filled by different threads.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = FixedRowMut<'_>> {
        let (k, subs, blocks) = self.strides();
        let mut lo = self.lo.chunks_exact_mut(k);
        let mut sum_lo = self.sum_lo.chunks_exact_mut(subs);
        self.hi
            .chunks_exact_mut(k)
            .zip(self.sum_hi.chunks_exact_mut(subs))
            .zip(self.scale.chunks_exact_mut(blocks))
            .map(move |((hi, sum_hi), scale)| FixedRowMut {
                hi,
                lo: lo.next().unwrap_or_default(),
                sum_hi,
                sum_lo: sum_lo.next().unwrap_or_default(),
                scale,
            })
    }

    fn strides(&self) -> (usize, usize, usize) {
        (self.k, self.k / SUB, self.k / block_len(self.k))
    }
}

/// One row of [`Fixed`] while it is being filled.
#[derive(Debug)]
pub struct FixedRowMut<'a> {
    hi: &'a mut [i8],
    lo: &'a mut [i8],
    sum_hi: &'a mut [i16],
    sum_lo: &'a mut [i16],
    scale: &'a mut [f32],
}

impl FixedRowMut<'_> {
    /// Rounds `x` (`[K]`) into this row. Inlined into the caller so that its vector width applies; no operation here
    /// depends on that width.
    #[inline(always)]
    pub fn fill(&mut self, x: &[f32]) {
        let k = self.hi.len();
        let block = block_len(k);
        assert_eq!(x.len(), k);
        for (b, x) in x.chunks_exact(block).enumerate() {
            let hi = &mut self.hi[b * block..][..block];
            self.scale[b] = if self.lo.is_empty() {
                round_block(x, Activations::A8, |i, q| hi[i] = q as i8)
            } else {
                let lo = &mut self.lo[b * block..][..block];
                round_block(x, Activations::A16, |i, q| [hi[i], lo[i]] = split(q))
            };
        }
        sums(self.hi, self.sum_hi);
        sums(self.lo, self.sum_lo);
    }
}

/// Rounds one block to fixed point, handing each integer to `put`, and returns the scale.
///
/// `s = amax / M`, `q = rint(x * (M / amax))`, every operation IEEE single precision. A block whose scale would be
/// subnormal is zero. A block with a NaN or an infinity has a NaN scale and zero integers, so that whatever is
/// computed from it is NaN, on every device.
#[inline(always)]
pub fn round_block(x: &[f32], activations: Activations, mut put: impl FnMut(usize, i32)) -> f32 {
    // Magnitudes order as their bit patterns do, with NaN above infinity: an exact maximum in any order.
    let amax = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let limit = activations.limit();
    let scale = f32::from_bits(amax) / limit;
    if amax >= f32::INFINITY.to_bits() || scale < f32::MIN_POSITIVE {
        (0..x.len()).for_each(|i| put(i, 0));
        return if amax >= f32::INFINITY.to_bits() { f32::NAN } else { 0.0 };
    }
    let inverse = limit / f32::from_bits(amax);
    for (i, v) in x.iter().enumerate() {
        put(i, rint(v * inverse));
    }
    scale
}

/// Round to nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
#[inline(always)]
fn rint(x: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// `q = 256 hi + lo` with both halves signed, for |q| <= 32639.
#[inline(always)]
pub fn split(q: i32) -> [i8; 2] {
    let lo = q as i8;
    [((q - i32::from(lo)) >> 8) as i8, lo]
}

#[inline(always)]
fn sums(plane: &[i8], out: &mut [i16]) {
    for (sub, out) in plane.chunks_exact(SUB).zip(out) {
        *out = sub.iter().map(|&q| i16::from(q)).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(x: &[f32], activations: Activations) -> Fixed {
        let mut f = Fixed::default();
        f.reset(1, x.len(), activations);
        f.rows_mut().for_each(|mut row| row.fill(x));
        f
    }

    fn check(name: &str, x: &[f32]) {
        for activations in [Activations::A16, Activations::A8] {
            let f = fixed(x, activations);
            let row = f.row(0);
            let block = block_len(x.len());
            for (b, x) in x.chunks(block).enumerate() {
                let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                // Half a step, plus the rounding of the scale and of the product with its inverse (3 roundings).
                let bound =
                    f64::from(amax / activations.limit()) * 0.5 + f64::from(amax) * 3.0 * 2f64.powi(-24);
                for (i, &v) in x.iter().enumerate() {
                    let at = b * block + i;
                    let lo = row.lo.get(at).map_or(0, |&l| i32::from(l));
                    let plane = if row.lo.is_empty() { 1 } else { 256 };
                    let q = plane * i32::from(row.hi[at]) + lo;
                    let got = f64::from(row.scale[b]) * f64::from(q);
                    assert!(
                        (got - f64::from(v)).abs() <= bound,
                        "{name} {activations:?} [{at}]: {v} became {got}"
                    );
                }
            }
            for (s, sub) in row.hi.chunks(SUB).enumerate() {
                assert_eq!(
                    i32::from(row.sum_hi[s]),
                    sub.iter().map(|&q| i32::from(q)).sum::<i32>(),
                    "{name} sum {s}"
                );
            }
        }
    }

    #[test]
    fn rows_are_within_half_a_step() {
        let wave = |k: usize, scale: f32| (0..k).map(|i| (i as f32 * 0.37).sin() * scale).collect::<Vec<_>>();
        check("one block of 256", &wave(256, 3.0));
        check("blocks of 32", &wave(96, 1e-3));
        check("large", &wave(512, 1e30));
        check("extremes", &[1.0, -1.0].repeat(128));
        check("zeros", &[0.0; 256]);
        check("smallest scale", &wave(256, 5e-34));
    }

    #[test]
    fn a_tiny_block_is_zero() {
        let f = fixed(&[1e-36; 32], Activations::A16);
        assert_eq!((f.row(0).scale[0].to_bits(), f.row(0).hi[0], f.row(0).lo[0]), (0, 0, 0));
    }

    #[test]
    fn a_non_finite_value_poisons_its_block_only() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 512];
            x[300] = bad;
            let f = fixed(&x, Activations::A16);
            assert_eq!(f.row(0).scale[0], 1.0 / 32639.0);
            assert!(f.row(0).scale[1].is_nan(), "{bad}");
            assert_eq!(f.row(0).hi[300], 0);
        }
    }

    #[test]
    fn every_integer_splits_and_joins() {
        for q in -32639..=32639 {
            let [hi, lo] = split(q);
            assert_eq!(256 * i32::from(hi) + i32::from(lo), q);
        }
    }
}
