//! Products of a step's rows with whole matrices, shared out over the threads. Knows no stage.

use std::ops::Range;

use gguf::Tensor;
use quant::fixed::Activations;
use rayon::prelude::*;

use crate::isa::Isa;
use crate::matmul::{Fill, Matrix, Operand, is_quantised, product};

/// Weight rows of one task: enough to amortise the hand-over, few enough to share evenly; whole panels.
const CHUNK: usize = 64;

/// An output matrix whose columns are written by several threads.
pub(super) struct Columns<'a> {
    at: *mut f32,
    rows: usize,
    stride: usize,
    _owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `put` writes only what its caller owns by contract: distinct columns for distinct tasks.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    /// Rows of `stride` columns.
    pub(super) fn new(out: &'a mut [f32], stride: usize) -> Columns<'a> {
        Columns { rows: out.len() / stride, at: out.as_mut_ptr(), stride, _owner: std::marker::PhantomData }
    }

    /// Copies `values` to row `row` from column `column` on.
    ///
    /// # Safety
    /// No other thread writes these columns of this row.
    pub(super) unsafe fn put(&self, row: usize, column: usize, values: &[f32]) {
        assert!(row < self.rows && column + values.len() <= self.stride);
        // SAFETY: inside the slice by the assertion; exclusive by contract.
        unsafe {
            let at = self.at.add(row * self.stride + column);
            at.copy_from_nonoverlapping(values.as_ptr(), values.len());
        }
    }
}

/// Fills `operand` from `x` (`[T, K]`), in fixed point as well if one of `weights` needs it.
pub(super) fn prepare(
    isa: Isa,
    operand: &mut Operand,
    x: &[f32],
    k: usize,
    weights: &[&Tensor],
    activations: Activations,
) {
    operand.k = k;
    operand.float.clear();
    operand.float.extend_from_slice(x);
    if weights.iter().any(|w| is_quantised(w.dtype)) {
        operand.fixed.reset(x.len() / k, k, activations);
        let rows: Vec<_> = operand.fixed.rows_mut().zip(x.chunks_exact(k)).collect();
        rows.into_par_iter().for_each(|(row, x)| isa.run(Fill(row, x)));
    }
}

/// `out[t] = w x[t]` for every pair of matrix and output; all row chunks of all matrices share the threads.
pub(super) fn project(isa: Isa, x: &Operand, picks: &[u32], pairs: &mut [(Matrix<'_>, &mut [f32])]) {
    let outs: Vec<_> = pairs.iter_mut().map(|(w, out)| (*w, Columns::new(out, w.rows))).collect();
    let tasks: Vec<_> =
        outs.iter().flat_map(|(w, out)| chunks(w.rows).map(move |rows| (w, out, rows))).collect();
    tasks.into_par_iter().for_each_init(Vec::new, |tile, (w, out, rows)| {
        let n = rows.len();
        tile.resize(picks.len() * n, 0.0);
        product(isa, *w, rows.clone(), x, picks, tile);
        for (t, values) in tile.chunks_exact(n).enumerate() {
            // SAFETY: tasks of one matrix have disjoint ranges of rows, which are its output's columns.
            unsafe { out.put(t, rows.start, values) };
        }
    });
}

/// A matrix's rows in tasks.
pub(super) fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(CHUNK).map(move |start| start..(start + CHUNK).min(rows))
}
