//! Weighted least squares on a grid of integers: the maths under every type with a choice of scale.
//!
//! Given values `x` with weights `w`, find a scale `s` and a minimum `m >= 0` that make
//! `E = sum w (x - (s c - m))^2` small, where each code is the best one: `c = rint((x + m) / s)` within its range.
//! For fixed codes E is quadratic in `(s, m)` and has its minimum in closed form; for a fixed `(s, m)` the codes are
//! found by rounding. E has many local minima, a small step of `s` apart, so a grid of scales is tried around the one that
//! maps the range of the values onto the range of codes.

/// The range of codes, as f32.
#[derive(Clone, Copy, Debug)]
pub(super) struct Codes {
    /// Smallest code.
    pub lo: f32,
    /// Largest code.
    pub hi: f32,
}

/// What a code stands for: `s c - m`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Line {
    /// Scale: 0 where one value will do for all.
    pub s: f32,
    /// Minimum, its sign turned: what is subtracted.
    pub m: f32,
}

impl Line {
    /// The best codes for `x`.
    pub(super) fn codes<const N: usize>(self, codes: Codes, x: &[f32; N]) -> [f32; N] {
        let inverse = if self.s == 0.0 { 0.0 } else { 1.0 / self.s };
        let mut out = [0.0; N];
        for (out, x) in out.iter_mut().zip(x) {
            *out = rint(((x + self.m) * inverse).max(codes.lo).min(codes.hi));
        }
        out
    }

    /// `sum w (x - (s c - m))^2` with the best codes.
    pub(super) fn error<const N: usize>(self, codes: Codes, x: &[f32; N], w: &[f32; N]) -> f32 {
        let c = self.codes(codes, x);
        sum::<N>(|i| {
            let off = x[i] + self.m - self.s * c[i];
            w[i] * (off * off)
        })
    }
}

/// How much the error of each value counts: its magnitude plus the sub-block's root mean square. Large weights carry
/// more of a product than their number says, but a weight of zero must not turn into anything.
pub(super) fn weights<const N: usize>(x: &[f32; N]) -> [f32; N] {
    let rms = (sum::<N>(|i| x[i] * x[i]) / N as f32).sqrt(); // N is 16 or 32: exact
    x.map(|x| rms + x.abs())
}

/// The best line through zero, `m = 0`, for codes `-half..half`; `s` may be negative, for the range has one more
/// negative code.
pub(super) fn symmetric<const N: usize>(half: f32, x: &[f32; N], w: &[f32; N]) -> Line {
    let codes = Codes { lo: -half, hi: half - 1.0 };
    let largest = x.iter().fold(0.0f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
    let mut best = Line { s: 0.0, m: 0.0 };
    let mut best_gain = 0.0;
    if largest == 0.0 {
        return best;
    }
    for step in -9..=9 {
        // From the scale that wastes a code to the one that clips the largest value by almost one.
        let s = -largest / (half + 0.1 * step as f32);
        let c = Line { s, m: 0.0 }.codes(codes, x);
        let xc = sum::<N>(|i| w[i] * x[i] * c[i]);
        let cc = sum::<N>(|i| w[i] * c[i] * c[i]);
        // With s = xc / cc the error is sum w x^2 - xc^2 / cc.
        if cc > 0.0 && xc * xc > best_gain * cc {
            best_gain = xc * xc / cc;
            best.s = xc / cc;
        }
    }
    best
}

/// The best line for codes `0..=hi`. `m` is at least 0 unless `free`.
pub(super) fn affine<const N: usize>(hi: f32, free: bool, x: &[f32; N], w: &[f32; N]) -> Line {
    let codes = Codes { lo: 0.0, hi };
    let (mut low, mut high) = (x[0], x[0]);
    for &x in x {
        low = low.min(x);
        high = high.max(x);
    }
    if !free {
        low = low.min(0.0);
    }
    let mut best = Line { s: (high - low) / hi, m: -low };
    if high == low {
        return best;
    }
    let mut best_error = best.error(codes, x, w);
    let ww = sum::<N>(|i| w[i]);
    let wx = sum::<N>(|i| w[i] * x[i]);
    for step in -10..=10 {
        let s = (high - low) / (hi + 0.1 * step as f32);
        let c = Line { s, m: -low }.codes(codes, x);
        let wc = sum::<N>(|i| w[i] * c[i]);
        let cc = sum::<N>(|i| w[i] * c[i] * c[i]);
        let xc = sum::<N>(|i| w[i] * x[i] * c[i]);
        let determinant = ww * cc - wc * wc;
        if determinant <= 0.0 {
            continue;
        }
        let mut line = Line { s: (ww * xc - wx * wc) / determinant, m: (wc * xc - wx * cc) / determinant };
        if line.m < 0.0 && !free {
            line = Line { s: xc / cc, m: 0.0 };
        }
        let error = line.error(codes, x, w);
        if error < best_error {
            (best, best_error) = (line, error);
        }
    }
    best
}

/// `sum f(i)` over `0..N` in eight partial sums, partial `p` over `i = p (mod 8)`, so that it vectorises and has one
/// order everywhere. `N` is a multiple of 8.
pub(super) fn sum<const N: usize>(f: impl Fn(usize) -> f32) -> f32 {
    let mut partial = [0.0f32; 8];
    for base in (0..N).step_by(8) {
        for (p, partial) in partial.iter_mut().enumerate() {
            *partial += f(base + p);
        }
    }
    let [a, b, c, d, e, f, g, h] = partial;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The nearest integer, ties to even, for `|x| < 2^22`: adding 1.5 * 2^23 leaves no bits for a fraction. Unlike
/// `round_ties_even` this needs no SSE4.1 to be fast.
pub(super) fn rint(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}
