//! Products of weight rows with activation rows (ARCHITECTURE.md, rules 1 and 2).
//!
//! The weight's own type picks the product: super-blocks of 256, small blocks of 32, or floats. Each output is
//! computed by one thread in one written order; rows and activation rows may be cut between threads in any way.

use std::ops::Range;

use gguf::{Dtype, Tensor};
use quant::SuperBlock;
use quant::fixed::{Activations, Fixed, FixedRow};

use crate::isa::{Isa, Task};
use crate::kernels::{Block, Kernels, Sums, join};
use crate::ops;
use crate::small::SmallProduct;

/// A weight matrix: `rows` rows of `k` values. One expert of a stacked tensor is a matrix of its own.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) k: usize,
    pub(crate) rows: usize,
    row_bytes: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// A two-dimensional tensor.
    pub(crate) fn new(tensor: &'a Tensor) -> Matrix<'a> {
        let row_bytes = tensor.row_bytes();
        Matrix {
            dtype: tensor.dtype,
            k: tensor.row_len(),
            rows: tensor.rows(),
            row_bytes,
            bytes: &tensor.data,
        }
    }

    /// Expert `e` of a `[K, N, E]` tensor.
    pub(crate) fn expert(tensor: &'a Tensor, e: usize) -> Matrix<'a> {
        let rows = tensor.dims[1];
        let row_bytes = tensor.row_bytes();
        let bytes = &tensor.data[e * rows * row_bytes..][..rows * row_bytes];
        Matrix { dtype: tensor.dtype, k: tensor.row_len(), rows, row_bytes, bytes }
    }

    /// The bytes of row `n`.
    pub(crate) fn row(&self, n: usize) -> &'a [u8] {
        self.span(n..n + 1)
    }

    /// The bytes of adjoining rows.
    fn span(&self, rows: Range<usize>) -> &'a [u8] {
        &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes]
    }
}

/// Activation rows `[T, K]` in the forms that the weights of a stage need.
#[derive(Default)]
pub(crate) struct Operand {
    pub(crate) k: usize,
    /// `[T, K]`.
    pub(crate) float: Vec<f32>,
    /// The same in fixed point; filled only if some weight is quantised.
    pub(crate) fixed: Fixed,
}

/// Whether a weight of this type is multiplied in fixed point.
pub(crate) fn is_quantised(dtype: Dtype) -> bool {
    !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Rounds one row to fixed point with the vector width of the machine.
pub(crate) struct Fill<'a, 'b>(pub(crate) quant::fixed::FixedRowMut<'a>, pub(crate) &'b [f32]);

impl Task for Fill<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(mut self) {
        self.0.fill(self.1);
    }
}

/// `out[i][n - rows.start] = w[n] . x[picks[i]]`; `out` is `[picks.len(), rows.len()]`.
pub(crate) fn product(
    isa: Isa,
    w: Matrix<'_>,
    rows: Range<usize>,
    x: &Operand,
    picks: &[u32],
    out: &mut [f32],
) {
    assert!(rows.end <= w.rows && w.k == x.k && out.len() == picks.len() * rows.len());
    match w.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => isa.run(FloatProduct { w, rows, x: &x.float, picks, out }),
        Dtype::Q2K | Dtype::Q3K | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => {
            let x = &x.fixed;
            match x.activations() {
                Activations::A16 => isa.run(SuperProduct::<true> { w, rows, x, picks, out }),
                Activations::A8 => isa.run(SuperProduct::<false> { w, rows, x, picks, out }),
            }
        }
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => {
            let x = &x.fixed;
            match x.activations() {
                Activations::A16 => isa.run(SmallProduct::<true> { w, rows, x, picks, out }),
                Activations::A8 => isa.run(SmallProduct::<false> { w, rows, x, picks, out }),
            }
        }
    }
}

/// Activation rows that share an opened weight block.
const TILE: usize = 8;

struct SuperProduct<'a, const LOW: bool> {
    w: Matrix<'a>,
    rows: Range<usize>,
    x: &'a Fixed,
    picks: &'a [u32],
    out: &'a mut [f32],
}

impl<const LOW: bool> Task for SuperProduct<'_, LOW> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        let SuperProduct { w, rows, x, picks, out } = self;
        let stride = rows.len();
        let done = match *picks {
            [t] => K::super_stream::<LOW>(w.dtype, w.span(rows.clone()), &x.row(t as usize), out),
            _ => super_panels::<K, LOW>(w, rows.clone(), x, picks, out),
        };
        if done {
            return;
        }
        for (tile, picks) in picks.chunks(TILE).enumerate() {
            let mut xs = [x.row(picks[0] as usize); TILE];
            picks.iter().enumerate().for_each(|(i, &t)| xs[i] = x.row(t as usize));
            let xs = &xs[..picks.len()];
            let out = &mut out[tile * TILE * stride..];
            for n in rows.clone() {
                let sums = super_row::<K, LOW>(w, n, xs);
                for i in 0..xs.len() {
                    out[i * stride + n - rows.start] = sums[i];
                }
            }
        }
    }
}

