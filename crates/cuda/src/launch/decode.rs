//! Batch-1 decode: the stages with norm, rounding, product and what follows it fused into one launch each
//! (`kernels/decode*.cu`), where the model's shape and types allow it.
//!
//! Every function answers whether it ran the stage; where it did not, the general path does. Bits are the same.

use std::sync::Arc;

use gguf::Dtype;
use quant::fixed::Activations;

use crate::driver::{Argument, Arguments, Device, Memory, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::{Ffn, Matrix};
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("decode.cu", &["decode_qkv", "decode_attn_out"]);
pub(crate) const UNIT_FFN: UnitOf = ("decode_ffn.cu", &["decode_up", "decode_down"]);
pub(crate) const UNIT_HEAD: UnitOf = ("decode_head.cu", &["decode_head"]);
pub(crate) const UNIT_ROUTE: UnitOf = ("decode_route.cu", &["decode_route"]);

/// `WARPS` of `decode_stream.cuh`.
const WARPS: usize = 16;
const THREADS: u32 = 32 * WARPS as u32;
/// Weight rows of a slice: an octet.
const OCTET: usize = 8;
/// Values of a slice.
const SLICE: usize = 256;
/// `ROWS` of `decode_route.cu`: router rows to a block of threads.
const ROUTER_ROWS: usize = 4;
/// The deepest ring that `wait_copies` knows.
const MAX_SLOTS: usize = 8;
/// Shared memory for the terms of a pass: enough that a whole share fits, but for the head's.
const TERM_BYTES: usize = 16 << 10;
/// Shared memory of a block of threads where the processor has more: half, so that the next kernel's block fits beside it.
const SHARED: usize = 112 << 10;
/// What a block of threads may have on the smallest processors (sm_86, sm_89, sm_120), less its static arrays.
const SHARED_SMALL: usize = 96 << 10;

/// The twin of `Plan` in `decode_stream.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PlanArg {
    pass: u32,
    slots: u32,
    slot_bytes: u32,
    ring: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for PlanArg {}

/// How a product is spread over the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    arg: PlanArg,
    grid: usize,
    shared: usize,
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy)]
struct Work {
    /// Octets of output rows.
    octets: usize,
    /// Slices of an octet.
    columns: usize,
    /// Values of the activation row that a block of threads holds.
    values: usize,
    /// Bytes of the largest slice.
    slice: usize,
}

/// The processors and what the model makes of them.
#[derive(Debug, Clone, Copy)]
struct Machine {
    processors: usize,
    /// Bytes of shared memory to a block of threads.
    shared: usize,
    /// Terms of a slice of any of the model's types: `TERMS` of `dot.cuh`.
    terms: usize,
    planes: usize,
}

impl Machine {
    fn plan(&self, work: Work) -> Plan {
        let grid = self.processors.min(work.octets);
        let share = work.octets.div_ceil(grid);
        let planes = planes_bytes(work.values, self.planes);
        let octet_terms = work.columns * self.terms * OCTET * size_of::<f32>();
        let pass = (TERM_BYTES / octet_terms).clamp(1, share);
        let ring = planes + pass * octet_terms;
        // As deep as a warp has slices, if there is room.
        let wanted = (share * work.columns).div_ceil(WARPS).min(MAX_SLOTS);
        let slots = (self.shared.saturating_sub(ring) / (WARPS * work.slice)).clamp(1, wanted);
        let arg =
            PlanArg { pass: size(pass), slots: size(slots), slot_bytes: size(work.slice), ring: size(ring) };
        Plan { arg, grid, shared: ring + WARPS * slots * work.slice }
    }
}

/// Bytes of `Planes<K>` in `row.cuh`.
fn planes_bytes(k: usize, planes: usize) -> usize {
    let low = if planes == 2 { k } else { 16 };
    (k + low + k / 16 * size_of::<i32>() + k / SLICE * size_of::<f32>()).next_multiple_of(16)
}

/// Bytes of eight rows by 256 values, for the types that the kernels know.
fn slice_bytes(dtype: Dtype) -> Option<usize> {
    let known = matches!(dtype, Dtype::Q4K | Dtype::Q5K | Dtype::Q6K | Dtype::Q8_0);
    known.then(|| OCTET * SLICE / dtype.block_len() * dtype.block_bytes())
}

/// The largest slice of matrices that the kernels can all multiply.
fn largest_slice(matrices: &[Matrix]) -> Option<usize> {
    matrices
        .iter()
        .map(|m| (m.k.is_multiple_of(SLICE)).then(|| slice_bytes(m.dtype))?)
        .try_fold(0, |largest, slice| Some(largest.max(slice?)))
}

/// What the kernels keep between launches, and the greatest logit.
pub(crate) struct Scratch {
    /// Blocks of `decode_route` that have arrived: zero between launches.
    arrived: Memory<u32>,
    /// `Greatest` of `decode_head.cu`.
    greatest: Memory<u64>,
}

