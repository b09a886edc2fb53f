//! The integer kernels with 512-bit vectors and dot-product instructions (Ice Lake, Zen 4 and later).

mod stream;

use std::arch::x86_64::*;

use gguf::Dtype;
use quant::SuperBlock;
use quant::fixed::FixedRow;

use self::stream::{Q4K, Q5K, Q6K, stream};
use super::{Block, Kernels, PAIRS, Sums, avx2, check_planes, open};
use crate::matmul::{Opened, PANEL, Panel};

/// AVX-512 with BW, DQ, VL and VNNI.
pub(crate) struct Avx512;

impl Kernels for Avx512 {
    #[inline(always)]
    fn open(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
        // SAFETY: `Avx512` is only named by `isa::run_avx512`, behind detection.
        unsafe { open::open_avx512(dtype, block, out) }
    }

    #[inline(always)]
    fn super_dot<const LOW: bool>(w: &SuperBlock, x: Block<'_>) -> Sums {
        // SAFETY: as above.
        unsafe { super_dot::<LOW>(w, x) }
    }

    #[inline(always)]
    fn super_stream<const LOW: bool>(dtype: Dtype, bytes: &[u8], x: &FixedRow<'_>, out: &mut [f32]) -> bool {
        // SAFETY: as above.
        unsafe {
            match dtype {
                Dtype::Q4K if LOW => stream::<Q4K, 2>(bytes, x, out),
                Dtype::Q4K => stream::<Q4K, 1>(bytes, x, out),
                Dtype::Q5K if LOW => stream::<Q5K, 2>(bytes, x, out),
                Dtype::Q5K => stream::<Q5K, 1>(bytes, x, out),
                Dtype::Q6K if LOW => stream::<Q6K, 2>(bytes, x, out),
                Dtype::Q6K => stream::<Q6K, 1>(bytes, x, out),
                _ => return false,
            }
        }
        true
    }

    #[inline(always)]
    fn super_panel<const LOW: bool>(panel: &Panel<'_>, out: &mut [f32]) -> bool {
        // SAFETY: as above.
        unsafe { super_panel::<LOW>(panel, out) };
        true
    }

    #[inline(always)]
    fn small_dots(codes: [&[i8; 32]; PAIRS], q: [&[i8; 32]; PAIRS]) -> [i32; PAIRS] {
        // SAFETY: as above; the set includes AVX2.
        unsafe { avx2::small_dots(codes, q) }
    }

    #[inline(always)]
    fn planes(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &mut [f32]) {
        check_planes(hi, lo, b_hi, b_lo, out);
        let (mut n, lanes) = (0, out.len());
        // SAFETY: as above; the lengths were just checked, and n + 16 N <= lanes.
        unsafe {
            while n + 64 <= lanes {
                planes::<4>(hi, lo, b_hi, b_lo, out, n);
                n += 64;
            }
            if n < lanes {
                planes::<2>(hi, lo, b_hi, b_lo, out, n);
            }
        }
    }
}

