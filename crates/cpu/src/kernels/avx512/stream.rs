//! Decode: adjoining weight rows against one activation row.
//!
//! Blocks are taken in the order in which they lie, the one stream that the hardware prefetches at full speed, in
//! groups of eight. A vector of a block's codes is multiplied with [`_mm512_dpbusd_epi32`], whose sums of 4 or 8
//! products still fit 16 bits; two such vectors are packed into one, which meets its sub-block scales in one 16-bit
//! product. A group shares the opening of its scales, the horizontal sums and the float part, in which a lane is a
//! block. The types are in `stream/`, their layouts drawn in `quant::block`. Knows nothing of threads.

use std::arch::x86_64::*;
use std::cell::RefCell;

use quant::fixed::FixedRow;

pub(super) use nibbles::{Q4K, Q5K};
pub(super) use sixes::Q6K;

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

// Behind the macro, which they use.
mod nibbles;
mod sixes;

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
