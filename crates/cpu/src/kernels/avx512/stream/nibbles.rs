//! Streams of Q4_K and Q5_K: 4 bits of a code in nibbles, eight scales and minima of 6 bits to a block.

use std::arch::x86_64::*;

use super::{Columns, Line, Streamed, dp, fetch, joined, quarters};

pub(in super::super) struct Q4K;
pub(in super::super) struct Q5K;

/// What the two have in common.
trait Nibbles: Streamed {
    /// Where the 128 bytes of nibbles begin.
    const LOW_BITS: usize;
    /// The codes: low nibbles of `x` and `y`, then high ones, in the order of [`interleaved`].
    ///
    /// # Safety
    /// `block` points to a whole block; AVX-512.
    unsafe fn codes(block: *const u8, x: __m512i, y: __m512i) -> [__m512i; 4];
}

impl Nibbles for Q4K {
    const LOW_BITS: usize = 16;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn codes(_: *const u8, x: __m512i, y: __m512i) -> [__m512i; 4] {
        nibbles(x, y)
    }
}

impl Nibbles for Q5K {
    const LOW_BITS: usize = 48;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn codes(block: *const u8, x: __m512i, y: __m512i) -> [__m512i; 4] {
        let low = nibbles(x, y);
        // SAFETY: 32 bytes of the block from 16 on.
        let high = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(block.add(16).cast()) });
        let (x, y) = (_mm512_unpacklo_epi64(high, high), _mm512_unpackhi_epi64(high, high));
        // Bit `s` of a byte is the fifth of sub-block `s`: rotated to bit 4, it stays within its byte.
        let (even, odd) =
            (_mm512_set_epi64(2, -2, 2, -2, 0, -4, 0, -4), _mm512_set_epi64(3, -1, 3, -1, 1, -3, 1, -3));
        [
            merge(low[0], _mm512_rorv_epi64(x, even)),
            merge(low[1], _mm512_rorv_epi64(y, even)),
            merge(low[2], _mm512_rorv_epi64(x, odd)),
            merge(low[3], _mm512_rorv_epi64(y, odd)),
        ]
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(x: __m512i, y: __m512i) -> [__m512i; 4] {
    let mask = _mm512_set1_epi8(15);
    let high = |v| _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask);
    [_mm512_and_si512(x, mask), _mm512_and_si512(y, mask), high(x), high(y)]
}

/// `code | bits & 16`.
#[inline]
#[target_feature(enable = "avx512f")]
fn merge(code: __m512i, bits: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0b1110_1100>(bits, code, _mm512_set1_epi8(16))
}

macro_rules! streamed_nibbles {
    ($($t:ty: $bytes:literal),*) => {$(
        impl Streamed for $t {
            const BYTES: usize = $bytes;
            const SUMS: usize = 8;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            unsafe fn arrange(plane: &[i8; 256]) -> [__m512i; 4] {
                interleaved(plane)
            }

            /// Of 32 weights each.
            #[inline]
            #[target_feature(enable = "avx2")]
            unsafe fn sums(sums: &[i16; 16]) -> __m256i {
                // SAFETY: 16 words.
                let (low, high) = unsafe {
                    (_mm_loadu_si128(sums.as_ptr().cast()), _mm_loadu_si128(sums.as_ptr().add(8).cast()))
                };
                _mm256_castsi128_si256(_mm_hadd_epi16(low, high))
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            unsafe fn terms<const P: usize>(blocks: *const u8, x: Columns<'_, P>) -> __m256 {
                // SAFETY: the caller's promise.
                unsafe { nibble_terms::<$t, P>(blocks, x) }
            }
        }
    )*};
}
streamed_nibbles!(Q4K: 144, Q5K: 176);

/// The order in which [`Nibbles::codes`] come. The two vectors of a block's nibbles are interleaved by 8 bytes, so that
/// the first two vectors of codes (low nibbles), and the last two (high ones), hold the same sub-blocks in the same
/// places, and their sums need one scale.
#[inline]
#[target_feature(enable = "avx512f")]
fn interleaved(plane: &[i8; 256]) -> [__m512i; 4] {
    let [a, b, c, d] = quarters(plane);
    // The 8 bytes 0, 2, 1, 3 of a run of 32, one run from each vector: low nibbles stand for the first 32 of 64
    // weights, high ones for the others.
    let low = _mm512_set_epi64(11, 3, 9, 1, 10, 2, 8, 0);
    let high = _mm512_set_epi64(15, 7, 13, 5, 14, 6, 12, 4);
    let pair = |places: __m512i| {
        let (ac, bd) = (_mm512_permutex2var_epi64(a, places, c), _mm512_permutex2var_epi64(b, places, d));
        [_mm512_shuffle_i64x2::<0b01_00_01_00>(ac, bd), _mm512_shuffle_i64x2::<0b11_10_11_10>(ac, bd)]
    };
    let ([low_even, low_odd], [high_even, high_odd]) = (pair(low), pair(high));
    [low_even, low_odd, high_even, high_odd]
}

/// The packed scales of four blocks: a 128-bit lane each.
struct Heads {
    raw: __m512i,
    /// Eight 16-bit scales a lane.
    scale: __m512i,
    /// Eight 16-bit minima a lane.
    min: __m512i,
}

impl Heads {
    /// # Safety
    /// Four blocks of `T` from `blocks` on.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn open<T: Nibbles>(blocks: *const u8) -> Heads {
        // SAFETY: 16 bytes of each block.
        let head = |j: usize| unsafe { _mm_loadu_si128(blocks.add(j * T::BYTES).cast()) };
        let raw = _mm512_castsi128_si512(head(0));
        let raw = _mm512_inserti32x4::<1>(raw, head(1));
        let raw = _mm512_inserti32x4::<2>(raw, head(2));
        let raw = _mm512_inserti32x4::<3>(raw, head(3));
        let lanes = |w: [i32; 4]| _mm512_set4_epi32(w[3], w[2], w[1], w[0]);
        // Words: d and dmin; scales 0-3, and above them 2 bits of scales 4-7; minima likewise; 4 bits of both.
        let own = _mm512_srlv_epi32(_mm512_shuffle_epi32::<0b10_10_01_01>(raw), lanes([0, 2, 0, 2]));
        let own = _mm512_and_si512(own, lanes([0x3f3f_3f3f, 0x3030_3030, 0x3f3f_3f3f, 0x3030_3030]));
        let mixed = _mm512_srlv_epi32(_mm512_shuffle_epi32::<0b11_11_11_11>(raw), lanes([0, 0, 0, 4]));
        let all =
            _mm512_ternarylogic_epi32::<0b1111_1000>(own, mixed, lanes([0, 0x0f0f_0f0f, 0, 0x0f0f_0f0f]));
        let zero = _mm512_setzero_si512();
        Heads { raw, scale: _mm512_unpacklo_epi8(all, zero), min: _mm512_unpackhi_epi8(all, zero) }
    }
}

