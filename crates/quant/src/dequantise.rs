//! Rows of bytes into f32, in the float operations of the reference: the oracle's and the tests' view of a tensor.

use crate::block::{SmallBlock, SuperBlock, open_small, open_super};
use gguf::Dtype;
use half::{bf16, f16};

/// Turns `bytes`, whole blocks of `dtype`, into f32.
///
/// Each weight takes the operations of `gguf.quants.dequantize` (the `gguf` Python package) in the same order, each
/// rounded to f32 and none fused, so that the results are equal bit for bit: `d * code` or `d * code + m` for blocks
/// of 32, `(d * scale) * code - dmin * min` for super-blocks.
///
/// # Panics
/// If `bytes` does not hold exactly `out.len()` weights.
pub fn dequantise_row(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        dtype.row_bytes(out.len()),
        Some(bytes.len()),
        "{} weights do not fill {} bytes of {dtype}",
        out.len(),
        bytes.len()
    );
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F16 => each(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        // The upper half of an f32, taken as it is: a conversion could quieten a NaN.
        Dtype::BF16 => {
            each(bytes, out, |bytes| f32::from_bits(u32::from(bf16::from_le_bytes(bytes).to_bits()) << 16))
        }
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => small(dtype, bytes, out, |block, code| block.d * code),
        Dtype::Q4_1 | Dtype::Q5_1 => small(dtype, bytes, out, |block, code| block.d * code + block.m),
        Dtype::Q2K | Dtype::Q3K | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => super_blocks(dtype, bytes, out),
    }
}

/// Float types: `N` bytes a weight.
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = decode(bytes);
    }
}

/// Types with blocks of 32; `weight` is given the code as f32.
fn small(dtype: Dtype, bytes: &[u8], out: &mut [f32], weight: impl Fn(&SmallBlock, f32) -> f32) {
    let mut open = SmallBlock::default();
    for (bytes, out) in bytes.chunks_exact(dtype.block_bytes()).zip(out.as_chunks_mut::<32>().0) {
        open_small(dtype, bytes, &mut open);
        for (out, &code) in out.iter_mut().zip(&open.codes) {
            *out = weight(&open, f32::from(code));
        }
    }
}

/// Types with super-blocks. Where a type has no minima the subtrahend is +0, which changes no bit, not even of -0.
fn super_blocks(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let mut open = SuperBlock::default();
    for (bytes, out) in bytes.chunks_exact(dtype.block_bytes()).zip(out.as_chunks_mut::<256>().0) {
        open_super(dtype, bytes, &mut open);
        let bias = i16::from(open.bias);
        let sub_blocks = out.as_chunks_mut::<16>().0.iter_mut().zip(open.codes.as_chunks::<16>().0);
        for (j, (out, codes)) in sub_blocks.enumerate() {
            let scale = open.d * f32::from(open.scale[j]);
            let min = open.dmin * f32::from(open.min[j]);
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(i16::from(code) - bias) - min;
            }
        }
    }
}
