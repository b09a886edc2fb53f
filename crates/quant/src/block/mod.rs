//! What the bytes of one block mean: blocks opened into integers and scales, and closed again.
//!
//! Owns the layouts. Must not know where a block comes from or what is computed with it. Layouts follow `block_q*`
//! of ggml-common.h; every number is little-endian. Where a field holds less than a byte for each weight it lies in
//! *planes* (see `planes`): `qs 2 bits, runs of 32` means that byte `l` of a run of 32 holds
//! weights `l`, `32 + l`, `64 + l` and `96 + l` of the run's 128 weights, the first in its lowest bits.
//!
//! | type | fields, in order: `offset name` |
//! |------|------|
//! | Q8_0 | `0 d f16`, `2 qs 32 x i8` |
//! | Q4_0 | `0 d f16`, `2 qs 4 bits, run of 16` |
//! | Q4_1 | `0 d f16`, `2 m f16`, `4 qs 4 bits, run of 16` |
//! | Q5_0 | `0 d f16`, `2 qh u32: bit i is bit 4 of weight i`, `6 qs 4 bits, run of 16` |
//! | Q5_1 | `0 d f16`, `2 m f16`, `4 qh u32`, `8 qs 4 bits, run of 16` |
//! | Q2_K | `0 scales 16 x (min << 4 \| scale)`, `16 qs 2 bits, runs of 32`, `80 d f16`, `82 dmin f16` |
//! | Q3_K | `0 hmask 1 bit, run of 32`, `32 qs 2 bits, runs of 32`, `96 scales 12 bytes`, `108 d f16` |
//! | Q4_K | `0 d f16`, `2 dmin f16`, `4 scales 12 bytes`, `16 qs 4 bits, runs of 32` |
//! | Q5_K | `0 d f16`, `2 dmin f16`, `4 scales 12 bytes`, `16 qh 1 bit, run of 32`, `48 qs 4 bits, runs of 32` |
//! | Q6_K | `0 ql 4 bits, runs of 64`, `128 qh 2 bits, runs of 32`, `192 scales 16 x i8`, `208 d f16` |
//!
//! The two packed `scales` fields are drawn at `six_bits`.

mod planes;
mod six_bits;
mod small;
mod super_block;

pub use small::{SmallBlock, close_small, open_small};
pub use super_block::{SuperBlock, close_super, open_super};

use half::f16;

/// The f16 at `offset`, subnormals, infinities and NaN included: exact.
///
/// A few integer operations and a product, where `half` would ask the processor for its features first: this runs
/// once for every block of every product.
#[inline(always)]
pub fn f16_at(block: &[u8], offset: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[offset], block[offset + 1]]));
    // Exponent and mantissa in f32's places, then 2^(127 - 15): right for normals, subnormals and zero.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
    let infinite = if bits & 0x7c00 == 0x7c00 { f32::INFINITY.to_bits() } else { 0 };
    f32::from_bits(magnitude.to_bits() | infinite | (bits & 0x8000) << 16)
}

/// Stores `value` at `offset`, rounded to the nearest f16, ties to even.
fn put_f16(block: &mut [u8], offset: usize, value: f32) {
    block[offset..offset + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// `block` as an array of its exact size, so that field offsets are checked at compile time.
#[inline(always)]
fn sized<const N: usize>(block: &[u8]) -> &[u8; N] {
    block.try_into().unwrap_or_else(|_| panic!("a block of {N} bytes expected, {} given", block.len()))
}

/// [`sized`] for writing.
fn sized_mut<const N: usize>(block: &mut [u8]) -> &mut [u8; N] {
    let given = block.len();
    block.try_into().unwrap_or_else(|_| panic!("a block of {N} bytes expected, {given} given"))
}
