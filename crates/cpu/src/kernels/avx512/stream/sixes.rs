//! Streams of Q6_K: 4 and 2 bits of a code apart, sixteen scales of 8 bits to a block.

use std::arch::x86_64::*;

use super::{Columns, Line, Streamed, dp, fetch, joined, quarters};

pub(in super::super) struct Q6K;

/// The scale of each packed 16-bit sum of a Q6_K block's first 128 codes; 8 more for the rest.
const SCALE_OF_SIXES: [i16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = (i / 8 + 4 * (i / 4 % 2)) as i16;
        i += 1;
    }
    places
};

impl Streamed for Q6K {
    const BYTES: usize = 210;
    const SUMS: usize = 16;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn arrange(plane: &[i8; 256]) -> [__m512i; 4] {
        quarters(plane)
    }

    /// What takes off the bias of 32, with four times the scale: `-32 * 2048` would not fit 16 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sums(sums: &[i16; 16]) -> __m256i {
        // SAFETY: 16 words.
        let sums = unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) };
        _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_slli_epi16::<3>(sums))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn terms<const P: usize>(blocks: *const u8, x: Columns<'_, P>) -> __m256 {
        // SAFETY: 32 words.
        let places = unsafe { _mm512_loadu_si512(SCALE_OF_SIXES.as_ptr().cast()) };
        let more = _mm512_add_epi16(places, _mm512_set1_epi16(8));
        let mut halves = _mm_setzero_si128();
        let sums = each!(J => {
            fetch::<Self>(blocks, J);
            // SAFETY: block J.
            let (codes, scales, d) = unsafe {
                let block = blocks.add(J * 210);
                let d = block.add(208).cast::<u16>().read_unaligned();
                (sixes(block), _mm_loadu_si128(block.add(192).cast()), d)
            };
            halves = _mm_insert_epi16::<{ J as i32 }>(halves, d.into());
            let scales = _mm256_cvtepi8_epi16(scales);
            let unbias = _mm256_slli_epi16::<2>(scales);
            let scales = _mm512_castsi256_si512(scales);
            let scales =
                [_mm512_permutexvar_epi16(places, scales), _mm512_permutexvar_epi16(more, scales)];
            let dot = |p: usize| {
                // SAFETY: 16 words of each of eight columns.
                let sums = unsafe { _mm256_loadu_si256(x.sums[p].as_ptr().add(16 * J).cast()) };
                let sum = _mm512_zextsi256_si512(_mm256_madd_epi16(unbias, sums));
                six_dot(sum, &codes, &x.planes[J][p], &scales)
            };
            (dot(0), if P == 2 { dot(1) } else { _mm512_setzero_si512() })
        });
        let t = _mm256_mul_ps(_mm256_cvtph_ps(halves), joined::<P>(&sums));
        // SAFETY: eight floats.
        _mm256_mul_ps(unsafe { _mm256_loadu_ps(x.scale.as_ptr()) }, t)
    }
}

/// Adds the sums of one plane of a block to `sum`. At most 63 * 128 * 4 = 32256 before the scales: 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn six_dot(sum: __m512i, codes: &[__m512i; 4], plane: &[Line; 4], scales: &[__m512i; 2]) -> __m512i {
    let zero = _mm512_setzero_si512();
    let first = _mm512_packs_epi32(dp(zero, codes[0], &plane[0]), dp(zero, codes[1], &plane[1]));
    let second = _mm512_packs_epi32(dp(zero, codes[2], &plane[2]), dp(zero, codes[3], &plane[3]));
    _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sum, first, scales[0]), second, scales[1])
}

/// The 256 codes of a Q6_K block, in order.
///
/// # Safety
/// `block` points to a whole block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn sixes(block: *const u8) -> [__m512i; 4] {
    let mut codes = [_mm512_setzero_si512(); 4];
    // The upper two bits: of a byte's four fields, the first and third serve the lower half of a vector, the second
    // and fourth the upper one. Masked, what a rotation moves beside them falls to bits that the merge drops.
    let fields = _mm512_set_epi64(
        0xcccc_cccc_cccc_ccccu64 as i64,
        0xcccc_cccc_cccc_ccccu64 as i64,
        0xcccc_cccc_cccc_ccccu64 as i64,
        0xcccc_cccc_cccc_ccccu64 as i64,
        0x3333_3333_3333_3333,
        0x3333_3333_3333_3333,
        0x3333_3333_3333_3333,
        0x3333_3333_3333_3333,
    );
    let (left, right) = (_mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4), _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0));
    // `low & 15 | high & 240`.
    let merge = |low, high| _mm512_ternarylogic_epi32::<0b1100_1010>(_mm512_set1_epi8(15), low, high);
    for half in 0..2 {
        // SAFETY: 64 of the first 128 bytes, and 32 of the next 64.
        let (low, high) = unsafe {
            (
                _mm512_loadu_si512(block.add(64 * half).cast()),
                _mm256_loadu_si256(block.add(128 + 32 * half).cast()),
            )
        };
        let high = _mm512_and_si512(_mm512_broadcast_i64x4(high), fields);
        codes[2 * half] = merge(low, _mm512_rolv_epi64(high, left));
        codes[2 * half + 1] = merge(_mm512_srli_epi16::<4>(low), _mm512_rorv_epi64(high, right));
    }
    codes
}
