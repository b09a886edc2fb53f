//! Products of weights with any number of activation rows: block-quantised ones on int8 tensor cores
//! (`kernels/product.cu`), float ones in the order of rule 2 (`kernels/float_product.cu`).

use gguf::Dtype;
use quant::fixed::Activations;

use super::decode::shared_memory;
use super::group::{Groups, GroupsArg};
use super::product_many;
use super::stream::Streamed;
use crate::buffers::{Fixed, FixedArg};
use crate::driver::{Argument, Arguments, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::{Matrix, MatrixArg};
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("product.cu", &["product_8", "product_16", "product_64"]);
pub(crate) const UNIT_FLOAT: UnitOf = ("float_product.cu", &["float_product_narrow"]);
pub(crate) const UNIT_FLOAT_TILE: UnitOf = ("float_tile.cu", &["float_tile_wide", "float_tile_broad"]);

/// What is done with a product `v`: the twin of `Epilogue` in the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// `out = v`.
    Store = 0,
    /// `out += v`.
    Add = 1,
    /// `out = silu(v) * out`.
    Gate = 2,
    /// `out = silu(v of the first matrix) * v of the second`.
    SwiGlu = 3,
}

/// The activation rows of a product, in both forms; a matrix reads the one that its type asks for.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    /// `[.., K]`.
    pub(crate) float: Ptr,
    pub(crate) fixed: &'a Fixed,
    pub(crate) columns: Columns,
}

/// Which rows meet which matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Columns {
    /// `T` rows, one matrix.
    Rows(usize),
    /// The step's (row, rank) pairs as `Cuda::group` sorted them, each with its expert's matrix; `share` pairs read the
    /// same row of the input.
    Pairs {
        /// `T * K`.
        count: usize,
        /// `K` where the input has a row a token, 1 where it has a row a pair.
        share: usize,
    },
}

/// The twin of `Job` in product.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Job {
    matrices: [MatrixArg; 3],
    out: [Ptr; 3],
    x: FixedArg,
    groups: GroupsArg,
    count: u32,
    k: u32,
    rows: u32,
    share: u32,
    epilogue: u32,
    weight_bytes: u32,
    stages: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for Job {}

/// The twin of `Job` in float_product.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct FloatJob {
    matrix: MatrixArg,
    x: Ptr,
    out: Ptr,
    groups: GroupsArg,
    k: u32,
    rows: u32,
    share: u32,
    epilogue: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for FloatJob {}

/// What a block of float_product.cu or float_tile.cu takes: the twin of `Shape` there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FloatTiling {
    kernel: &'static str,
    /// Of weights.
    rows: usize,
    columns: usize,
    threads: usize,
    /// Bytes of shared memory: three chunks of 128 values of each row, as `f32`.
    shared: usize,
}

impl FloatTiling {
    const NARROW: FloatTiling =
        FloatTiling { kernel: "float_product_narrow", rows: 4, columns: 8, threads: 128, shared: 0 };
    const WIDE: FloatTiling = FloatTiling::tile("float_tile_wide", 16);
    const BROAD: FloatTiling = FloatTiling::tile("float_tile_broad", 32);

    const fn tile(kernel: &'static str, columns: usize) -> FloatTiling {
        FloatTiling { kernel, rows: 32, columns, threads: 256, shared: 3 * (32 + columns) * 128 * 4 }
    }

    /// The broadest that has blocks for all processors (half of them at least).
    fn for_rows(rows: usize, weights: usize, processors: usize) -> FloatTiling {
        let fills = |t: FloatTiling, times| {
            rows >= t.columns && times * weights.div_ceil(t.rows) * rows.div_ceil(t.columns) >= processors
        };
        match rows {
            _ if fills(FloatTiling::BROAD, 1) => FloatTiling::BROAD,
            _ if fills(FloatTiling::WIDE, 2) => FloatTiling::WIDE,
            _ => FloatTiling::NARROW,
        }
    }

    fn for_pairs(mean: usize) -> FloatTiling {
        if mean >= FloatTiling::WIDE.columns { FloatTiling::WIDE } else { FloatTiling::NARROW }
    }
}

/// The twin of `Shape` in product.cu, and the kernel of that shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiling {
    kernel: &'static str,
    columns: usize,
    row_tiles: usize,
    /// Warps that share a row tile.
    sides: usize,
    /// Slots of 256 values of k that are worked on at once.
    slots: usize,
}

