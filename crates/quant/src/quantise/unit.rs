//! Measuring a block in a power of two of its own, so that no fit overflows or vanishes.

use super::to_f16;
use half::f16;

/// The power of two by which a block is divided so that its largest magnitude lies in 1..2. Dividing changes no bit of
/// a value's significand; squares and sums of squares then stay well inside f32.
#[derive(Clone, Copy)]
pub(super) struct Unit(f64);

impl Unit {
    /// `None` where any scale in f16 would turn all of `x` into zeros. `x` is finite.
    pub(super) fn of(x: &[f32]) -> Option<Unit> {
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        if largest < f16::MIN_POSITIVE_SUBNORMAL.to_f32() / 2.0 {
            return None;
        }
        // A normal f32, so its exponent field says which power of two it is; f64 has another bias.
        let exponent = u64::from(largest.to_bits() >> 23) + 1023 - 127;
        Some(Unit(f64::from_bits(exponent << 52)))
    }

    /// `x` in units.
    pub(super) fn divide<const N: usize>(self, x: &[f32; N]) -> [f32; N] {
        let inverse = (1.0 / self.0) as f32; // at least 2^-127: exact
        x.map(|x| x * inverse)
    }

    /// What a block stores, as f32, for a value given in units: the nearest f16.
    pub(super) fn f16(self, value: f32) -> f32 {
        to_f16((f64::from(value) * self.0) as f32).to_f32()
    }

    /// `value` as it is after being stored, in units.
    pub(super) fn rounded(self, value: f32) -> f32 {
        (f64::from(self.f16(value)) / self.0) as f32
    }

    /// The step of a grid in units, made one that a block can store: the nearest f16, or among the subnormals the next
    /// one up in magnitude. Integers can shrink to meet a step that came out too large, but not grow past their range.
    pub(super) fn step(self, value: f32) -> f32 {
        let exact = (f64::from(value) * self.0) as f32;
        let nearest = to_f16(exact);
        let too_small =
            nearest.to_f32().abs() < exact.abs() && nearest.to_f32().abs() < f16::MIN_POSITIVE.to_f32();
        let stored = if too_small { f16::from_bits(nearest.to_bits() + 1) } else { nearest };
        (f64::from(stored.to_f32()) / self.0) as f32
    }
}
