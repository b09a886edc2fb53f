//! The elementary functions of the arithmetic, written once for every backend.
//!
//! Nothing here comes from libm: a GPU, an AVX-512 core and a scalar core must give the same bits, so each function
//! is a fixed sequence of IEEE operations (ARCHITECTURE.md, rule 4). A fused multiply-add happens where `mul_add`
//! stands and nowhere else. The CUDA twin repeats these sequences; the CPU backend compiles this text for each of its
//! vector widths, which is why everything here is inlined always.

/// log2(e) rounded to f32, and what the rounding left over.
pub const LOG2_E: [f32; 2] = [f32::from_bits(0x3fb8_aa3b), 1.925_963e-8];

/// 2^r = 1 + r (C0 + r (C1 + ...)) for |r| <= 1/2: minimax fit of degree 6, relative error 2.0e-9 before rounding.
/// The leading 1 is exact, so an integer argument gives an exact power of two.
#[expect(
    clippy::approx_constant,
    reason = "fitted: that the first is ln 2 to seven digits is the fit's doing"
)]
pub const EXP2_POLY: [f32; 6] =
    [0.693_147_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_887_4, 0.000_153_533_62];

/// Arguments of [`exp2`] are clamped to this range; outside it the result is 0 or infinity anyway.
pub const EXP2_RANGE: [f32; 2] = [-160.0, 129.0];

/// Arguments of [`exp`] are clamped to this range; outside it the result is 0 or infinity anyway.
pub const EXP_RANGE: [f32; 2] = [-110.0, 89.5];

/// 2^x. NaN gives NaN; underflow is gradual; relative error below 1.2 units in the last place.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let x = clamp(x, EXP2_RANGE);
    let n = x.round_ties_even();
    scale(poly(x - n), n)
}

/// e^x, as 2^(x log2 e) with the product carried to twice the precision. NaN gives NaN; underflow is gradual.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = clamp(x, EXP_RANGE);
    let n = (x * LOG2_E[0]).round_ties_even();
    let r = x.mul_add(LOG2_E[1], x.mul_add(LOG2_E[0], -n));
    scale(poly(r), n)
}

/// x / (1 + e^-x), the gate of SwiGLU (Shazeer 2020).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Comparisons written so that a NaN passes through unchanged, as the vector minimum and maximum do.
#[inline(always)]
fn clamp(x: f32, [low, high]: [f32; 2]) -> f32 {
    let x = if high < x { high } else { x };
    if low > x { low } else { x }
}

#[inline(always)]
fn poly(r: f32) -> f32 {
    let c = EXP2_POLY;
    let p = r.mul_add(c[5], c[4]);
    let p = r.mul_add(p, c[3]);
    let p = r.mul_add(p, c[2]);
    let p = r.mul_add(p, c[1]);
    let p = r.mul_add(p, c[0]);
    r.mul_add(p, 1.0)
}

/// p * 2^n in two halves, so that neither factor leaves the exponent range and a subnormal result is rounded once.
#[inline(always)]
fn scale(p: f32, n: f32) -> f32 {
    // `as` saturates and sends NaN to 0; p is NaN then, and NaN times anything is NaN.
    let n = n as i32;
    let half = n >> 1;
    (p * pow2(half)) * pow2(n - half)
}

/// 2^n for -126 <= n <= 127.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units in the last place, with subnormals spaced as the smallest normals are.
    fn ulps(got: f32, want: f64) -> f64 {
        let unit = (want.abs() as f32).max(f32::MIN_POSITIVE);
        let unit = f64::from(f32::from_bits(unit.to_bits() + 1)) - f64::from(unit);
        (f64::from(got) - want).abs() / unit
    }

    fn check(name: &str, f: fn(f32) -> f32, reference: fn(f64) -> f64, bound: f64) {
        let mut worst = (0.0, 0.0f32);
        // Every 977th float of the range (977 is prime: all exponents and many mantissas are met).
        for bits in (0..=u32::MAX).step_by(977) {
            let x = f32::from_bits(bits);
            if !x.is_finite() || !(-104.0..=88.7).contains(&x) {
                continue;
            }
            let e = ulps(f(x), reference(f64::from(x)));
            if e > worst.0 {
                worst = (e, x);
            }
        }
        assert!(worst.0 <= bound, "{name}({}) is off by {} ulp", worst.1, worst.0);
        assert!(worst.0 > 0.4, "{name}: an error of {} ulp means the check compares nothing", worst.0);
    }

    #[test]
    fn exponentials_are_accurate() {
        // A result is rounded twice (polynomial, scaling of subnormals) after a fit error of 2e-9 = 0.03 ulp.
        check("exp", exp, f64::exp, 1.2);
        check("exp2", exp2, f64::exp2, 1.2);
    }

    #[test]
    fn special_values() {
        for (f, name) in [(exp as fn(f32) -> f32, "exp"), (exp2, "exp2")] {
            assert!(f(f32::NAN).is_nan(), "{name}(NaN)");
            assert_eq!(f(f32::INFINITY), f32::INFINITY, "{name}(inf)");
            assert_eq!(f(f32::NEG_INFINITY).to_bits(), 0, "{name}(-inf)");
            assert_eq!(f(0.0), 1.0, "{name}(0)");
            assert_eq!(f(-0.0), 1.0, "{name}(-0)");
            assert_eq!(f(f32::MIN_POSITIVE), 1.0, "{name}(tiny)");
        }
        assert_eq!(exp(88.8), f32::INFINITY);
        assert_eq!(exp(-104.1), 0.0);
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(-200.0), 0.0);
        assert_eq!(silu(100.0), 100.0);
    }

    #[test]
    fn integer_powers_of_two_are_exact() {
        for n in -149..=127 {
            assert_eq!(exp2(n as f32), 2f64.powi(n) as f32, "2^{n}");
        }
    }
}