impl Tiling {
    /// Few columns: the warps of a block share out k instead, so that few blocks keep much memory under way.
    fn few(columns: usize, large: bool) -> Tiling {
        let kernel = if columns == 8 { "product_8" } else { "product_16" };
        Tiling { kernel, columns, row_tiles: 2, sides: 1, slots: if large { 4 } else { 2 } }
    }

    fn many(large: bool) -> Tiling {
        let columns = if large { 64 } else { 32 };
        Tiling { kernel: "product_64", columns, row_tiles: 4, sides: 2, slots: 1 }
    }

    /// For `rows` rows of activations and `tiles` tiles of weights, where a block has more than 99 KB of shared memory
    /// (`large`) or not.
    fn for_rows(rows: usize, tiles: usize, processors: usize, large: bool) -> Tiling {
        let many = Tiling::many(large);
        match rows {
            0..=8 => Tiling::few(8, large),
            // The widest shape does the least work for an output, but takes all of k one slot after the other: only
            // worth it where there are blocks for most processors.
            9.. if rows > 16 && 4 * many.blocks(tiles, rows) >= 3 * processors => many,
            _ => Tiling::few(16, large),
        }
    }

    /// For pairs, `mean` of them to an expert: some experts have twice as many, and two groups of columns then.
    fn for_pairs(mean: usize, large: bool) -> Tiling {
        match mean {
            0..=5 => Tiling::few(8, large),
            6..=12 => Tiling::few(16, large),
            _ => Tiling::many(large),
        }
    }

    /// Whether this is the widest shape.
    fn is_many(self) -> bool {
        self.kernel == "product_64"
    }

    /// Blocks of threads for so many tiles of weights and columns.
    fn blocks(self, tiles: usize, columns: usize) -> usize {
        tiles.div_ceil(self.row_tiles) * columns.div_ceil(self.columns)
    }

    /// How many stages to keep in `limit` bytes of shared memory for rows of `k` values: one more than there are, so that
    /// all are under way at once; but where blocks outnumber processors (`crowded`), what leaves room for two blocks,
    /// which hide each other's beginnings and ends.
    fn stages(self, k: usize, weight_bytes: usize, planes: usize, limit: usize, crowded: bool) -> usize {
        let steps = k.div_ceil(SLOT).div_ceil(self.slots);
        let most = if steps == 1 { 1 } else { (steps + 1).min(MAX_STAGES) };
        let limit = if crowded && self.slots > 1 { limit / 2 } else { limit };
        (1..=most).rev().find(|&n| self.shared(n, weight_bytes, planes) <= limit).unwrap_or(1)
    }

    fn threads(self) -> usize {
        32 * self.row_tiles * self.sides * self.slots
    }

    /// Bytes of `Panel` in product_blocks.cuh.
    fn panel(self, planes: usize) -> usize {
        self.columns * (planes * 272 + 64 + 32)
    }

    /// Shared memory for `stages` stages with `weight_bytes` to a tile's slot.
    fn shared(self, stages: usize, weight_bytes: usize, planes: usize) -> usize {
        let room = self.row_tiles * weight_bytes + self.panel(planes);
        let terms = if self.slots > 1 {
            self.row_tiles * self.slots * 2 * (self.columns / 8 / self.sides) * 512
        } else {
            0
        };
        stages * self.slots * room + terms + 8 * self.columns
    }
}

/// `async_wait_but` of product.cu knows up to three groups of copies behind the newest stage.
const MAX_STAGES: usize = 5;
/// Values of k in a slot.
pub(super) const SLOT: usize = 256;

