//! Products with few columns, which the bytes of the weights bound: streamed by as many blocks of threads as there are
//! processors (`kernels/product_stream.cu`). For super-block types; where it does not fit, `product.rs` has the rest.

use gguf::Dtype;
use model::{Ffn, Moe};
use quant::fixed::Activations;

use super::decode::shared_memory;
use super::group::Groups;
use super::product::{Epilogue, slot_bytes};
use crate::buffers::{Fixed, FixedArg};
use crate::driver::{Argument, Arguments, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::layout::TILE;
use crate::weights::{Matrix, MatrixArg};
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("product_stream.cu", &["product_stream_8", "product_stream_16"]);

/// `WARPS` of the kernel.
pub(super) const WARPS: usize = 16;
/// `MAX_SLOTS` of the kernel: of the ring.
pub(super) const MAX_SLOTS: usize = 48;
/// `MAX_PAIRS` of the kernel.
pub(super) const MAX_PAIRS: usize = 512;
/// The most experts whose pairs a block counts.
const MAX_EXPERTS: usize = 1024;
/// Columns that pairs of an expert come in, and the mean of them up to which that is enough for most.
const PAIR_COLUMNS: usize = 8;
const MOST_PAIRS: usize = 5;
/// Values of k in a slice.
const SLICE: usize = 256;

/// The activations, and which of them meet which matrix.
#[derive(Clone, Copy)]
pub(crate) enum Streamed<'a> {
    /// So many rows, one matrix.
    Rows(&'a Fixed, usize),
    /// So many of the step's pairs, each with its expert's matrix; the pairs of a row read the same row.
    OfRows(&'a Fixed, usize),
    /// Likewise, but a row a pair, of floats.
    OfPairs(Ptr, usize),
}

impl Streamed<'_> {
    fn count(&self) -> usize {
        let (Streamed::Rows(_, count) | Streamed::OfRows(_, count) | Streamed::OfPairs(_, count)) = self;
        *count
    }
}

/// The twin of `Job` in product_stream.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Job {
    matrices: [MatrixArg; 3],
    out: [Ptr; 3],
    x: FixedArg,
    values: Ptr,
    experts: Ptr,
    settled: u32,
    count: u32,
    k: u32,
    columns: u32,
    share: u32,
    epilogue: u32,
    pass: u32,
    slots: u32,
    slice_bytes: [u32; 3],
    slot_bytes: u32,
    narrow: u32,
    per_slices: u64,
    per_tiles: u64,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for Job {}

/// How a product is spread over the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// Units whose terms meet at a time.
    pass: usize,
    slots: usize,
    grid: usize,
    /// Bytes.
    shared: usize,
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy)]
struct Work {
    /// Columns of a group: 8 or 16.
    columns: usize,
    /// Blocks of a row.
    blocks: usize,
    /// Slices of a unit.
    slices: usize,
    /// Units at most.
    units: usize,
    /// Of the largest slice.
    slot_bytes: usize,
    /// 0 for a dense model.
    experts: usize,
    planes: usize,
}

impl Work {
    /// For `limit` bytes of shared memory; nothing where not even one slice to a warp fits.
    fn plan(self, processors: usize, limit: usize) -> Option<Plan> {
        let Work { columns, blocks, slices, units, slot_bytes, experts, planes } = self;
        let grid = processors.min(units);
        let share = units.div_ceil(grid);
        let pass = (WARPS / slices).clamp(1, share);
        // `State` of the kernel, panels, terms; then the ring.
        let state = (8 * (MAX_SLOTS + 1) + 6 * MAX_PAIRS + 4 * (experts.max(1) + 2)).next_multiple_of(16);
        let panels = blocks * columns * (planes * 272 + 64 + 32);
        let fixed = state + panels + 2 * pass * slices * 32 * columns * size_of::<f32>();
        let fit = limit.saturating_sub(fixed) / slot_bytes;
        // No more than the slices of a block, and one to a warp at least.
        let slots = fit.min(MAX_SLOTS).min((share * slices).max(WARPS));
        (slots >= WARPS).then_some(Plan { pass, slots, grid, shared: fixed + slots * slot_bytes })
    }
}

/// For `quotient` of the kernel, by `n`.
fn inverse(n: usize) -> u64 {
    (1u64 << 32).div_ceil(n as u64) // `usize` is at most 64 bits wide.
}

/// Whether all of these are of super-blocks, which the kernel takes.
fn all_super(matrices: &[(Matrix, Ptr)]) -> bool {
    let is_super = |d| matches!(d, Dtype::Q2K | Dtype::Q3K | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K);
    matrices.iter().all(|(w, _)| is_super(w.dtype))
}