/// The scale of each packed 16-bit sum of the `j`-th of four blocks, as places among the scales of all four.
const SCALE_OF_NIBBLES: [[i16; 32]; 4] = {
    let mut places = [[0; 32]; 4];
    let mut i = 0;
    while i < 128 {
        let (j, lane, word) = (i / 32, i % 32 / 8, i % 8);
        // Of a lane's words, two each: low nibbles of the first and the second 64 bytes, then high nibbles.
        let sub = 4 * (word / 2 % 2) + 2 * (lane / 2) + word / 4;
        places[j][i % 32] = (8 * j + sub) as i16;
        i += 1;
    }
    places
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn nibble_terms<T: Nibbles, const P: usize>(blocks: *const u8, x: Columns<'_, P>) -> __m256 {
    let zero = _mm512_setzero_si512();
    // SAFETY: eight blocks.
    let heads = unsafe { [Heads::open::<T>(blocks), Heads::open::<T>(blocks.add(4 * T::BYTES))] };
    let sums = each!(J => {
        fetch::<T>(blocks, J);
        // SAFETY: 128 bytes of block J from LOW_BITS on; 32 words.
        let (first, second, places) = unsafe {
            let nibbles = blocks.add(J * T::BYTES + T::LOW_BITS);
            (
                _mm512_loadu_si512(nibbles.cast()),
                _mm512_loadu_si512(nibbles.add(64).cast()),
                _mm512_loadu_si512(SCALE_OF_NIBBLES[J % 4].as_ptr().cast()),
            )
        };
        let (even, odd) = (_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
        // SAFETY: block J.
        let codes = unsafe { T::codes(blocks.add(J * T::BYTES), even, odd) };
        let scale = _mm512_permutexvar_epi16(places, heads[J / 4].scale);
        let dot = |p: usize| nibble_dot(&codes, &x.planes[J][p], scale);
        (dot(0), if P == 2 { dot(1) } else { zero })
    });
    let min = |i: usize| {
        // SAFETY: the sums of eight columns, of which these are four.
        let of = |p: usize| unsafe { _mm512_madd_epi16(heads[i].min, words(x.sums[p], 32 * i)) };
        if P == 2 { _mm512_add_epi32(_mm512_slli_epi32::<8>(of(0)), of(1)) } else { of(0) }
    };
    // The d of eight blocks, then the dmin.
    let places = _mm512_set_epi16(
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 57, 49, 41, 33, 25, 17, 9, 1, 56, 48, 40, 32, 24, 16,
        8, 0,
    );
    let halves = _mm512_permutex2var_epi16(heads[0].raw, places, heads[1].raw);
    let halves = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    let (d, dmin) = (_mm512_castps512_ps256(halves), _mm512_extractf32x8_ps::<1>(halves));
    let offset = _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(sum_quarters([min(0), min(1)])));
    let t = _mm256_sub_ps(_mm256_mul_ps(d, joined::<P>(&sums)), offset);
    // SAFETY: eight floats.
    _mm256_mul_ps(unsafe { _mm256_loadu_ps(x.scale.as_ptr()) }, t)
}

/// The sums of one plane of a block, still spread over lanes. At most 31 * 128 * 8 = 31744 before the scales: 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn nibble_dot(codes: &[__m512i; 4], plane: &[Line; 4], scale: __m512i) -> __m512i {
    let zero = _mm512_setzero_si512();
    let low = dp(dp(zero, codes[0], &plane[0]), codes[1], &plane[1]);
    let high = dp(dp(zero, codes[2], &plane[2]), codes[3], &plane[3]);
    _mm512_madd_epi16(_mm512_packs_epi32(low, high), scale)
}

/// The sums of the 128-bit lanes of two vectors, in their order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sum_quarters(v: [__m512i; 2]) -> __m256i {
    let two = _mm512_add_epi32(_mm512_unpacklo_epi64(v[0], v[1]), _mm512_unpackhi_epi64(v[0], v[1]));
    let one = _mm512_add_epi32(two, _mm512_shuffle_epi32::<0b10_11_00_01>(two));
    let places = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
    _mm512_castsi512_si256(_mm512_permutexvar_epi32(places, one))
}

/// 32 words from `from` on.
///
/// # Safety
/// They exist.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn words(x: &[i16], from: usize) -> __m512i {
    debug_assert!(from + 32 <= x.len());
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(x.as_ptr().add(from).cast()) }
}