/// Which sub-block's scale each lane of the i-th quarter of a super-block needs: lane covers 4 weights, sub-block 16.
const SCALE_OF_LANE: [[i32; 16]; 4] = {
    let mut t = [[0; 16]; 4];
    let mut i = 0;
    while i < 64 {
        t[i / 16][i % 16] = (i / 4) as i32;
        i += 1;
    }
    t
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn super_dot<const LOW: bool>(w: &SuperBlock, x: Block<'_>) -> Sums {
    let zero = _mm512_setzero_si512();
    // Scales in the low half of each 32-bit lane, the high half zero: a 16-bit dot product with sums that fit 16 bits
    // (4 * 63 * 128 = 32256) multiplies and accumulates in one instruction.
    // SAFETY: 16 bytes, unaligned load.
    let scales = unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(w.scale.as_ptr().cast())) };
    let scales = _mm512_and_si512(scales, _mm512_set1_epi32(0xffff));
    let (mut hi, mut lo) = (zero, zero);
    for (i, lanes) in SCALE_OF_LANE.iter().enumerate() {
        // SAFETY: 64 bytes from 64 i of 256-byte arrays, and 16 i32; unaligned loads.
        let (codes, x_hi, x_lo, lanes) = unsafe {
            (
                _mm512_loadu_si512(w.codes.as_ptr().add(64 * i).cast()),
                _mm512_loadu_si512(x.hi.as_ptr().add(64 * i).cast()),
                _mm512_loadu_si512(x.lo.as_ptr().add(64 * i).cast()),
                _mm512_loadu_si512(lanes.as_ptr().cast()),
            )
        };
        let scale = _mm512_permutexvar_epi32(lanes, scales);
        hi = _mm512_dpwssd_epi32(hi, _mm512_dpbusd_epi32(zero, codes, x_hi), scale);
        if LOW {
            lo = _mm512_dpwssd_epi32(lo, _mm512_dpbusd_epi32(zero, codes, x_lo), scale);
        }
    }
    let half = |v: __m512i| _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
    let off_hi = avx2::offsets(w, x.sum_hi);
    let off_lo = if LOW { avx2::offsets(w, x.sum_lo) } else { _mm256_setzero_si256() };
    avx2::settle(w.bias, half(hi), half(lo), off_hi, off_lo, LOW)
}

/// Four bytes, or a pair of 16-bit sums, in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast<T>(x: &[T], word: usize) -> __m512i {
    debug_assert!((word + 1) * 4 <= size_of_val(x));
    // SAFETY: `T` is `i8` or `i16` here, and every caller's `word` stays inside `x`, as the assertion states.
    _mm512_set1_epi32(unsafe { x.as_ptr().cast::<i32>().add(word).read_unaligned() })
}

/// `16 N` lanes from `n` on.
///
/// # Safety
/// The lengths are those that `check_planes` accepts, and `n + 16 N <= out.len()`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn planes<const N: usize>(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &mut [f32], n: usize) {
    let lanes = out.len();
    let sum = |b: &[i8]| -> i32 { b.iter().map(|&v| i32::from(v)).sum() };
    // The bytes are biased by 128, which adds 128 sum(b) to every lane: start from its negative.
    let (sum_hi, sum_lo) = (sum(b_hi), sum(b_lo));
    let mut high = [_mm512_set1_epi32(-128 * sum_hi); N];
    let mut mixed = [_mm512_set1_epi32(-128 * (sum_hi + sum_lo)); N];
    for g in 0..b_hi.len() / 4 {
        let (q_hi, q_lo) = (broadcast(b_hi, g), broadcast(b_lo, g));
        for v in 0..N {
            let at = (g * lanes + n + 16 * v) * 4;
            // SAFETY: lanes n + 16 v .. + 16 of group g, inside the tile by the contract.
            let (a_hi, a_lo) = unsafe {
                (
                    _mm512_loadu_si512(hi.as_ptr().add(at).cast()),
                    _mm512_loadu_si512(lo.as_ptr().add(at).cast()),
                )
            };
            high[v] = _mm512_dpbusd_epi32(high[v], a_hi, q_hi);
            mixed[v] = _mm512_dpbusd_epi32(mixed[v], a_hi, q_lo);
            mixed[v] = _mm512_dpbusd_epi32(mixed[v], a_lo, q_hi);
        }
    }
    for v in 0..N {
        let joined = join(high[v], mixed[v]);
        // SAFETY: 16 lanes from n + 16 v, inside `out` by the contract.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(n + 16 * v), joined) };
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn join(h: __m512i, l: __m512i) -> __m512 {
    _mm512_fmadd_ps(_mm512_set1_ps(256.0), _mm512_cvtepi32_ps(h), _mm512_cvtepi32_ps(l))
}

/// Activation rows that share one pass over a panel's codes: 4 rows of 2 planes and 2 levels fill half the registers.
const ROWS: usize = 4;

/// Lane = weight row: 16 rows are opened and transposed once a block, then meet every activation row without a
/// shuffle or a horizontal sum.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn super_panel<const LOW: bool>(panel: &Panel<'_>, out: &mut [f32]) {
    let mut opened = Opened::new();
    let mut turned = Turned::default();
    let mut sums = vec![[0f32; PANEL]; panel.picks()];
    for b in 0..panel.blocks() {
        panel.open::<Avx512>(b, &mut opened);
        turned.fill(&opened);
        let mut t = 0;
        while t < sums.len() {
            let n = ROWS.min(sums.len() - t);
            let out = &mut sums[t..t + n];
            match n {
                4 => terms::<4, LOW>(&turned, std::array::from_fn(|i| panel.block(t + i, b)), out),
                3 => terms::<3, LOW>(&turned, std::array::from_fn(|i| panel.block(t + i, b)), out),
                2 => terms::<2, LOW>(&turned, std::array::from_fn(|i| panel.block(t + i, b)), out),
                _ => terms::<1, LOW>(&turned, std::array::from_fn(|i| panel.block(t + i, b)), out),
            }
            t += n;
        }
    }
    panel.store(&sums, out);
}