/// Whether a matrix of this type reads activations in fixed point.
pub(crate) fn is_quantised(matrix: &Matrix) -> bool {
    !matches!(matrix.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Bytes of a tile of 32 rows by 256 values.
pub(super) fn slot_bytes(dtype: Dtype) -> usize {
    32 * dtype.block_bytes() * (SLOT / dtype.block_len())
}

impl Cuda {
    /// `out[t] = w x[t]` for `rows` rows.
    pub(crate) fn product(
        &self,
        w: &Matrix,
        float: Ptr,
        fixed: &Fixed,
        rows: usize,
        out: Ptr,
    ) -> Result<(), Error> {
        let x = Input { float, fixed, columns: Columns::Rows(rows) };
        self.products(&[(*w, out)], x, Epilogue::Store)
    }

    /// Columns to a tile of pairs: what `Cuda::group` is to make for the products of `pairs` pairs.
    pub(crate) fn group_columns(&self, pairs: usize) -> usize {
        self.tiling(Columns::Pairs { count: pairs, share: 1 }, 0).columns
    }

    /// The products of up to three matrices with the same rows, all quantised ones in one launch.
    pub(crate) fn products(
        &self,
        list: &[(Matrix, Ptr)],
        x: Input<'_>,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let (quantised, float): (Vec<_>, Vec<_>) = list.iter().partition(|(w, _)| is_quantised(w));
        let done = match x.columns {
            _ if quantised.is_empty() => true,
            Columns::Rows(rows) => self.streamed(&quantised, Streamed::Rows(x.fixed, rows), epilogue)?,
            Columns::Pairs { .. } => false,
        };
        if !done {
            self.quantised_products(&quantised, x, epilogue)?;
        }
        float.iter().try_for_each(|(w, out)| self.float_product(w, *out, x, epilogue))
    }

    /// The shape for these columns and, where they are rows, `tiles` tiles of weights.
    fn tiling(&self, columns: Columns, tiles: usize) -> Tiling {
        let large = shared_memory(self.device.gpu.arch) > 99 << 10;
        match columns {
            Columns::Rows(rows) => Tiling::for_rows(rows, tiles, self.device.gpu.processors, large),
            Columns::Pairs { count, .. } => Tiling::for_pairs(count.div_ceil(self.experts()), large),
        }
    }

    fn experts(&self) -> usize {
        match self.model.config.ffn {
            model::Ffn::Moe(moe) => moe.experts,
            model::Ffn::Dense { .. } => 1,
        }
    }

    /// Groups of columns: the grid's second dimension.
    fn column_groups(&self, columns: Columns, width: usize) -> usize {
        match columns {
            Columns::Rows(rows) => rows.div_ceil(width),
            Columns::Pairs { count, .. } => Groups::max_tiles(count, self.experts(), width),
        }
    }

    pub(super) fn quantised_products(
        &self,
        list: &[(Matrix, Ptr)],
        x: Input<'_>,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let (first, _) = list[0];
        let tiles: usize = list.iter().map(|(w, _)| w.rows.div_ceil(crate::layout::TILE)).sum();
        let tiling = self.tiling(x.columns, tiles);
        let planes = if self.activations == Activations::A16 { 2 } else { 1 };
        let weight_bytes = list.iter().map(|(w, _)| slot_bytes(w.dtype)).max().unwrap_or(0);
        let (across, groups) =
            (tiles.div_ceil(tiling.row_tiles), self.column_groups(x.columns, tiling.columns));
        let gpu = &self.device.gpu;
        let matrices = || list.iter().map(|(w, _)| w);
        let pair = epilogue == Epilogue::SwiGlu;
        let on_hopper = tiling.is_many() && product_many::can(gpu.arch, matrices(), pair);
        let (stages, shared) = if on_hopper {
            product_many::stages(gpu.arch, weight_bytes, planes)
        } else {
            let crowded = across * groups > gpu.processors;
            let stages = tiling.stages(first.k, weight_bytes, planes, shared_memory(gpu.arch), crowded);
            (stages, tiling.shared(stages, weight_bytes, planes))
        };
        let (rows, share) = match x.columns {
            Columns::Rows(rows) => (rows, 0),
            Columns::Pairs { share, .. } => (0, share),
        };
        let nth = |i: usize| list.get(i).copied().unwrap_or((first, Ptr::NULL));
        let job = Job {
            matrices: [0, 1, 2].map(|i| nth(i).0.arg()),
            out: [0, 1, 2].map(|i| nth(i).1),
            x: x.fixed.arg(),
            groups: self.buffers.groups.arg(),
            count: size(list.len()),
            k: size(first.k),
            rows: size(rows),
            share: size(share),
            epilogue: epilogue as u32,
            weight_bytes: size(weight_bytes),
            stages: size(stages),
        };
        let (kernel, shape) = if on_hopper {
            let blocks = product_many::items(matrices(), pair, groups).min(gpu.processors);
            (product_many::KERNEL, Shape::new(blocks, product_many::THREADS))
        } else {
            (tiling.kernel, Shape::new(0, size(tiling.threads())).grid(across, groups, 1))
        };
        let function = self.kernels.get(kernel);
        function.launch(&self.device, shape.shared(shared), Arguments::default().push(job))
    }

    fn float_product(&self, w: &Matrix, out: Ptr, x: Input<'_>, epilogue: Epilogue) -> Result<(), Error> {
        assert!(epilogue != Epilogue::SwiGlu, "two matrices of one launch are both quantised");
        let tiling = match x.columns {
            Columns::Rows(rows) => FloatTiling::for_rows(rows, w.rows, self.device.gpu.processors),
            Columns::Pairs { count, .. } => FloatTiling::for_pairs(count.div_ceil(self.experts())),
        };
        // Pairs come in the tiles that `group` made, and a block walks one.
        let (rows, share, width) = match x.columns {
            Columns::Rows(rows) => (rows, 0, tiling.columns),
            Columns::Pairs { share, .. } => (0, share, self.tiling(x.columns, 0).columns),
        };
        let job = FloatJob {
            matrix: w.arg(),
            x: x.float,
            out,
            groups: self.buffers.groups.arg(),
            k: size(w.k),
            rows: size(rows),
            share: size(share),
            epilogue: epilogue as u32,
        };
        let groups = self.column_groups(x.columns, width);
        let shape = Shape::new(0, size(tiling.threads)).shared(tiling.shared);
        let shape = shape.grid(w.rows.div_ceil(tiling.rows), groups, 1);
        self.kernels.get(tiling.kernel).launch(&self.device, shape, Arguments::default().push(job))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape for rows of activations on an H200.
    fn check(rows: usize, tiles: usize, kernel: &str) {
        assert_eq!(Tiling::for_rows(rows, tiles, 132, true).kernel, kernel, "{rows} rows, {tiles} tiles");
    }

    #[test]
    fn few_rows_share_out_k_until_many_fill_the_gpu() {
        // Of the 30B-A3B shape: Q, K and V are 160 tiles, the output projection 64, the head 4,748.
        check(1, 160, "product_8");
        check(8, 4748, "product_8");
        check(9, 4748, "product_16");
        check(17, 4748, "product_64");
        check(64, 160, "product_16");
        check(64, 64, "product_16");
        check(512, 160, "product_64");
        check(256, 64, "product_16");
        check(512, 64, "product_64");
    }

    #[test]
    fn float_tiles_are_as_broad_as_leaves_no_processor_idle() {
        // The router of the 30B-A3B shape; a head of floats.
        let check = |rows, weights, want| {
            assert_eq!(FloatTiling::for_rows(rows, weights, 132), want, "{rows} rows, {weights} weights");
        };
        check(2048, 128, FloatTiling::BROAD);
        check(512, 128, FloatTiling::WIDE);
        check(65, 128, FloatTiling::NARROW);
        check(8, 151_936, FloatTiling::NARROW);
        assert!(FloatTiling::BROAD.shared <= shared_memory(86));
    }

    #[test]
    fn stages_fit_every_gpu() {
        for arch in [80, 86, 87, 89, 90, 100, 103, 110, 120] {
            let (limit, large) = (shared_memory(arch), shared_memory(arch) > 99 << 10);
            for tiling in [Tiling::few(8, large), Tiling::few(16, large), Tiling::many(large)] {
                for dtype in Dtype::ALL.into_iter().filter(|d| d.block_len() > 1) {
                    for (k, crowded) in [(32, false), (768, true), (2048, true), (25_600, false)] {
                        let stages = tiling.stages(k, slot_bytes(dtype), 2, limit, crowded);
                        let shared = tiling.shared(stages, slot_bytes(dtype), 2);
                        assert!(
                            stages <= MAX_STAGES && shared <= limit,
                            "{tiling:?} {dtype} {k} on sm_{arch}: {shared}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn two_blocks_share_a_processor_where_there_are_blocks_for_it() {
        let (limit, q4) = (shared_memory(90), slot_bytes(Dtype::Q4K));
        let few = Tiling::few(8, true);
        assert_eq!([false, true].map(|crowded| few.stages(2048, q4, 2, limit, crowded)), [3, 1]);
        assert_eq!([768, 4096].map(|k| few.stages(k, q4, 2, limit, false)), [1, 3]);
        let many = [false, true].map(|crowded| Tiling::many(true).stages(2048, q4, 2, limit, crowded));
        assert_eq!(many, [3, 3]);
    }
}
