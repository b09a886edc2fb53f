//! Super-blocks of the usual types opened with vectors. Byte for byte what [`quant::open_super`] gives, which serves
//! the other types; the layouts are drawn there.

use std::arch::x86_64::*;

use gguf::Dtype;
use quant::{SuperBlock, f16_at};

/// Opens a super-block with 512-bit vectors.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn open_avx512(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
    assert_eq!(block.len(), dtype.block_bytes());
    let load = |from: usize| {
        // SAFETY: 32 bytes inside the block: `from` is one of the layout's offsets below, all at most 176 - 32.
        _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(block.as_ptr().add(from).cast()) })
    };
    // The two halves of a vector take two fields of the same 32 bytes, each moved down by its own count.
    let fields = |bytes: __m512i, low: i16, high: i16, mask: i8| {
        let counts = _mm512_inserti64x4::<1>(_mm512_set1_epi16(low), _mm256_set1_epi16(high));
        _mm512_and_si512(_mm512_srlv_epi16(bytes, counts), _mm512_set1_epi8(mask))
    };
    let mut codes = [_mm512_setzero_si512(); 4];
    match dtype {
        Dtype::Q4K => {
            k_header(block, out);
            for g in 0..4 {
                codes[g] = fields(load(16 + 32 * g), 0, 4, 15);
            }
        }
        Dtype::Q5K => {
            k_header(block, out);
            let high = load(16);
            for g in 0..4 {
                let bit = 2 * g as i16;
                let fifth = _mm512_slli_epi16::<4>(fields(high, bit, bit + 1, 1));
                codes[g] = _mm512_or_si512(fields(load(48 + 32 * g), 0, 4, 15), fifth);
            }
        }
        Dtype::Q6K => {
            q6_k_header(block, out);
            for half in 0..2 {
                let high = load(128 + 32 * half);
                // SAFETY: 64 bytes from 0 or 64 of a block of 210.
                let low = unsafe { _mm512_loadu_si512(block.as_ptr().add(64 * half).cast()) };
                for s in 0..2 {
                    let four = fields(low, 4 * s as i16, 4 * s as i16, 15);
                    let two = _mm512_slli_epi16::<4>(fields(high, 4 * s as i16, 4 * s as i16 + 2, 3));
                    codes[2 * half + s] = _mm512_or_si512(four, two);
                }
            }
        }
        _ => return quant::open_super(dtype, block, out),
    }
    for (i, codes) in codes.into_iter().enumerate() {
        // SAFETY: 64 bytes from 64 i of 256.
        unsafe { _mm512_storeu_si512(out.codes.as_mut_ptr().add(64 * i).cast(), codes) };
    }
}

/// Opens a super-block with 256-bit vectors.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn open_avx2(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
    assert_eq!(block.len(), dtype.block_bytes());
    let load = |from: usize| {
        // SAFETY: 32 bytes inside the block: `from` is one of the layout's offsets below, all at most 176 - 32.
        unsafe { _mm256_loadu_si256(block.as_ptr().add(from).cast()) }
    };
    let field = |bytes: __m256i, shift: usize, mask: i8| {
        // A shift below 8 always fits.
        let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
        _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
    };
    let mut codes = [_mm256_setzero_si256(); 8];
    match dtype {
        Dtype::Q4K => {
            k_header(block, out);
            for (g, codes) in codes.iter_mut().enumerate() {
                *codes = field(load(16 + g / 2 * 32), g % 2 * 4, 15);
            }
        }
        Dtype::Q5K => {
            k_header(block, out);
            let high = load(16);
            for (g, codes) in codes.iter_mut().enumerate() {
                let fifth = _mm256_slli_epi16::<4>(field(high, g, 1));
                *codes = _mm256_or_si256(field(load(48 + g / 2 * 32), g % 2 * 4, 15), fifth);
            }
        }
        Dtype::Q6K => {
            q6_k_header(block, out);
            for (g, codes) in codes.iter_mut().enumerate() {
                let (half, s) = (g / 4, g % 4);
                let four = field(load(64 * half + s % 2 * 32), s / 2 * 4, 15);
                let two = _mm256_slli_epi16::<4>(field(load(128 + 32 * half), 2 * s, 3));
                *codes = _mm256_or_si256(four, two);
            }
        }
        _ => return quant::open_super(dtype, block, out),
    }
    for (i, codes) in codes.into_iter().enumerate() {
        // SAFETY: 32 bytes from 32 i of 256.
        unsafe { _mm256_storeu_si256(out.codes.as_mut_ptr().add(32 * i).cast(), codes) };
    }
}

/// `d`, `dmin` and the packed six-bit scales and minima of Q4_K and Q5_K, each written twice.
#[inline]
#[target_feature(enable = "avx2")]
fn k_header(block: &[u8], out: &mut SuperBlock) {
    let word = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"));
    let (scales, mins, mixed) = (word(4), word(8), word(12));
    let top = |w: u32| (w >> 2) & 0x3030_3030;
    let all = [
        scales & 0x3f3f_3f3f,
        (mixed & 0x0f0f_0f0f) | top(scales),
        mins & 0x3f3f_3f3f,
        ((mixed >> 4) & 0x0f0f_0f0f) | top(mins),
    ];
    // SAFETY: four words are 16 bytes.
    let all = unsafe { _mm_loadu_si128(all.as_ptr().cast()) };
    let twice = _mm_set_epi8(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    let (scale, min) = (_mm_shuffle_epi8(all, twice), _mm_shuffle_epi8(_mm_unpackhi_epi64(all, all), twice));
    // SAFETY: both arrays are 16 bytes.
    unsafe {
        _mm_storeu_si128(out.scale.as_mut_ptr().cast(), scale);
        _mm_storeu_si128(out.min.as_mut_ptr().cast(), min);
    }
    (out.bias, out.d, out.dmin) = (0, f16_at(block, 0), f16_at(block, 2));
}

#[inline(always)]
fn q6_k_header(block: &[u8], out: &mut SuperBlock) {
    let scale: [u8; 16] = block[192..208].try_into().expect("sixteen bytes");
    out.scale = scale.map(|s| s as i8);
    (out.min, out.bias, out.d, out.dmin) = ([0; 16], 32, f16_at(block, 208), 0.0);
}
