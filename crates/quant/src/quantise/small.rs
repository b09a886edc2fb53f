//! Blocks of 32 with a chosen float scale: Q4_0, Q4_1, Q5_0, Q5_1.

use super::fit::{self, Codes, Line};
use super::unit::Unit;
use crate::block::SmallBlock;

/// `w = d * code` with codes `-half..half`.
pub(super) fn symmetric(x: &[f32; 32], half: f32) -> SmallBlock {
    block(x, Codes { lo: -half, hi: half - 1.0 }, |x| fit::symmetric(half, x, &fit::weights(x)))
}

/// `w = d * code + m` with codes `0..=hi`.
pub(super) fn affine(x: &[f32; 32], hi: f32) -> SmallBlock {
    block(x, Codes { lo: 0.0, hi }, |x| fit::affine(hi, true, x, &fit::weights(x)))
}

/// The block for the line that `fit` finds; codes are taken with the scales as they are stored.
fn block(x: &[f32; 32], codes: Codes, fit: impl Fn(&[f32; 32]) -> Line) -> SmallBlock {
    let Some(unit) = Unit::of(x) else { return SmallBlock::default() };
    let x = unit.divide(x);
    let line = fit(&x);
    // A minimum of 0 is stored as +0, whatever its sign here.
    let (d, m) = (unit.f16(unit.step(line.s)), 0.0 - unit.f16(line.m));
    let stored = Line { s: unit.step(line.s), m: unit.rounded(line.m) };
    SmallBlock { codes: stored.codes(codes, &x).map(|code| code as i8), d, m }
}