/// One weight row against up to [`TILE`] activation rows.
#[inline(always)]
fn super_row<K: Kernels, const LOW: bool>(w: Matrix<'_>, n: usize, xs: &[FixedRow<'_>]) -> [f32; TILE] {
    let mut sums = [0f32; TILE];
    let mut open = SuperBlock::default();
    for (b, bytes) in w.row(n).chunks_exact(w.dtype.block_bytes()).enumerate() {
        K::open(w.dtype, bytes, &mut open);
        for (sum, x) in sums.iter_mut().zip(xs) {
            let x = block::<LOW>(x, b);
            *sum += term::<LOW>(&open, K::super_dot::<LOW>(&open, x), x.scale);
        }
    }
    sums
}

/// `s * (d * F - dmin * G)`.
#[inline(always)]
fn term<const LOW: bool>(w: &SuperBlock, sums: Sums, scale: f32) -> f32 {
    let f = if LOW { join(sums.hi, sums.lo) } else { sums.hi as f32 };
    scale * (w.d * f - w.dmin * sums.min as f32)
}

#[inline(always)]
pub(crate) fn block<'a, const LOW: bool>(x: &FixedRow<'a>, b: usize) -> Block<'a> {
    let plane = |p: &'a [i8]| p[b * 256..][..256].try_into().expect("a slice of 256");
    let sums = |s: &'a [i16]| s[b * 16..][..16].try_into().expect("a slice of 16");
    let (lo, sum_lo) = if LOW { (x.lo, x.sum_lo) } else { (x.hi, x.sum_hi) };
    Block { hi: plane(x.hi), lo: plane(lo), sum_hi: sums(x.sum_hi), sum_lo: sums(sum_lo), scale: x.scale[b] }
}

/// Weight rows of a panel: the 32-bit lanes of the widest vector.
pub(crate) const PANEL: usize = 16;

/// Up to [`PANEL`] weight rows and the activation rows they meet.
pub(crate) struct Panel<'a> {
    w: Matrix<'a>,
    rows: Range<usize>,
    x: Vec<FixedRow<'a>>,
    /// Outputs to a row of `out`, and where this panel's begin.
    stride: usize,
    offset: usize,
}

/// A block column of a panel: one opened super-block a row; rows that do not exist are zero.
pub(crate) struct Opened {
    pub(crate) rows: [SuperBlock; PANEL],
    /// Whether a scale covers 32 weights.
    pub(crate) wide: bool,
}

impl Opened {
    pub(crate) fn new() -> Opened {
        Opened { rows: std::array::from_fn(|_| SuperBlock::default()), wide: false }
    }
}

impl Panel<'_> {
    pub(crate) fn picks(&self) -> usize {
        self.x.len()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.w.k / 256
    }

    #[inline(always)]
    pub(crate) fn open<K: Kernels>(&self, b: usize, into: &mut Opened) {
        let size = self.w.dtype.block_bytes();
        into.wide = matches!(self.w.dtype, Dtype::Q4K | Dtype::Q5K);
        for (n, open) in self.rows.clone().zip(&mut into.rows) {
            K::open(self.w.dtype, &self.w.row(n)[b * size..][..size], open);
        }
    }

    /// Block `b` of the `i`-th activation row. For one plane, the low parts alias the high ones.
    #[inline(always)]
    pub(crate) fn block(&self, i: usize, b: usize) -> Block<'_> {
        if self.x[i].lo.is_empty() { block::<false>(&self.x[i], b) } else { block::<true>(&self.x[i], b) }
    }

    /// Copies `[picks][PANEL]` sums to their places in `out`.
    pub(crate) fn store(&self, sums: &[[f32; PANEL]], out: &mut [f32]) {
        for (i, sums) in sums.iter().enumerate() {
            out[i * self.stride + self.offset..][..self.rows.len()].copy_from_slice(&sums[..self.rows.len()]);
        }
    }
}