/// 16 super-blocks of one block column, transposed so that a vector holds one item of all 16 rows.
#[repr(C, align(64))]
struct Turned {
    /// `[word][row]`: codes 4 word .. 4 word + 4 of each row.
    codes: [[u32; PANEL]; 64],
    /// `[sub-block][row]`.
    scale: [[i32; PANEL]; 16],
    /// `[pair of sub-blocks][row]`: two 16-bit minima, or `bias * scale`.
    offset: [[u32; PANEL]; 8],
    d: [f32; PANEL],
    dmin: [f32; PANEL],
    biased: bool,
    /// Whether scales come in equal pairs, one for 32 weights.
    wide: bool,
}

impl Default for Turned {
    fn default() -> Turned {
        Turned {
            codes: [[0; PANEL]; 64],
            scale: [[0; PANEL]; 16],
            offset: [[0; PANEL]; 8],
            d: [0.0; PANEL],
            dmin: [0.0; PANEL],
            biased: false,
            wide: false,
        }
    }
}

impl Turned {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn fill(&mut self, opened: &Opened) {
        for quarter in 0..4 {
            // SAFETY: 64 bytes from 64 quarter of each row's 256 codes.
            let rows = std::array::from_fn(|r| unsafe {
                _mm512_loadu_si512(opened.rows[r].codes.as_ptr().add(64 * quarter).cast())
            });
            for (word, v) in transpose(rows).into_iter().enumerate() {
                // SAFETY: 16 words of one row of `codes`.
                unsafe { _mm512_storeu_si512(self.codes[16 * quarter + word].as_mut_ptr().cast(), v) };
            }
        }
        self.biased = opened.rows[0].bias != 0;
        self.wide = opened.wide;
        for (r, row) in opened.rows.iter().enumerate() {
            (self.d[r], self.dmin[r]) = (row.d, row.dmin);
            for sub in 0..16 {
                self.scale[sub][r] = i32::from(row.scale[sub]);
            }
            let factor = |sub: usize| -> u32 {
                let f = if row.bias != 0 {
                    i16::from(row.bias) * i16::from(row.scale[sub])
                } else {
                    row.min[sub].into()
                };
                u32::from(f as u16)
            };
            for pair in 0..8 {
                self.offset[pair][r] = factor(2 * pair) | factor(2 * pair + 1) << 16;
            }
        }
    }
}

/// A 16 x 16 transpose of 32-bit words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    let (mut a, mut b) = ([zero; 16], [zero; 16]);
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    // b[4 g + c] holds words c, 4 + c, 8 + c, 12 + c (one a 128-bit lane) of rows 4 g .. 4 g + 4.
    let mut out = [zero; 16];
    for c in 0..4 {
        let low01 = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[c], b[4 + c]);
        let high01 = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[c], b[4 + c]);
        let low23 = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + c], b[12 + c]);
        let high23 = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + c], b[12 + c]);
        out[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low01, low23);
        out[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low01, low23);
        out[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(high01, high23);
        out[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(high01, high23);
    }
    out
}

