//! Super-blocks of 256 weights whose sub-blocks have integer scales and minima: Q2_K to Q6_K.

use super::{f16_at, planes, put_f16, six_bits, sized, sized_mut};
use gguf::Dtype;

/// A super-block opened into integers. With `j = i / 16`,
/// `w[i] = (d * scale[j]) * (codes[i] - bias) - dmin * min[j]`.
///
/// Because everything but `d` and `dmin` is an integer, a product with integer activations is exact within the
/// super-block whatever the order of summation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuperBlock {
    /// Unsigned codes: below 4, 8, 16, 32 and 64 for Q2_K to Q6_K.
    pub codes: [u8; 256],
    /// Scale of each 16 weights. Q2_K: 0..=15; Q3_K: -32..=31; Q4_K and Q5_K: 0..=63, in equal pairs since their
    /// sub-blocks are 32 long; Q6_K: -128..=127.
    pub scale: [i8; 16],
    /// Minimum of each 16 weights. Q2_K: 0..=15; Q4_K and Q5_K: 0..=63, in equal pairs; 0 in the others.
    pub min: [u8; 16],
    /// What code stands for zero: 4 for Q3_K, 32 for Q6_K, 0 in the others.
    pub bias: u8,
    /// Scale of the scales; an f16 in the file, so it may be negative, subnormal, or not finite in a damaged file.
    pub d: f32,
    /// Scale of the minima, likewise; 0 in Q3_K and Q6_K.
    pub dmin: f32,
}

impl Default for SuperBlock {
    fn default() -> Self {
        SuperBlock { codes: [0; 256], scale: [0; 16], min: [0; 16], bias: 0, d: 0.0, dmin: 0.0 }
    }
}

/// Opens one super-block of Q2_K, Q3_K, Q4_K, Q5_K or Q6_K.
///
/// # Panics
/// If `block` is not [`Dtype::block_bytes`] long or `dtype` is another type.
#[inline(always)]
pub fn open_super(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
    match dtype {
        Dtype::Q2K => open_q2_k(sized(block), out),
        Dtype::Q3K => open_q3_k(sized(block), out),
        Dtype::Q4K => open_q4_k(sized(block), out),
        Dtype::Q5K => open_q5_k(sized(block), out),
        Dtype::Q6K => open_q6_k(sized(block), out),
        _ => panic!("{dtype} has no super-blocks"),
    }
}

/// Closes a super-block: the inverse of [`open_super`], with `d` and `dmin` rounded to f16.
///
/// # Panics
/// As [`open_super`]. Integers outside the type's range lose their high bits; of each pair of scales and minima of
/// Q4_K and Q5_K the first is stored; `bias` is implied by the type.
pub fn close_super(dtype: Dtype, open: &SuperBlock, block: &mut [u8]) {
    match dtype {
        Dtype::Q2K => close_q2_k(open, sized_mut(block)),
        Dtype::Q3K => close_q3_k(open, sized_mut(block)),
        Dtype::Q4K => close_q4_k(open, sized_mut(block)),
        Dtype::Q5K => close_q5_k(open, sized_mut(block)),
        Dtype::Q6K => close_q6_k(open, sized_mut(block)),
        _ => panic!("{dtype} has no super-blocks"),
    }
}

#[inline(always)]
fn open_q2_k(block: &[u8; 84], out: &mut SuperBlock) {
    let scales: &[u8; 16] = sized(&block[..16]);
    out.scale = scales.map(|byte| (byte & 15) as i8);
    out.min = scales.map(|byte| byte >> 4);
    out.bias = 0;
    planes::read::<2, 32>(&block[16..80], 0, &mut out.codes);
    out.d = f16_at(block, 80);
    out.dmin = f16_at(block, 82);
}

fn close_q2_k(open: &SuperBlock, block: &mut [u8; 84]) {
    for (byte, (&scale, min)) in block.iter_mut().zip(open.scale.iter().zip(open.min)) {
        *byte = (scale as u8 & 15) | (min << 4);
    }
    planes::write::<2, 32>(&open.codes, 0, &mut block[16..80]);
    put_f16(block, 80, open.d);
    put_f16(block, 82, open.dmin);
}