/// `Greatest` in words of 64 bits.
const GREATEST: usize = 4;

impl Scratch {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Scratch, Error> {
        Ok(Scratch { arrived: device.zeros(1)?, greatest: device.zeros(GREATEST)? })
    }

    /// Where `decode_head` leaves `order_key(logit) << 32 | !id` of the greatest logit, the lowest id of equals; after it
    /// a `u32`: how many logits are not finite.
    #[expect(dead_code, reason = "for a greedy sampler that does not read the logits again")]
    pub(crate) fn greatest(&self) -> Ptr {
        self.greatest.at(2)
    }
}

impl Cuda {
    fn machine(&self) -> Machine {
        let small = matches!(self.device.gpu.arch, 86 | 89 | 120..);
        let q8 = crate::kernels::types(&self.model).contains(&Dtype::Q8_0);
        Machine {
            processors: self.device.gpu.processors,
            shared: if small { SHARED_SMALL } else { SHARED },
            terms: if q8 { SLICE / Dtype::Q8_0.block_len() } else { 1 },
            planes: if self.activations == Activations::A16 { 2 } else { 1 },
        }
    }

    /// The plan of a product with `matrices`, or nothing where the general path must run.
    fn decode_plan(&self, matrices: &[Matrix], octets: usize, columns: usize, values: usize) -> Option<Plan> {
        let work = Work { octets, columns, values, slice: largest_slice(matrices)? };
        let machine = self.machine();
        let plan = machine.plan(work);
        (self.step.rows() == 1 && plan.shared <= machine.shared).then_some(plan)
    }

    fn launch_plan(&self, name: &str, plan: Plan, arguments: Arguments) -> Result<bool, Error> {
        let function = self.kernels.get(name);
        function.allow_shared(plan.shared)?;
        let shape = Shape::new(plan.grid, THREADS).shared(plan.shared);
        function.launch(&self.device, shape, arguments.push(plan.arg))?;
        Ok(true)
    }

    /// `qkv` in one launch.
    pub(crate) fn decode_qkv(&self, layer: usize) -> Result<bool, Error> {
        let (w, b, d) = (&self.weights.layers[layer], &self.buffers, self.model.config.hidden);
        let octets = [w.q, w.k, w.v].iter().map(|m| m.rows.div_ceil(OCTET)).sum();
        let Some(plan) = self.decode_plan(&[w.q, w.k, w.v], octets, d / SLICE, d) else { return Ok(false) };
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(w.attn_norm)
            .push(w.q.arg())
            .push(w.k.arg())
            .push(w.v.arg())
            .push(b.q.ptr())
            .push(b.k.ptr())
            .push(b.v.ptr());
        self.launch_plan("decode_qkv", plan, arguments)
    }

    /// `attn_out` in one launch; reads `attn_fixed`.
    pub(crate) fn decode_attn_out(&self, layer: usize) -> Result<bool, Error> {
        let (w, b) = (self.weights.layers[layer].out, &self.buffers);
        let Some(plan) = self.decode_plan(&[w], w.rows.div_ceil(OCTET), w.k / SLICE, w.k) else {
            return Ok(false);
        };
        let arguments = Arguments::default().push(b.attn_fixed.arg()).push(w.arg()).push(b.x.ptr());
        self.launch_plan("decode_attn_out", plan, arguments)
    }

