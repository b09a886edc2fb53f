//! Products with weights in small blocks of 32 (ARCHITECTURE.md, rule 1): Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! Eight pairs of blocks are multiplied at a time, so that they share the horizontal sums: one weight block with eight
//! activation rows or, where there is one activation row, eight blocks of the weight row with it.

use std::array::from_fn;
use std::ops::Range;

use quant::SmallBlock;
use quant::fixed::{Fixed, FixedRow, SUB, block_len};

use crate::isa::Task;
use crate::kernels::{Kernels, PAIRS, join};
use crate::matmul::Matrix;

/// [`crate::matmul::product`] for these types; `LOW` says whether the activations have a low plane.
pub(crate) struct SmallProduct<'a, const LOW: bool> {
    pub(crate) w: Matrix<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) x: &'a Fixed,
    pub(crate) picks: &'a [u32],
    pub(crate) out: &'a mut [f32],
}

impl<const LOW: bool> Task for SmallProduct<'_, LOW> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        let SmallProduct { w, rows, x, picks, out } = self;
        let (stride, blocks) = (rows.len(), w.k / 32);
        if let [t] = *picks {
            let x = x.row(t as usize);
            // A last group of fewer blocks repeats the row's last one, and drops it.
            let group = |first: usize| Octet::new::<LOW>(from_fn(|i| (x, (first + i).min(blocks - 1))));
            let octets: Vec<_> = (0..blocks).step_by(PAIRS).map(group).collect();
            rows.zip(out).for_each(|(n, out)| *out = one_row::<K, LOW>(w, n, &octets));
            return;
        }
        for (tile, picks) in picks.chunks(PAIRS).enumerate() {
            // Rows that a last tile lacks are computed as its first one, and dropped.
            let x: [_; PAIRS] = from_fn(|i| x.row(*picks.get(i).unwrap_or(&picks[0]) as usize));
            let octets: Vec<_> = (0..blocks).map(|b| Octet::new::<LOW>(x.map(|row| (row, b)))).collect();
            for n in rows.clone() {
                let sums = rows_of_tile::<K, LOW>(w, n, &octets);
                for (i, sum) in sums[..picks.len()].iter().enumerate() {
                    out[(tile * PAIRS + i) * stride + n - rows.start] = *sum;
                }
            }
        }
    }
}

/// Weight row `n` against the activation rows of a tile; `octets[b]` has block `b` of each.
#[inline(always)]
fn rows_of_tile<K: Kernels, const LOW: bool>(w: Matrix<'_>, n: usize, octets: &[Octet<'_>]) -> [f32; PAIRS] {
    let mut sums = [0f32; PAIRS];
    let mut open = SmallBlock::default();
    for (bytes, octet) in w.row(n).chunks_exact(w.dtype.block_bytes()).zip(octets) {
        quant::open_small(w.dtype, bytes, &mut open);
        let terms = octet.terms::<K, LOW>([&open.codes; PAIRS], [open.d; PAIRS], [open.m; PAIRS]);
        sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    }
    sums
}

/// Weight row `n` against one activation row, whose blocks are in `octets`; the terms are added in block order.
#[inline(always)]
fn one_row<K: Kernels, const LOW: bool>(w: Matrix<'_>, n: usize, octets: &[Octet<'_>]) -> f32 {
    let size = w.dtype.block_bytes();
    let mut open = [SmallBlock::default(); PAIRS];
    let mut sum = 0f32;
    for (bytes, octet) in w.row(n).chunks(PAIRS * size).zip(octets) {
        for (open, bytes) in open.iter_mut().zip(bytes.chunks_exact(size)) {
            quant::open_small(w.dtype, bytes, open);
        }
        let codes = open.each_ref().map(|block| &block.codes);
        let terms = octet.terms::<K, LOW>(codes, open.map(|block| block.d), open.map(|block| block.m));
        terms[..bytes.len() / size].iter().for_each(|term| sum += term);
    }
    sum
}

/// Eight activation blocks of 32, prepared once for all weight rows.
struct Octet<'a> {
    hi: [&'a [i8; 32]; PAIRS],
    /// Where there is no low plane, the high one, never read.
    lo: [&'a [i8; 32]; PAIRS],
    /// `G` of each: its sum.
    sum: [f32; PAIRS],
    scale: [f32; PAIRS],
}

impl<'a> Octet<'a> {
    /// Of a row and the number of a block in it.
    fn new<const LOW: bool>(blocks: [(FixedRow<'a>, usize); PAIRS]) -> Octet<'a> {
        let plane = |plane: &'a [i8], b: usize| plane[b * 32..][..32].try_into().expect("a slice of 32");
        let sum = |sums: &[i16], b: usize| -> i32 {
            sums[b * (32 / SUB)..][..32 / SUB].iter().map(|&s| i32::from(s)).sum()
        };
        Octet {
            hi: blocks.map(|(x, b)| plane(x.hi, b)),
            lo: blocks.map(|(x, b)| plane(if LOW { x.lo } else { x.hi }, b)),
            // At most 32 * 32639: exact in f32.
            sum: blocks.map(|(x, b)| match LOW {
                true => (256 * sum(x.sum_hi, b) + sum(x.sum_lo, b)) as f32,
                false => sum(x.sum_hi, b) as f32,
            }),
            scale: blocks.map(|(x, b)| x.scale[b * 32 / block_len(x.hi.len())]),
        }
    }

    /// `s * (d * F + m * G)` of each pair; a plane of `F` is at most 128 * 128 * 32, exact in f32.
    #[inline(always)]
    fn terms<K: Kernels, const LOW: bool>(
        &self,
        codes: [&[i8; 32]; PAIRS],
        d: [f32; PAIRS],
        m: [f32; PAIRS],
    ) -> [f32; PAIRS] {
        let hi = K::small_dots(codes, self.hi);
        let lo = if LOW { K::small_dots(codes, self.lo) } else { hi };
        let mut terms = [0f32; PAIRS];
        for i in 0..PAIRS {
            let f = if LOW { join(hi[i], lo[i]) } else { hi[i] as f32 };
            terms[i] = self.scale[i] * (d[i] * f + m[i] * self.sum[i]);
        }
        terms
    }
}
