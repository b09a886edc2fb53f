//! Blocks of 32 weights with one float scale, and for some types a float minimum: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

use super::{f16_at, planes, put_f16, sized, sized_mut};
use gguf::Dtype;

/// A block of 32 weights opened into integers: `w[i] = d * codes[i] + m`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SmallBlock {
    /// Q8_0: -128..=127; Q4_0: -8..=7; Q5_0: -16..=15; Q4_1: 0..=15; Q5_1: 0..=31.
    pub codes: [i8; 32],
    /// Scale; an f16 in the file, so it may be negative, subnormal, or not finite in a damaged file.
    pub d: f32,
    /// Weight of code 0: an f16 in Q4_1 and Q5_1, 0 in the others.
    pub m: f32,
}

impl Default for SmallBlock {
    fn default() -> Self {
        SmallBlock { codes: [0; 32], d: 0.0, m: 0.0 }
    }
}

/// Opens one block of Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1.
///
/// # Panics
/// If `block` is not [`Dtype::block_bytes`] long or `dtype` is another type.
#[inline(always)]
pub fn open_small(dtype: Dtype, block: &[u8], out: &mut SmallBlock) {
    out.d = f16_at(block, 0);
    out.m = if has_minimum(dtype) { f16_at(block, 2) } else { 0.0 };
    match dtype {
        Dtype::Q8_0 => out.codes = sized::<32>(&block[2..]).map(|byte| byte as i8),
        Dtype::Q4_0 => out.codes = nibbles(sized::<18>(block), 2).map(|code| code as i8 - 8),
        Dtype::Q4_1 => out.codes = nibbles(sized::<20>(block), 4).map(|code| code as i8),
        Dtype::Q5_0 => out.codes = five_bits(sized::<22>(block), 2).map(|code| code as i8 - 16),
        Dtype::Q5_1 => out.codes = five_bits(sized::<24>(block), 4).map(|code| code as i8),
        _ => panic!("{dtype} has no blocks of 32"),
    }
}

/// Closes a block: the inverse of [`open_small`], with `d` and `m` rounded to f16.
///
/// # Panics
/// As [`open_small`]. Codes outside the type's range lose their high bits.
pub fn close_small(dtype: Dtype, open: &SmallBlock, block: &mut [u8]) {
    match dtype {
        Dtype::Q8_0 => sized_mut::<34>(block)[2..].copy_from_slice(&open.codes.map(|code| code as u8)),
        Dtype::Q4_0 => put_nibbles(&open.codes.map(|code| (code + 8) as u8), sized_mut::<18>(block), 2),
        Dtype::Q4_1 => put_nibbles(&open.codes.map(|code| code as u8), sized_mut::<20>(block), 4),
        Dtype::Q5_0 => put_five_bits(&open.codes.map(|code| (code + 16) as u8), sized_mut::<22>(block), 2),
        Dtype::Q5_1 => put_five_bits(&open.codes.map(|code| code as u8), sized_mut::<24>(block), 4),
        _ => panic!("{dtype} has no blocks of 32"),
    }
    put_f16(block, 0, open.d);
    if has_minimum(dtype) {
        put_f16(block, 2, open.m);
    }
}

/// Whether a block of `dtype` stores the weight of code 0.
#[inline(always)]
pub(crate) fn has_minimum(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Q4_1 | Dtype::Q5_1)
}

/// 32 unsigned nibbles: one run of 16 bytes from `offset`.
#[inline(always)]
fn nibbles(block: &[u8], offset: usize) -> [u8; 32] {
    let mut codes = [0; 32];
    planes::read::<4, 16>(&block[offset..offset + 16], 0, &mut codes);
    codes
}

/// 32 unsigned five-bit codes: fifth bits in a `u32` at `offset`, then nibbles.
#[inline(always)]
fn five_bits(block: &[u8], offset: usize) -> [u8; 32] {
    let mut codes = nibbles(block, offset + 4);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((block[offset + i / 8] >> (i % 8)) & 1) << 4;
    }
    codes
}

fn put_nibbles(codes: &[u8; 32], block: &mut [u8], offset: usize) {
    planes::write::<4, 16>(codes, 0, &mut block[offset..offset + 16]);
}

fn put_five_bits(codes: &[u8; 32], block: &mut [u8], offset: usize) {
    put_nibbles(codes, block, offset + 4);
    for (byte, codes) in block[offset..offset + 4].iter_mut().zip(codes.as_chunks::<8>().0) {
        *byte = codes.iter().rev().fold(0, |bits, code| bits << 1 | ((code >> 4) & 1));
    }
}