    /// `route` in one launch.
    pub(crate) fn decode_route(&self, layer: usize) -> Result<bool, Error> {
        let (w, b, d) = (&self.weights.layers[layer], &self.buffers, self.model.config.hidden);
        let Ffn::Moe { router, .. } = w.ffn else { return Ok(false) };
        let bytes = match router.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            _ => return Ok(false),
        };
        // The row as floats and as planes, and the choice: `Shared` of decode_route.cu, which is static.
        let fixed = 4 * d + planes_bytes(d, 2) + 12 * router.rows.next_multiple_of(32) + (2 << 10);
        let rows = ROUTER_ROWS * d * bytes;
        if self.step.rows() != 1
            || !d.is_multiple_of(SLICE)
            || fixed > 48 << 10
            || fixed + rows > SHARED_SMALL
        {
            return Ok(false);
        }
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(w.ffn_norm)
            .push(router.arg())
            .push(b.normed.ptr())
            .push(b.normed_fixed.arg())
            .push(b.router_logits.ptr())
            .push(b.experts.ptr())
            .push(b.expert_weights.ptr())
            .push(b.decode.arrived.ptr());
        let function = self.kernels.get("decode_route");
        function.allow_shared(rows)?;
        let shape = Shape::new(router.rows.div_ceil(ROUTER_ROWS), THREADS).shared(rows);
        function.launch(&self.device, shape, arguments)?;
        Ok(true)
    }

    /// `experts_up` in one launch; reads `normed_fixed`.
    pub(crate) fn decode_experts_up(&self, layer: usize) -> Result<bool, Error> {
        self.decode_up(layer)
    }

    /// `experts_down` in one launch.
    pub(crate) fn decode_experts_down(&self, layer: usize) -> Result<bool, Error> {
        self.decode_down(layer)
    }

    /// `ffn` of a dense model in two launches.
    pub(crate) fn decode_ffn(&self, layer: usize) -> Result<bool, Error> {
        // Both or none: the general path makes both halves.
        Ok(self.up_plan(layer).is_some()
            && self.down_plan(layer).is_some()
            && self.decode_up(layer)?
            && self.decode_down(layer)?)
    }

    /// Chosen experts of a row; 1 for a dense model.
    fn ranks(&self) -> usize {
        match self.model.config.ffn {
            model::Ffn::Moe(moe) => moe.used,
            model::Ffn::Dense { .. } => 1,
        }
    }

    fn up_plan(&self, layer: usize) -> Option<Plan> {
        let (Ffn::Dense { gate, up, .. } | Ffn::Moe { gate, up, .. }) = self.weights.layers[layer].ffn;
        let octets = self.ranks() * gate.rows.div_ceil(OCTET);
        self.decode_plan(&[gate, up], octets, 2 * gate.k / SLICE, gate.k)
    }

    fn down_plan(&self, layer: usize) -> Option<Plan> {
        let (Ffn::Dense { down, .. } | Ffn::Moe { down, .. }) = self.weights.layers[layer].ffn;
        let values = self.ranks() * down.k;
        self.decode_plan(&[down], down.rows.div_ceil(OCTET), values / SLICE, values)
    }

    fn decode_up(&self, layer: usize) -> Result<bool, Error> {
        let (w, b) = (&self.weights.layers[layer], &self.buffers);
        let (Ffn::Dense { gate, up, .. } | Ffn::Moe { gate, up, .. }) = w.ffn;
        let Some(plan) = self.up_plan(layer) else { return Ok(false) };
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(w.ffn_norm)
            .push(b.normed_fixed.arg())
            .push(b.experts.ptr())
            .push(gate.arg())
            .push(up.arg())
            .push(b.hidden.ptr());
        self.launch_plan("decode_up", plan, arguments)
    }

    fn decode_down(&self, layer: usize) -> Result<bool, Error> {
        let (w, b) = (&self.weights.layers[layer], &self.buffers);
        let (Ffn::Dense { down, .. } | Ffn::Moe { down, .. }) = w.ffn;
        let Some(plan) = self.down_plan(layer) else { return Ok(false) };
        // Only `decode_up` holds its dependents back until the choice of experts stands.
        let early = u32::from(self.up_plan(layer).is_some());
        let arguments = Arguments::default()
            .push(b.hidden.ptr())
            .push(b.experts.ptr())
            .push(b.expert_weights.ptr())
            .push(down.arg())
            .push(b.x.ptr())
            .push(early);
        self.launch_plan("decode_down", plan, arguments)
    }

    /// `head` for one wanted row, in one launch. The step may have more rows.
    pub(crate) fn decode_head(&self) -> Result<bool, Error> {
        let (w, b, d) = (self.weights.head, &self.buffers, self.model.config.hidden);
        let Some(slice) = largest_slice(&[w]) else { return Ok(false) };
        let machine = self.machine();
        let plan =
            machine.plan(Work { octets: w.rows.div_ceil(OCTET), columns: d / SLICE, values: d, slice });
        if self.step.outputs() != 1 || plan.shared > machine.shared {
            return Ok(false);
        }
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(self.step.wanted())
            .push(self.weights.output_norm)
            .push(w.arg())
            .push(b.logits.ptr())
            .push(b.decode.greatest.ptr());
        self.launch_plan("decode_head", plan, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::TILE;

    /// The shares, the slots and the shared memory of a product on a GPU of 132 processors.
    fn check(octets: usize, columns: usize, dtype: Dtype, values: usize, want: (usize, u32, u32)) {
        let machine = Machine { processors: 132, shared: SHARED, terms: 1, planes: 2 };
        let slice = slice_bytes(dtype).unwrap();
        let plan = machine.plan(Work { octets, columns, values, slice });
        assert_eq!((plan.grid, plan.arg.pass, plan.arg.slots), want, "{octets} octets of {columns} {dtype}");
        assert!(plan.shared <= SHARED && plan.arg.ring % 16 == 0, "{plan:?}");
        assert!(
            slice % 16 == 0 && slice * TILE / OCTET == TILE * SLICE / dtype.block_len() * dtype.block_bytes()
        );
    }

    #[test]
    fn shares_fit_and_rings_hold_them() {
        check(640, 8, Dtype::Q4K, 2048, (132, 5, 3));
        check(256, 16, Dtype::Q4K, 4096, (132, 2, 2));
        check(256, 24, Dtype::Q6K, 6144, (132, 2, 3));
        check(18992, 8, Dtype::Q6K, 2048, (132, 64, 3));
        check(5, 1, Dtype::Q8_0, 256, (5, 1, 1));
    }
}
