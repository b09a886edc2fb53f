//! Super-blocks of the usual types opened with vectors: the integers that [`quant::open_super`] gives, which serves
//! the other types; the layouts are drawn there.

use std::arch::x86_64::*;

use gguf::Dtype;
use quant::{SuperBlock, f16_at};

/// A type whose super-blocks open straight into 512-bit registers.
///
/// # Safety
/// The methods need AVX-512 (`codes`) or AVX2. They check the block's length themselves.
pub(super) trait Wide {
    /// What code stands for zero.
    const BIAS: u8;
    /// The 256 codes in order.
    unsafe fn codes(block: &[u8]) -> [__m512i; 4];
    /// Scale and minimum of each 16 weights, `i8` and `u8`; the minimum is zero for biased types.
    unsafe fn scales(block: &[u8]) -> (__m128i, __m128i);
    /// `d` and `dmin` as their f16 bits; `dmin` is zero for biased types.
    fn halves(block: &[u8]) -> u32;
}

pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

/// The same 32 bytes, from `from` on, in both halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn both(block: &[u8], from: usize) -> __m512i {
    let bytes: &[u8; 32] = block[from..from + 32].try_into().expect("32 bytes");
    // SAFETY: 32 bytes.
    _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

/// The two halves take two fields of their bytes, each moved down by its own count.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn fields(bytes: __m512i, low: i16, high: i16, mask: i8) -> __m512i {
    let counts = _mm512_inserti64x4::<1>(_mm512_set1_epi16(low), _mm256_set1_epi16(high));
    _mm512_and_si512(_mm512_srlv_epi16(bytes, counts), _mm512_set1_epi8(mask))
}