#[inline(always)]
fn super_panels<K: Kernels, const LOW: bool>(
    w: Matrix<'_>,
    rows: Range<usize>,
    x: &Fixed,
    picks: &[u32],
    out: &mut [f32],
) -> bool {
    let xs: Vec<_> = picks.iter().map(|&t| x.row(t as usize)).collect();
    let mut panel = Panel { w, rows: 0..0, x: xs, stride: rows.len(), offset: 0 };
    for start in rows.clone().step_by(PANEL) {
        panel.rows = start..(start + PANEL).min(rows.end);
        panel.offset = start - rows.start;
        if !K::super_panel::<LOW>(&panel, out) {
            return false;
        }
    }
    true
}

struct FloatProduct<'a> {
    w: Matrix<'a>,
    rows: Range<usize>,
    x: &'a [f32],
    picks: &'a [u32],
    out: &'a mut [f32],
}

impl Task for FloatProduct<'_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        let FloatProduct { w, rows, x, picks, out } = self;
        let stride = rows.len();
        let mut row = vec![0f32; w.k];
        for n in rows.clone() {
            quant::dequantise_row(w.dtype, w.row(n), &mut row);
            for (i, &t) in picks.iter().enumerate() {
                out[i * stride + n - rows.start] = ops::dot::<32>(&row, &x[t as usize * w.k..][..w.k]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Random bytes.
    fn bytes(seed: u64, n: usize) -> Vec<u8> {
        let mut s = seed | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 32) as u8
        };
        (0..n).map(|_| next()).collect()
    }

    /// Makes the scales of every block finite, below 2: what is NaN would agree with anything.
    fn tame(dtype: Dtype, blocks: &mut [u8]) {
        let halves = match dtype {
            Dtype::Q2K => 80..84,
            Dtype::Q3K => 108..110,
            Dtype::Q6K => 208..210,
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => 0..2,
            _ => 0..4,
        };
        for block in blocks.chunks_exact_mut(dtype.block_bytes()) {
            block[halves.clone()].iter_mut().skip(1).step_by(2).for_each(|upper| *upper &= 0xbf);
        }
    }

    /// `extreme`: every byte of the weights, and the sign of activations that are all alike.
    fn check(dtype: Dtype, blocks: usize, rows: usize, picks: u32, seed: u64, extreme: Option<(u8, f32)>) {
        let (k, row_bytes) = (blocks * dtype.block_len(), blocks * dtype.block_bytes());
        let mut bytes = match extreme {
            Some((byte, _)) => vec![byte; rows * row_bytes],
            None => bytes(seed, rows * row_bytes),
        };
        tame(dtype, &mut bytes);
        let w = Matrix { dtype, k, rows, row_bytes, bytes: &bytes };
        let value = |i: usize| match extreme {
            Some((_, sign)) => sign,
            None => f32::from((seed >> (i % 40)) as u8 as i8),
        };
        let float: Vec<f32> = (0..picks as usize * k).map(value).collect();
        for activations in [Activations::A16, Activations::A8] {
            let mut x = Operand { k, float: float.clone(), ..Operand::default() };
            x.fixed.reset(picks as usize, k, activations);
            x.fixed.rows_mut().zip(float.chunks_exact(k)).for_each(|(mut row, x)| row.fill(x));
            let picks: Vec<u32> = (0..picks).collect();
            let run = |isa: Isa| {
                let mut out = vec![f32::NAN; picks.len() * rows];
                product(isa, w, 0..rows, &x, &picks, &mut out);
                assert!(out.iter().all(|v| v.is_finite()));
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let want = run(Isa::available()[0]);
            for isa in Isa::available() {
                assert_eq!(run(isa), want, "{dtype} {} {}", activations.name(), isa.name());
            }
        }
    }

    proptest! {
        /// Rows whose ends fall anywhere in a group of blocks, and a last group of any length.
        #[test]
        fn one_row_meets_a_stream_of_any_shape(seed: u64, which in 0usize..5, blocks in 1usize..20, rows in 1usize..20) {
            let dtype = [Dtype::Q2K, Dtype::Q3K, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K][which];
            check(dtype, blocks, rows, 1, seed, None);
        }

        /// Groups of blocks and tiles of activation rows that are not full.
        #[test]
        fn small_blocks_of_any_shape(seed: u64, which in 0usize..5, blocks in 1usize..20, rows in 1usize..4, picks in 1u32..18) {
            let dtype = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1][which];
            check(dtype, blocks, rows, picks, seed, None);
        }
    }

    #[test]
    fn the_largest_codes_and_scales_do_not_overflow() {
        for dtype in [Dtype::Q4K, Dtype::Q5K, Dtype::Q6K] {
            for byte in [0x00, 0x7f, 0x80, 0xff] {
                check(dtype, 3, 5, 1, 0, Some((byte, 1.0)));
                check(dtype, 3, 5, 1, 0, Some((byte, -1.0)));
            }
        }
    }
}
