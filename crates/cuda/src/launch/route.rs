//! `route`: the feed-forward norm, router logits and the choice of experts: of one row `launch/decode.rs`, of few in one
//! launch (`kernels/route_few.cu`), of many one kernel after the other (`kernels/route.cu`).

use gguf::Dtype;

use super::decode::shared_memory;
use crate::buffers::FixedArg;
use crate::driver::{Argument, Arguments, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::{Ffn, Matrix, MatrixArg};
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("route.cu", &["choose"]);
pub(crate) const UNIT_FEW: UnitOf = ("route_few.cu", &["route_few"]);

pub(super) const THREADS: u32 = 256;
/// A warp takes one row.
const ROWS_PER_BLOCK: usize = THREADS as usize / 32;

/// `COLUMNS` of `route_few.cu`: rows to a group, a warp each.
pub(super) const FEW_COLUMNS: usize = 8;
/// Groups of rows at most.
pub(crate) const FEW_GROUPS: usize = 8;
/// `MAX_HIDDEN` of `route_few.cu`: a row stays in a warp's registers.
pub(super) const FEW_HIDDEN: usize = 4096;
/// Blocks of threads to a processor, by their registers.
const FEW_BLOCKS: usize = 2;

/// The twin of `Job` in route_few.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct FewJob {
    x: Ptr,
    norm: Ptr,
    router: MatrixArg,
    normed: Ptr,
    fixed: FixedArg,
    logits: Ptr,
    experts: Ptr,
    weights: Ptr,
    arrived: Ptr,
    rows: u32,
    share: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for FewJob {}

/// How `route_few` is spread over the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Few {
    /// Router rows to a block of threads.
    share: usize,
    groups: usize,
    /// Bytes.
    shared: usize,
}

impl Few {
    /// For `rows` rows of `hidden` values, `experts` router rows with `bytes` a value, and `limit` bytes of shared memory;
    /// nothing where it cannot run.
    fn plan(
        rows: usize,
        hidden: usize,
        experts: usize,
        bytes: usize,
        processors: usize,
        limit: usize,
    ) -> Option<Few> {
        let groups = rows.div_ceil(FEW_COLUMNS);
        // Not more blocks than run at once: each makes its rows' norm anew.
        let share = (experts * groups).div_ceil(FEW_BLOCKS * processors);
        // `Shared` of the kernel, then the router's rows.
        let state = 4 * (hidden + 256 * FEW_COLUMNS + 1);
        let shared = state.next_multiple_of(16) + share * hidden * bytes;
        let runs = groups <= FEW_GROUPS && hidden.is_multiple_of(256) && hidden <= FEW_HIDDEN;
        (runs && shared <= limit).then_some(Few { share, groups, shared })
    }
}

impl Cuda {
    /// Writes `Normed` (and its fixed-point copy, which the experts read), `RouterLogits`, `Experts` and
    /// `ExpertWeights`.
    pub(crate) fn route(&mut self, layer: usize) -> Result<(), Error> {
        if self.decode_route(layer)? {
            return Ok(());
        }
        let weights = &self.weights.layers[layer];
        let Ffn::Moe { router, .. } = weights.ffn else {
            unreachable!("`run` refuses `route` for a dense model")
        };
        if self.route_few(weights.ffn_norm, router)? {
            return Ok(());
        }
        let (b, t) = (&self.buffers, self.step.rows());
        self.normalise(b.x.ptr(), None, t, weights.ffn_norm, Some(b.normed.ptr()), true)?;
        self.product(&router, b.normed.ptr(), &b.normed_fixed, t, b.router_logits.ptr())?;
        self.choose()
    }

    /// `route` of few rows in one launch; whether it ran.
    fn route_few(&self, norm: Ptr, router: Matrix) -> Result<bool, Error> {
        let (b, t) = (&self.buffers, self.step.rows());
        let bytes = match router.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            _ => return Ok(false),
        };
        let gpu = &self.device.gpu;
        let (processors, limit) = (gpu.processors, shared_memory(gpu.arch));
        let Some(plan) = Few::plan(t, router.k, router.rows, bytes, processors, limit) else {
            return Ok(false);
        };
        let job = FewJob {
            x: b.x.ptr(),
            norm,
            router: router.arg(),
            normed: b.normed.ptr(),
            fixed: b.normed_fixed.arg(),
            logits: b.router_logits.ptr(),
            experts: b.experts.ptr(),
            weights: b.expert_weights.ptr(),
            arrived: b.route_arrived.ptr(),
            rows: size(t),
            share: size(plan.share),
        };
        let shape = Shape::new(0, size(32 * FEW_COLUMNS)).shared(plan.shared);
        let shape = shape.grid(router.rows.div_ceil(plan.share), plan.groups, 1);
        self.kernels.get("route_few").launch(&self.device, shape, Arguments::default().push(job))?;
        Ok(true)
    }

    /// The best experts of each row of `RouterLogits`.
    pub(crate) fn choose(&self) -> Result<(), Error> {
        let (b, t) = (&self.buffers, self.step.rows());
        let arguments = Arguments::default()
            .push(b.router_logits.ptr())
            .push(size(t))
            .push(b.experts.ptr())
            .push(b.expert_weights.ptr());
        let shape = Shape::new(t.div_ceil(ROWS_PER_BLOCK), THREADS);
        self.kernels.get("choose").launch(&self.device, shape, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Router rows to a block and groups of rows, of the 30B-A3B shape on an H200.
    fn check(rows: usize, want: Option<(usize, usize)>) {
        let plan = Few::plan(rows, 2048, 128, 4, 132, shared_memory(90));
        assert_eq!(plan.map(|p| (p.share, p.groups)), want, "{rows} rows");
    }

    #[test]
    fn blocks_run_at_once() {
        check(2, Some((1, 1)));
        check(8, Some((1, 1)));
        check(9, Some((1, 2)));
        check(32, Some((2, 4)));
        check(64, Some((4, 8)));
        check(65, None);
    }
}
