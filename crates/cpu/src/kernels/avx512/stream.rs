//! Decode: adjoining weight rows against one activation row.
//!
//! Blocks are taken in the order in which they lie, the one stream that the hardware prefetches at full speed, in
//! groups of eight. A vector of a block's codes is multiplied with [`_mm512_dpbusd_epi32`], whose sums of 4 or 8
//! products still fit 16 bits; two such vectors are packed into one, which meets its sub-block scales in one 16-bit
//! product. A group shares the opening of its scales, the horizontal sums and the float part, in which a lane is a
//! block. Knows the layouts of the three types (drawn in `quant::block`), and nothing of threads.

use std::arch::x86_64::*;
use std::cell::RefCell;

use quant::fixed::FixedRow;

/// Blocks to a group: the 32-bit lanes of half a vector.
const GROUP: usize = 8;

/// Bytes between what is computed and what is fetched, into the second cache: fetching into the first one took 1.3
/// times as long (Zen 4), for it has few places for lines under way.
const AHEAD: usize = 8192;

/// One vector, where a load never crosses a cache line.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// A weight type that can be streamed.
pub(super) trait Streamed {
    /// Bytes of a block.
    const BYTES: usize;
    /// Sub-block sums of a plane of a block as this type wants them.
    const SUMS: usize;
    /// A plane of a block in the order in which this type's codes come.
    ///
    /// # Safety
    /// AVX-512 as in [`super::Avx512`]; likewise below.
    unsafe fn arrange(plane: &[i8; 256]) -> [__m512i; 4];
    /// The sums of a plane of a block, in the first [`Streamed::SUMS`] words.
    ///
    /// # Safety
    /// As above.
    unsafe fn sums(sums: &[i16; 16]) -> __m256i;
    /// The terms `s * (d * F - dmin * G)` of eight blocks.
    ///
    /// # Safety
    /// `blocks` points to [`GROUP`] whole blocks.
    unsafe fn terms<const P: usize>(blocks: *const u8, x: Columns<'_, P>) -> __m256;
}

/// The values of an expression for each block of a group. Written out, because what a loop indexes lies in memory, and
/// these have to stay in registers.
macro_rules! each {
    ($j:ident => $value:expr) => {
        [
            each!($j = 0, $value),
            each!($j = 1, $value),
            each!($j = 2, $value),
            each!($j = 3, $value),
            each!($j = 4, $value),
            each!($j = 5, $value),
            each!($j = 6, $value),
            each!($j = 7, $value),
        ]
    };
    ($j:ident = $value:literal, $body:expr) => {{
        const $j: usize = $value;
        $body
    }};
}

pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

/// Memory that a thread keeps between calls: an allocation each would cost a chunk of rows several percent.
#[derive(Default)]
struct Scratch {
    /// `[column][plane][vector]`, high plane first.
    planes: Vec<Line>,
    /// `[plane][column][SUMS]`.
    sums: [Vec<i16>; 2],
    /// `[column]`.
    scale: Vec<f32>,
    /// `[block]` of the weights.
    terms: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Makes room for `n` values that will be written before they are read.
fn room<T: Clone + Default>(v: &mut Vec<T>, n: usize) {
    if v.len() < n {
        v.resize(n, T::default());
    }
}

/// The columns that a group meets.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, const P: usize> {
    planes: &'a [[[Line; 4]; P]; GROUP],
    /// Of one plane, where there is one.
    sums: [&'a [i16]; 2],
    scale: &'a [f32; GROUP],
}

impl Scratch {
    /// Takes up an activation row of `P` planes, repeated where a group of blocks may run over the end of a weight row
    /// into the next: from every column where a group may begin, there are [`GROUP`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn arrange<T: Streamed, const P: usize>(&mut self, x: &FixedRow<'_>) {
        let per_row = x.scale.len();
        let columns = if per_row.is_multiple_of(GROUP) { per_row } else { per_row + GROUP - 1 };
        room(&mut self.planes, columns * P * 4);
        room(&mut self.scale, columns);
        let (planes, sums) = ([x.hi, x.lo], [x.sum_hi, x.sum_lo]);
        for p in 0..P {
            assert!(planes[p].len() == per_row * 256 && sums[p].len() == per_row * 16);
            // A store of sums is 16 words long, whatever of them counts.
            room(&mut self.sums[p], columns * T::SUMS + 16);
            let blocks = planes[p].as_chunks::<256>().0.iter().zip(sums[p].as_chunks::<16>().0).cycle();
            for (column, (plane, sums)) in blocks.take(columns).enumerate() {
                let to = &mut self.planes[(column * P + p) * 4..][..4];
                let to_sums = &mut self.sums[p][column * T::SUMS..][..16];
                // SAFETY: this is compiled for AVX-512; a line is a vector, and there are 16 words.
                unsafe {
                    for (line, v) in to.iter_mut().zip(T::arrange(plane)) {
                        _mm512_store_si512(line.0.as_mut_ptr().cast(), v);
                    }
                    _mm256_storeu_si256(to_sums.as_mut_ptr().cast(), T::sums(sums));
                }
            }
        }
        for (to, scale) in self.scale.iter_mut().zip(x.scale.iter().cycle().take(columns)) {
            *to = *scale;
        }
    }
}

/// `out[n] = rows[n] . x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn stream<T: Streamed, const P: usize>(rows: &[u8], x: &FixedRow<'_>, out: &mut [f32]) {
    SCRATCH.with_borrow_mut(|scratch| stream_in::<T, P>(scratch, rows, x, out));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn stream_in<T: Streamed, const P: usize>(
    scratch: &mut Scratch,
    rows: &[u8],
    x: &FixedRow<'_>,
    out: &mut [f32],
) {
    let per_row = x.scale.len();
    let blocks = out.len() * per_row;
    assert_eq!(rows.len(), blocks * T::BYTES);
    scratch.arrange::<T, P>(x);
    room(&mut scratch.terms, blocks.next_multiple_of(GROUP));
    let (planes, _) = scratch.planes.as_chunks::<4>();
    let (planes, _) = planes.as_chunks::<P>();
    let mut column = 0;
    for (bytes, terms) in rows.chunks(GROUP * T::BYTES).zip(scratch.terms.chunks_exact_mut(GROUP)) {
        const WHOLE: &str = "the columns of a group";
        let sums = column * T::SUMS..(column + GROUP) * T::SUMS;
        let x = Columns {
            planes: planes[column..][..GROUP].try_into().expect(WHOLE),
            sums: [&scratch.sums[0][sums.clone()], if P == 2 { &scratch.sums[1][sums] } else { &[] }],
            scale: scratch.scale[column..][..GROUP].try_into().expect(WHOLE),
        };
        column = (column + GROUP) % per_row;
        // SAFETY: `bytes` are eight blocks, or fewer and copied to where there are eight; eight terms.
        unsafe {
            let group = if bytes.len() == GROUP * T::BYTES {
                T::terms(bytes.as_ptr(), x)
            } else {
                T::terms(padded(bytes).as_ptr(), x)
            };
            _mm256_storeu_ps(terms.as_mut_ptr(), group);
        }
    }
    for (out, terms) in out.iter_mut().zip(scratch.terms.chunks_exact(per_row)) {
        *out = terms.iter().fold(0.0, |sum, term| sum + term);
    }
}

/// Asks for the lines of block `j` of the group that lies [`AHEAD`] bytes further on.
#[inline]
#[target_feature(enable = "avx2")]
fn fetch<T: Streamed>(blocks: *const u8, j: usize) {
    for line in (j * T::BYTES).div_ceil(64)..((j + 1) * T::BYTES).div_ceil(64) {
        // A hint: an address outside the mapping is ignored.
        _mm_prefetch::<_MM_HINT_T1>(blocks.wrapping_add(AHEAD + 64 * line).cast());
    }
}

/// The last blocks, filled up to a group with zeros.
#[cold]
fn padded(bytes: &[u8]) -> [u8; GROUP * 256] {
    let mut group = [0; GROUP * 256];
    group[..bytes.len()].copy_from_slice(bytes);
    group
}

/// Q4_K and Q5_K: 4 bits of a code in nibbles, eight scales and minima of 6 bits.
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

#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(plane: &[i8; 256]) -> [__m512i; 4] {
    let p = plane.as_ptr();
    // SAFETY: 64 bytes of 256 each.
    unsafe {
        [
            _mm512_loadu_si512(p.cast()),
            _mm512_loadu_si512(p.add(64).cast()),
            _mm512_loadu_si512(p.add(128).cast()),
            _mm512_loadu_si512(p.add(192).cast()),
        ]
    }
}

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

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dp(sum: __m512i, codes: __m512i, x: &Line) -> __m512i {
    // SAFETY: a line is a whole, aligned vector.
    _mm512_dpbusd_epi32(sum, codes, unsafe { _mm512_load_si512(x.0.as_ptr().cast()) })
}

/// `F` of eight blocks, given the lanes of `H` and `L` of each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn joined<const P: usize>(sums: &[(__m512i, __m512i); GROUP]) -> __m256 {
    let f = _mm256_cvtepi32_ps(sum_each(each!(J => sums[J].0)));
    if P == 2 {
        let low = _mm256_cvtepi32_ps(sum_each(each!(J => sums[J].1)));
        return _mm256_fmadd_ps(_mm256_set1_ps(256.0), f, low);
    }
    f
}

/// The sums of the lanes of eight vectors, in their order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sum_each(v: [__m512i; 8]) -> __m256i {
    let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let four = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    // Each lane of 128 bits: one partial sum of each of four vectors.
    let (a, b) = (four(two(v[0], v[1]), two(v[2], v[3])), four(two(v[4], v[5]), two(v[6], v[7])));
    let low = _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), b);
    let high = _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), b);
    let v = _mm512_add_epi32(low, high);
    _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v))
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