impl Cuda {
    /// The products of up to three matrices with the same rows of activations; whether it ran.
    pub(crate) fn streamed(
        &self,
        list: &[(Matrix, Ptr)],
        x: Streamed<'_>,
        epilogue: Epilogue,
    ) -> Result<bool, Error> {
        let Some((columns, groups)) = self.stream_columns(x).filter(|_| all_super(list)) else {
            return Ok(false);
        };
        let (first, _) = list[0];
        let tiles = |w: &Matrix| w.rows.div_ceil(TILE);
        let blocks = first.k / SLICE;
        let (slices, tiles) = match epilogue {
            Epilogue::SwiGlu => (2 * blocks, tiles(&first)),
            _ => (blocks, list.iter().map(|(w, _)| tiles(w)).sum()),
        };
        let work = Work {
            columns,
            blocks,
            slices,
            units: groups * tiles,
            slot_bytes: list.iter().map(|(w, _)| slot_bytes(w.dtype)).max().unwrap_or(0),
            experts: self.moe().map_or(0, |moe| moe.experts),
            planes: if self.activations == Activations::A16 { 2 } else { 1 },
        };
        let gpu = &self.device.gpu;
        let Some(plan) = work.plan(gpu.processors, shared_memory(gpu.arch)) else { return Ok(false) };
        let (fixed, values) = match x {
            Streamed::Rows(fixed, _) | Streamed::OfRows(fixed, _) => (fixed.arg(), Ptr::NULL),
            Streamed::OfPairs(values, _) => (FixedArg::NONE, values),
        };
        let used = self.moe().map_or(1, |moe| moe.used);
        let nth = |i: usize| list.get(i).copied().unwrap_or((first, Ptr::NULL));
        let job = Job {
            matrices: [0, 1, 2].map(|i| nth(i).0.arg()),
            out: [0, 1, 2].map(|i| nth(i).1),
            x: fixed,
            values,
            experts: if matches!(x, Streamed::Rows(..)) { Ptr::NULL } else { self.buffers.experts.ptr() },
            settled: u32::from(self.routed && matches!(x, Streamed::OfPairs(..))),
            count: size(list.len()),
            k: size(first.k),
            columns: size(x.count()),
            share: if matches!(x, Streamed::OfRows(..)) { size(used) } else { 1 },
            epilogue: epilogue as u32,
            pass: size(plan.pass),
            slots: size(plan.slots),
            slice_bytes: [0, 1, 2].map(|i| size(slot_bytes(nth(i).0.dtype))),
            slot_bytes: size(work.slot_bytes),
            narrow: u32::from(list.iter().all(|(w, _)| matches!(w.dtype, Dtype::Q4K | Dtype::Q6K))),
            per_slices: inverse(slices),
            per_tiles: inverse(tiles),
        };
        let kernel = if columns == 8 { "product_stream_8" } else { "product_stream_16" };
        let shape = Shape::new(plan.grid, size(32 * WARPS)).shared(plan.shared);
        self.kernels.get(kernel).launch(&self.device, shape, Arguments::default().push(job))?;
        Ok(true)
    }

    /// Columns of a group, and groups at most; nothing where the columns are too many.
    fn stream_columns(&self, x: Streamed<'_>) -> Option<(usize, usize)> {
        let count = x.count();
        if let Streamed::Rows(..) = x {
            let columns = if count <= 8 { 8 } else { 16 };
            return (count <= columns).then_some((columns, 1));
        }
        let moe = self.moe()?;
        let few =
            count <= MAX_PAIRS && moe.experts <= MAX_EXPERTS && count.div_ceil(moe.experts) <= MOST_PAIRS;
        few.then(|| (PAIR_COLUMNS, Groups::max_tiles(count, moe.experts, PAIR_COLUMNS)))
    }

    fn moe(&self) -> Option<Moe> {
        match self.model.config.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pass, slots and grid on an H200.
    fn check(work: Work, want: Option<(usize, usize, usize)>) {
        let limit = shared_memory(90);
        let plan = work.plan(132, limit);
        assert_eq!(plan.map(|p| (p.pass, p.slots, p.grid)), want, "{work:?}");
        assert!(plan.is_none_or(|p| p.shared <= limit));
    }

    #[test]
    fn rings_are_as_deep_as_memory_allows() {
        let base =
            Work { columns: 8, blocks: 8, slices: 8, units: 160, slot_bytes: 4608, experts: 128, planes: 2 };
        // Of the 30B-A3B shape: Q, K and V with V in Q6_K; the output projection; gate and up; down; the head.
        check(Work { slot_bytes: 6720, ..base }, Some((2, 16, 132)));
        check(Work { blocks: 16, slices: 16, units: 64, ..base }, Some((1, 16, 64)));
        check(Work { slices: 16, units: 64 * 24, ..base }, Some((1, 32, 132)));
        check(Work { blocks: 3, slices: 3, units: 64 * 64, slot_bytes: 6720, ..base }, Some((5, 26, 132)));
        check(Work { units: 4748, slot_bytes: 6720, ..base }, Some((2, 22, 132)));
        // Two groups of columns of long rows leave no room for the ring.
        check(Work { columns: 16, blocks: 16, slices: 16, units: 64, ..base }, None);
    }
}