/// Adds the terms of one block column to the sums of `N` activation rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn terms<const N: usize, const LOW: bool>(w: &Turned, x: [Block<'_>; N], sums: &mut [[f32; PANEL]]) {
    let load = |row: &[u32; PANEL]| {
        // SAFETY: 16 words.
        unsafe { _mm512_loadu_si512(row.as_ptr().cast()) }
    };
    let (mut hi, mut lo) = if w.wide { scaled::<N, 8, LOW>(w, &x) } else { scaled::<N, 4, LOW>(w, &x) };
    let zero = _mm512_setzero_si512();
    let (mut off_hi, mut off_lo) = ([zero; N], [zero; N]);
    for (pair, offset) in w.offset.iter().enumerate() {
        let offset = load(offset);
        for n in 0..N {
            off_hi[n] = _mm512_dpwssd_epi32(off_hi[n], offset, broadcast(x[n].sum_hi, pair));
            if LOW {
                off_lo[n] = _mm512_dpwssd_epi32(off_lo[n], offset, broadcast(x[n].sum_lo, pair));
            }
        }
    }
    // SAFETY: 16 floats each.
    let (d, dmin) = unsafe { (_mm512_loadu_ps(w.d.as_ptr()), _mm512_loadu_ps(w.dmin.as_ptr())) };
    for n in 0..N {
        let mut min = zero;
        if w.biased {
            hi[n] = _mm512_sub_epi32(hi[n], off_hi[n]);
            lo[n] = _mm512_sub_epi32(lo[n], off_lo[n]);
        } else if LOW {
            min = _mm512_add_epi32(_mm512_slli_epi32::<8>(off_hi[n]), off_lo[n]);
        } else {
            min = off_hi[n];
        }
        let f = if LOW { join(hi[n], lo[n]) } else { _mm512_cvtepi32_ps(hi[n]) };
        let t = _mm512_sub_ps(_mm512_mul_ps(d, f), _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(min)));
        let t = _mm512_mul_ps(_mm512_set1_ps(x[n].scale), t);
        // SAFETY: 16 floats of one row of `sums`.
        unsafe {
            let at = sums[n].as_mut_ptr();
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), t));
        }
    }
}

/// `sum scale * sum code * q` of both planes, for sub-blocks of `WORDS` words.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scaled<const N: usize, const WORDS: usize, const LOW: bool>(
    w: &Turned,
    x: &[Block<'_>; N],
) -> ([__m512i; N], [__m512i; N]) {
    let zero = _mm512_setzero_si512();
    let (mut hi, mut lo) = ([zero; N], [zero; N]);
    for sub in 0..64 / WORDS {
        let (mut sub_hi, mut sub_lo) = ([zero; N], [zero; N]);
        for word in sub * WORDS..(sub + 1) * WORDS {
            // SAFETY: 16 words.
            let codes = unsafe { _mm512_loadu_si512(w.codes[word].as_ptr().cast()) };
            for n in 0..N {
                sub_hi[n] = _mm512_dpbusd_epi32(sub_hi[n], codes, broadcast(x[n].hi, word));
                if LOW {
                    sub_lo[n] = _mm512_dpbusd_epi32(sub_lo[n], codes, broadcast(x[n].lo, word));
                }
            }
        }
        // SAFETY: 16 words.
        let scale = unsafe { _mm512_loadu_si512(w.scale[sub * WORDS / 4].as_ptr().cast()) };
        for n in 0..N {
            hi[n] = _mm512_add_epi32(hi[n], _mm512_mullo_epi32(sub_hi[n], scale));
            if LOW {
                lo[n] = _mm512_add_epi32(lo[n], _mm512_mullo_epi32(sub_lo[n], scale));
            }
        }
    }
    (hi, lo)
}