/// A set bit of `hmask` means that nothing is subtracted, a clear one that 4 is: the same as a third bit of the code
/// with a bias of 4.
#[inline(always)]
fn open_q3_k(block: &[u8; 110], out: &mut SuperBlock) {
    out.bias = 4;
    planes::read::<2, 32>(&block[32..96], 0, &mut out.codes);
    planes::read::<1, 32>(&block[..32], 2, &mut out.codes);
    out.scale = six_bits::read_signed(sized(&block[96..108]));
    out.d = f16_at(block, 108);
    (out.min, out.dmin) = ([0; 16], 0.0);
}

fn close_q3_k(open: &SuperBlock, block: &mut [u8; 110]) {
    planes::write::<2, 32>(&open.codes, 0, &mut block[32..96]);
    planes::write::<1, 32>(&open.codes, 2, &mut block[..32]);
    block[96..108].copy_from_slice(&six_bits::write_signed(&open.scale));
    put_f16(block, 108, open.d);
}

#[inline(always)]
fn open_q4_k(block: &[u8; 144], out: &mut SuperBlock) {
    open_k_header(block, out);
    planes::read::<4, 32>(&block[16..], 0, &mut out.codes);
}

fn close_q4_k(open: &SuperBlock, block: &mut [u8; 144]) {
    close_k_header(open, block);
    planes::write::<4, 32>(&open.codes, 0, &mut block[16..]);
}

#[inline(always)]
fn open_q5_k(block: &[u8; 176], out: &mut SuperBlock) {
    open_k_header(block, out);
    planes::read::<4, 32>(&block[48..], 0, &mut out.codes);
    planes::read::<1, 32>(&block[16..48], 4, &mut out.codes);
}

fn close_q5_k(open: &SuperBlock, block: &mut [u8; 176]) {
    close_k_header(open, block);
    planes::write::<4, 32>(&open.codes, 0, &mut block[48..]);
    planes::write::<1, 32>(&open.codes, 4, &mut block[16..48]);
}

#[inline(always)]
fn open_q6_k(block: &[u8; 210], out: &mut SuperBlock) {
    out.bias = 32;
    planes::read::<4, 64>(&block[..128], 0, &mut out.codes);
    planes::read::<2, 32>(&block[128..192], 4, &mut out.codes);
    out.scale = sized::<16>(&block[192..208]).map(|scale| scale as i8);
    out.d = f16_at(block, 208);
    (out.min, out.dmin) = ([0; 16], 0.0);
}

fn close_q6_k(open: &SuperBlock, block: &mut [u8; 210]) {
    planes::write::<4, 64>(&open.codes, 0, &mut block[..128]);
    planes::write::<2, 32>(&open.codes, 4, &mut block[128..192]);
    block[192..208].copy_from_slice(&open.scale.map(|scale| scale as u8));
    put_f16(block, 208, open.d);
}

/// The first 16 bytes of Q4_K and Q5_K: `d`, `dmin`, and 12 bytes of packed scales and minima.
#[inline(always)]
fn open_k_header(block: &[u8], out: &mut SuperBlock) {
    out.bias = 0;
    out.d = f16_at(block, 0);
    out.dmin = f16_at(block, 2);
    let (scale, min) = six_bits::read_scales_mins(sized(&block[4..16]));
    for j in 0..16 {
        out.scale[j] = scale[j / 2] as i8;
        out.min[j] = min[j / 2];
    }
}

fn close_k_header(open: &SuperBlock, block: &mut [u8]) {
    put_f16(block, 0, open.d);
    put_f16(block, 2, open.dmin);
    let scale = std::array::from_fn(|j| open.scale[2 * j] as u8);
    let min = std::array::from_fn(|j| open.min[2 * j]);
    block[4..16].copy_from_slice(&six_bits::write_scales_mins(&scale, &min));
}
