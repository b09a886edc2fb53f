//! The integer kernels with 256-bit vectors and no dot-product instructions (Haswell, Zen 1 to 3).

use std::arch::x86_64::*;

use gguf::Dtype;
use quant::SuperBlock;

use super::{Block, Kernels, PAIRS, Sums, check_planes, open};

/// AVX2 and FMA.
pub(crate) struct Avx2;

impl Kernels for Avx2 {
    #[inline(always)]
    fn open(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
        // SAFETY: `Avx2` is only named by `isa::run_avx2`, behind detection.
        unsafe { open::open_avx2(dtype, block, out) }
    }

    #[inline(always)]
    fn super_dot<const LOW: bool>(w: &SuperBlock, x: Block<'_>) -> Sums {
        // SAFETY: as above.
        unsafe { super_dot::<LOW>(w, x) }
    }

    #[inline(always)]
    fn small_dots(codes: [&[i8; 32]; PAIRS], q: [&[i8; 32]; PAIRS]) -> [i32; PAIRS] {
        // SAFETY: as above.
        unsafe { small_dots(codes, q) }
    }

    #[inline(always)]
    fn planes(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &mut [f32]) {
        check_planes(hi, lo, b_hi, b_lo, out);
        // SAFETY: as above; the lengths were just checked.
        unsafe { planes(hi, lo, b_hi, b_lo, out) }
    }
}

/// See [`Kernels::small_dots`]; the other sets with 256-bit vectors use it as well. A product of two codes is at most
/// 2^14, so two of them fit the i32 that `madd` makes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn small_dots(codes: [&[i8; 32]; PAIRS], q: [&[i8; 32]; PAIRS]) -> [i32; PAIRS] {
    let mut v = [_mm256_setzero_si256(); PAIRS];
    for i in 0..PAIRS {
        // SAFETY: both arrays are 32 bytes long, unaligned loads.
        let halves = |x: &[i8; 32]| unsafe {
            [
                _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().cast())),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().add(16).cast())),
            ]
        };
        let ([c0, c1], [q0, q1]) = (halves(codes[i]), halves(q[i]));
        v[i] = _mm256_add_epi32(_mm256_madd_epi16(c0, q0), _mm256_madd_epi16(c1, q1));
    }
    // Each half of `a` holds partial sums of v[0..4] in order, each half of `b` of v[4..8].
    let a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    let b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    let low = _mm256_permute2x128_si256::<0x20>(a, b);
    let high = _mm256_permute2x128_si256::<0x31>(a, b);
    let mut sums = [0i32; PAIRS];
    // SAFETY: the array is 32 bytes long, an unaligned store.
    unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), _mm256_add_epi32(low, high)) };
    sums
}

/// The sum of the eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn reduce(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_11_10>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_00_01>(v));
    _mm_cvtsi128_si32(v)
}

/// `sum min * sum` over the 16 sub-blocks, or `bias * sum scale * sum`: pairs of i16 products in i32 lanes. At most
/// 32 * 128 * 16 * 128 a product.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn offsets(w: &SuperBlock, sums: &[i16; 16]) -> __m256i {
    // SAFETY: each array is 16 elements long, unaligned loads.
    let (scale, min, sums) = unsafe {
        (
            _mm256_cvtepi8_epi16(_mm_loadu_si128(w.scale.as_ptr().cast())),
            _mm256_cvtepu8_epi16(_mm_loadu_si128(w.min.as_ptr().cast())),
            _mm256_loadu_si256(sums.as_ptr().cast()),
        )
    };
    let factor =
        if w.bias != 0 { _mm256_mullo_epi16(scale, _mm256_set1_epi16(i16::from(w.bias))) } else { min };
    _mm256_madd_epi16(factor, sums)
}