impl Wide for Q4K {
    const BIAS: u8 = 0;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn codes(block: &[u8]) -> [__m512i; 4] {
        let mut codes = [_mm512_setzero_si512(); 4];
        for (g, codes) in codes.iter_mut().enumerate() {
            *codes = fields(both(block, 16 + 32 * g), 0, 4, 15);
        }
        codes
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales(block: &[u8]) -> (__m128i, __m128i) {
        six_bits(block)
    }

    #[inline(always)]
    fn halves(block: &[u8]) -> u32 {
        word(block, 0)
    }
}

impl Wide for Q5K {
    const BIAS: u8 = 0;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn codes(block: &[u8]) -> [__m512i; 4] {
        let high = both(block, 16);
        let mut codes = [_mm512_setzero_si512(); 4];
        for (g, codes) in codes.iter_mut().enumerate() {
            let bit = 2 * g as i16;
            let fifth = _mm512_slli_epi16::<4>(fields(high, bit, bit + 1, 1));
            *codes = _mm512_or_si512(fields(both(block, 48 + 32 * g), 0, 4, 15), fifth);
        }
        codes
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales(block: &[u8]) -> (__m128i, __m128i) {
        six_bits(block)
    }

    #[inline(always)]
    fn halves(block: &[u8]) -> u32 {
        word(block, 0)
    }
}

impl Wide for Q6K {
    const BIAS: u8 = 32;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn codes(block: &[u8]) -> [__m512i; 4] {
        let mut codes = [_mm512_setzero_si512(); 4];
        for (g, codes) in codes.iter_mut().enumerate() {
            let (half, s) = (g / 2, 4 * (g % 2) as i16);
            let low: &[u8; 64] = block[64 * half..64 * half + 64].try_into().expect("64 bytes");
            // SAFETY: 64 bytes.
            let low = unsafe { _mm512_loadu_si512(low.as_ptr().cast()) };
            let two = _mm512_slli_epi16::<4>(fields(both(block, 128 + 32 * half), s, s + 2, 3));
            *codes = _mm512_or_si512(fields(low, s, s, 15), two);
        }
        codes
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales(block: &[u8]) -> (__m128i, __m128i) {
        let scales: &[u8; 16] = block[192..208].try_into().expect("16 bytes");
        // SAFETY: 16 bytes.
        unsafe { (_mm_loadu_si128(scales.as_ptr().cast()), _mm_setzero_si128()) }
    }

    #[inline(always)]
    fn halves(block: &[u8]) -> u32 {
        u32::from(u16::from_le_bytes([block[208], block[209]]))
    }
}

#[inline(always)]
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"))
}

/// The packed six-bit scales and minima of Q4_K and Q5_K, each written twice.
#[inline]
#[target_feature(enable = "avx2")]
fn six_bits(block: &[u8]) -> (__m128i, __m128i) {
    let (scales, mins, mixed) = (word(block, 4), word(block, 8), word(block, 12));
    let all = [
        scales & 0x3f3f_3f3f,
        (mixed & 0x0f0f_0f0f) | ((scales >> 2) & 0x3030_3030),
        mins & 0x3f3f_3f3f,
        ((mixed >> 4) & 0x0f0f_0f0f) | ((mins >> 2) & 0x3030_3030),
    ];
    // SAFETY: four words are 16 bytes.
    let all = unsafe { _mm_loadu_si128(all.as_ptr().cast()) };
    let twice = _mm_set_epi8(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    (_mm_shuffle_epi8(all, twice), _mm_shuffle_epi8(_mm_unpackhi_epi64(all, all), twice))
}

/// Everything but the codes.
#[inline]
#[target_feature(enable = "avx2")]
fn header<T: Wide>(block: &[u8], out: &mut SuperBlock) {
    // SAFETY: this is compiled for AVX2; both arrays are 16 bytes.
    unsafe {
        let (scale, min) = T::scales(block);
        _mm_storeu_si128(out.scale.as_mut_ptr().cast(), scale);
        _mm_storeu_si128(out.min.as_mut_ptr().cast(), min);
    }
    let halves = T::halves(block).to_le_bytes();
    (out.bias, out.d, out.dmin) = (T::BIAS, f16_at(&halves, 0), f16_at(&halves, 2));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn open_wide<T: Wide>(block: &[u8], out: &mut SuperBlock) {
    header::<T>(block, out);
    // SAFETY: this is compiled for AVX-512.
    let codes = unsafe { T::codes(block) };
    for (i, codes) in codes.into_iter().enumerate() {
        // SAFETY: 64 bytes from 64 i of 256.
        unsafe { _mm512_storeu_si512(out.codes.as_mut_ptr().add(64 * i).cast(), codes) };
    }
}

/// Opens a super-block with 512-bit vectors.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn open_avx512(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
    match dtype {
        Dtype::Q4K => open_wide::<Q4K>(block, out),
        Dtype::Q5K => open_wide::<Q5K>(block, out),
        Dtype::Q6K => open_wide::<Q6K>(block, out),
        _ => quant::open_super(dtype, block, out),
    }
}

/// Opens a super-block with 256-bit vectors.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn open_avx2(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
    assert_eq!(block.len(), dtype.block_bytes());
    let load = |from: usize| {
        assert!(from + 32 <= block.len());
        // SAFETY: 32 bytes inside the block, as just asserted.
        unsafe { _mm256_loadu_si256(block.as_ptr().add(from).cast()) }
    };
    let field = |bytes: __m256i, shift: usize, mask: i8| {
        // A shift below 8 always fits.
        let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
        _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
    };
    let codes: [__m256i; 8] = match dtype {
        Dtype::Q4K => {
            header::<Q4K>(block, out);
            std::array::from_fn(|g| field(load(16 + g / 2 * 32), g % 2 * 4, 15))
        }
        Dtype::Q5K => {
            header::<Q5K>(block, out);
            let high = load(16);
            std::array::from_fn(|g| {
                let fifth = _mm256_slli_epi16::<4>(field(high, g, 1));
                _mm256_or_si256(field(load(48 + g / 2 * 32), g % 2 * 4, 15), fifth)
            })
        }
        Dtype::Q6K => {
            header::<Q6K>(block, out);
            std::array::from_fn(|g| {
                let (half, s) = (g / 4, g % 4);
                let two = _mm256_slli_epi16::<4>(field(load(128 + 32 * half), 2 * s, 3));
                _mm256_or_si256(field(load(64 * half + s % 2 * 32), s / 2 * 4, 15), two)
            })
        }
        _ => return quant::open_super(dtype, block, out),
    };
    for (i, codes) in codes.into_iter().enumerate() {
        // SAFETY: 32 bytes from 32 i of 256.
        unsafe { _mm256_storeu_si256(out.codes.as_mut_ptr().add(32 * i).cast(), codes) };
    }
}
