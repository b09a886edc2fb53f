//! Products of weights with any number of activation rows: block-quantised ones on int8 tensor cores
//! (`kernels/product.cu`), float ones in the order of rule 2 (`kernels/float_product.cu`).

use gguf::Dtype;
use quant::fixed::Activations;

use super::decode::shared_memory;
use super::group::{Groups, GroupsArg};
use crate::buffers::{Fixed, FixedArg};
use crate::driver::{Argument, Arguments, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::{Matrix, MatrixArg};
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("product.cu", &["product_8", "product_16", "product_64"]);
pub(crate) const UNIT_FLOAT: UnitOf = ("float_product.cu", &["float_product"]);

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
    /// For about `columns` columns to a matrix, on a GPU with more than 99 KB of shared memory to a block or not.
    fn of(columns: usize, large: bool) -> Tiling {
        let few = |kernel, columns| {
            let slots = if large { 4 } else { 2 };
            Tiling { kernel, columns, row_tiles: 2, sides: 1, slots }
        };
        match columns {
            0..=8 => few("product_8", 8),
            9..=16 => few("product_16", 16),
            _ => {
                let columns = if large { 64 } else { 32 };
                Tiling { kernel: "product_64", columns, row_tiles: 4, sides: 2, slots: 1 }
            }
        }
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
        stages * self.slots * room + terms + 4 * self.columns
    }
}

/// `async_wait_but` of product.cu knows up to three groups of copies behind the newest stage.
const MAX_STAGES: usize = 5;
/// Values of k in a slot.
const SLOT: usize = 256;

/// Whether a matrix of this type reads activations in fixed point.
pub(crate) fn is_quantised(matrix: &Matrix) -> bool {
    !matches!(matrix.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Bytes of a tile of 32 rows by 256 values.
fn slot_bytes(dtype: Dtype) -> usize {
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
        self.tiling(Columns::Pairs { count: pairs, share: 1 }).columns
    }

    /// The products of up to three matrices with the same rows, all quantised ones in one launch.
    pub(crate) fn products(
        &self,
        list: &[(Matrix, Ptr)],
        x: Input<'_>,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let (quantised, float): (Vec<_>, Vec<_>) = list.iter().partition(|(w, _)| is_quantised(w));
        if !quantised.is_empty() {
            self.quantised_products(&quantised, x, epilogue)?;
        }
        float.iter().try_for_each(|(w, out)| self.float_product(w, *out, x, epilogue))
    }

    fn tiling(&self, columns: Columns) -> Tiling {
        let large = shared_memory(self.device.gpu.arch) > 99 << 10;
        Tiling::of(
            match columns {
                Columns::Rows(rows) => rows,
                Columns::Pairs { count, .. } => count.div_ceil(self.experts()),
            },
            large,
        )
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

    fn quantised_products(
        &self,
        list: &[(Matrix, Ptr)],
        x: Input<'_>,
        epilogue: Epilogue,
    ) -> Result<(), Error> {
        let (first, _) = list[0];
        let tiling = self.tiling(x.columns);
        let planes = if self.activations == Activations::A16 { 2 } else { 1 };
        let weight_bytes = list.iter().map(|(w, _)| slot_bytes(w.dtype)).max().unwrap_or(0);
        let limit = shared_memory(self.device.gpu.arch);
        // One stage more than there are: then everything is under way at once.
        let steps = first.k.div_ceil(SLOT).div_ceil(tiling.slots) + 1;
        let fits = |&stages: &usize| tiling.shared(stages, weight_bytes, planes) <= limit;
        let stages = (1..=steps.min(MAX_STAGES)).rev().find(fits).unwrap_or(1);
        let shared = tiling.shared(stages, weight_bytes, planes);
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
        let tiles: usize = list.iter().map(|(w, _)| w.rows.div_ceil(crate::layout::TILE)).sum();
        let groups = self.column_groups(x.columns, tiling.columns);
        let shape = Shape::new(0, size(tiling.threads())).shared(shared);
        let function = self.kernels.get(tiling.kernel);
        function.allow_shared(shared)?;
        function.launch(
            &self.device,
            shape.grid(tiles.div_ceil(tiling.row_tiles), groups, 1),
            Arguments::default().push(job),
        )
    }

    fn float_product(&self, w: &Matrix, out: Ptr, x: Input<'_>, epilogue: Epilogue) -> Result<(), Error> {
        /// `COLUMNS`, `ROWS` and `WARPS` of float_product.cu.
        const COLUMNS: usize = 8;
        const ROWS: usize = 4;
        const WARPS: usize = 4;
        assert!(epilogue != Epilogue::SwiGlu, "two matrices of one launch are both quantised");
        // Pairs come in the tiles that `group` made; rows in as many columns as a warp takes at once.
        let (rows, share, width) = match x.columns {
            Columns::Rows(rows) => (rows, 0, COLUMNS),
            Columns::Pairs { share, .. } => (0, share, self.tiling(x.columns).columns),
        };
        let arguments = Arguments::default()
            .push(w.arg())
            .push(x.float)
            .push(out)
            .push(self.buffers.groups.arg())
            .push(size(w.k))
            .push(size(rows))
            .push(size(share))
            .push(epilogue as u32);
        let groups = self.column_groups(x.columns, width);
        let shape = Shape::new(0, size(32 * WARPS)).grid(w.rows.div_ceil(ROWS * WARPS), groups, 1);
        self.kernels.get("float_product").launch(&self.device, shape, arguments)
    }
}