/// Turns lane sums over biased codes, and the offsets of both planes, into the exact sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn settle(
    bias: u8,
    hi: __m256i,
    lo: __m256i,
    off_hi: __m256i,
    off_lo: __m256i,
    low: bool,
) -> Sums {
    if bias != 0 {
        let hi = reduce(_mm256_sub_epi32(hi, off_hi));
        let lo = if low { reduce(_mm256_sub_epi32(lo, off_lo)) } else { 0 };
        return Sums { hi, lo, min: 0 };
    }
    if !low {
        return Sums { hi: reduce(hi), lo: 0, min: reduce(off_hi) };
    }
    let min = _mm256_add_epi32(_mm256_slli_epi32::<8>(off_hi), off_lo);
    // Three sums at once: [hi, lo, min, min] in each half, then the halves together.
    let all = _mm256_hadd_epi32(_mm256_hadd_epi32(hi, lo), _mm256_hadd_epi32(min, min));
    let all = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
    Sums { hi: _mm_cvtsi128_si32(all), lo: _mm_extract_epi32::<1>(all), min: _mm_extract_epi32::<2>(all) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn super_dot<const LOW: bool>(w: &SuperBlock, x: Block<'_>) -> Sums {
    let mut hi = _mm256_setzero_si256();
    let mut lo = _mm256_setzero_si256();
    for i in 0..8 {
        let scale = _mm256_set_m128i(
            _mm_set1_epi16(i16::from(w.scale[2 * i + 1])),
            _mm_set1_epi16(i16::from(w.scale[2 * i])),
        );
        // SAFETY: 32 bytes from 32 i of 256-byte arrays, unaligned loads.
        let (codes, x_hi, x_lo) = unsafe {
            (
                _mm256_loadu_si256(w.codes.as_ptr().add(32 * i).cast()),
                _mm256_loadu_si256(x.hi.as_ptr().add(32 * i).cast()),
                _mm256_loadu_si256(x.lo.as_ptr().add(32 * i).cast()),
            )
        };
        // Codes are at most 63, so a pair is at most 2 * 63 * 128 = 16128: no saturation.
        hi = _mm256_add_epi32(hi, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x_hi), scale));
        if LOW {
            lo = _mm256_add_epi32(lo, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x_lo), scale));
        }
    }
    let off_hi = offsets(w, x.sum_hi);
    let off_lo = if LOW { offsets(w, x.sum_lo) } else { _mm256_setzero_si256() };
    settle(w.bias, hi, lo, off_hi, off_lo, LOW)
}

/// `maddubs` would saturate on biased bytes, so they are widened to i16 and the bias taken off first.
///
/// # Safety
/// The lengths are those that `check_planes` accepts.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn planes(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &mut [f32]) {
    let lanes = out.len();
    let bias = _mm256_set1_epi16(128);
    let quad = |b: &[i8], g: usize| {
        let q: [i8; 4] = b[4 * g..][..4].try_into().expect("four bytes");
        _mm256_cvtepi8_epi16(_mm_set1_epi32(i32::from_le_bytes(q.map(|v| v as u8))))
    };
    for n in (0..lanes).step_by(4) {
        let (mut high, mut mixed) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for g in 0..b_hi.len() / 4 {
            let at = (g * lanes + n) * 4;
            // SAFETY: 16 bytes of lanes n..n+4 of group g, inside the tile by `check_planes`.
            let (a_hi, a_lo) = unsafe {
                (_mm_loadu_si128(hi.as_ptr().add(at).cast()), _mm_loadu_si128(lo.as_ptr().add(at).cast()))
            };
            let a_hi = _mm256_sub_epi16(_mm256_cvtepu8_epi16(a_hi), bias);
            let a_lo = _mm256_sub_epi16(_mm256_cvtepu8_epi16(a_lo), bias);
            let (q_hi, q_lo) = (quad(b_hi, g), quad(b_lo, g));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(a_hi, q_hi));
            mixed = _mm256_add_epi32(mixed, _mm256_madd_epi16(a_hi, q_lo));
            mixed = _mm256_add_epi32(mixed, _mm256_madd_epi16(a_lo, q_hi));
        }
        // Lanes come in pairs; the horizontal sum leaves n, n+1 in the low half and n+2, n+3 in the high half.
        let both = _mm256_hadd_epi32(high, mixed);
        let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(both);
        let high = _mm_cvtepi32_ps(_mm256_castsi256_si128(both));
        let mixed = _mm_cvtepi32_ps(_mm256_extracti128_si256::<1>(both));
        let joined = _mm_fmadd_ps(_mm_set1_ps(256.0), high, mixed);
        // SAFETY: lanes n..n+4 of `out`, whose length is a multiple of 32.
        unsafe { _mm_storeu_ps(out.as_mut_ptr().add(n), joined) };
    }
}
