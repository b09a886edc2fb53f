//! Batch-1 decode: the stages with norm, rounding, product and what follows it fused into one launch each
//! (`kernels/decode*.cu`), where the model's shape and types allow it.
//!
//! Every function answers whether it ran the stage; where it did not, the general path does. Bits are the same.

use std::sync::Arc;

use gguf::Dtype;
use quant::fixed::Activations;

use crate::driver::{Argument, Arguments, Device, Memory, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::layout::BAND;
use crate::weights::{Ffn, Matrix};
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("decode.cu", &["decode_qkv", "decode_attn_out"]);
pub(crate) const UNIT_FFN: UnitOf = ("decode_ffn.cu", &["decode_up", "decode_down"]);
pub(crate) const UNIT_HEAD: UnitOf = ("decode_head.cu", &["decode_head"]);
pub(crate) const UNIT_ROUTE: UnitOf = ("decode_route.cu", &["decode_route"]);

/// `WARPS` of `decode_stream.cuh`.
const WARPS: usize = 16;
const THREADS: u32 = 32 * WARPS as u32;
/// Values of a slice.
const SLICE: usize = 256;
/// Slices that a warp has under way: as many as it will multiply, or enough to hide the memory's latency. All of
/// `decode_up`'s, whose last would else queue behind what `decode_down` asks for meanwhile. At most `SLOTS` of
/// `decode_stream.cuh`.
const DEPTH: usize = 3;
/// Shared memory for the terms of a pass: enough for a whole share, but for the head's.
const TERM_BYTES: usize = 16 << 10;
/// Bands of a pass at most: a thread a row.
const MAX_PASS: usize = THREADS as usize / BAND;

/// Shared memory that a block of threads may have, by compute capability (CUDA C++ Programming Guide, table of technical
/// specifications), less 1 KiB that the system takes and what the kernels declare themselves.
pub(crate) fn shared_memory(arch: u32) -> usize {
    let kib = match arch {
        80 | 87 => 163,
        90 | 100 | 103 | 110 => 227,
        _ => 99,
    };
    (kib - 3) << 10
}

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

/// The twin of `Choice` in `decode_ffn.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ChoiceArg {
    experts: Ptr,
    weights: Ptr,
    logits: Ptr,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for ChoiceArg {}

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
    /// Bands of output rows.
    bands: usize,
    /// Slices of a band.
    columns: usize,
    /// Values of the activation row that a block of threads holds.
    values: usize,
    /// Whether the row is normalised here, too.
    normed: bool,
    /// Bytes of the largest slice.
    slice: usize,
    /// Slices that a warp should have under way.
    depth: usize,
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
    /// The plan with the deepest rings that fit; nothing where not even one slice to a warp does.
    fn plan(&self, work: Work) -> Option<Plan> {
        let grid = self.processors.min(work.bands);
        let share = work.bands.div_ceil(grid);
        let band_terms = work.columns * self.terms * BAND * size_of::<f32>();
        let pass = (TERM_BYTES / band_terms).clamp(1, share.min(MAX_PASS));
        let row = if work.normed { normed_bytes } else { planes_bytes };
        let ring = row(work.values, self.planes) + pass * band_terms;
        let slices = share * work.columns;
        (1..=work.depth).rev().find_map(|depth| {
            let slots = slices.div_ceil(WARPS).min(depth);
            let shared = ring + slices.min(WARPS * slots) * work.slice;
            let [pass, slots, slot_bytes, ring] = [pass, slots, work.slice, ring].map(size);
            let arg = PlanArg { pass, slots, slot_bytes, ring };
            (shared <= self.shared).then_some(Plan { arg, grid, shared })
        })
    }
}

/// Bytes of `Planes<K>` in `row.cuh`.
fn planes_bytes(k: usize, planes: usize) -> usize {
    let low = if planes == 2 { k } else { 16 };
    (k + low + k / 32 * size_of::<i32>() + k / SLICE * size_of::<f32>()).next_multiple_of(16)
}

/// Bytes of `NormedRow<K>` in `row.cuh`.
fn normed_bytes(k: usize, planes: usize) -> usize {
    planes_bytes(k, planes) + (k + 256) * size_of::<f32>()
}

/// Bytes of a band by 256 values, for the types that the kernels know.
fn slice_bytes(dtype: Dtype) -> Option<usize> {
    let known = matches!(dtype, Dtype::Q4K | Dtype::Q5K | Dtype::Q6K | Dtype::Q8_0);
    known.then(|| BAND * SLICE / dtype.block_len() * dtype.block_bytes())
}

/// The largest slice of matrices that the kernels can all multiply.
fn largest_slice(matrices: &[Matrix]) -> Option<usize> {
    matrices
        .iter()
        .map(|m| (m.k.is_multiple_of(SLICE)).then(|| slice_bytes(m.dtype))?)
        .try_fold(0, |largest, slice| Some(largest.max(slice?)))
}

/// What the kernels keep between launches.
pub(crate) struct Scratch {
    /// Blocks of `decode_route` that have arrived: zero between launches.
    arrived: Memory<u32>,
    /// The layer of a `decode_route` that left the choice of experts to `decode_up`.
    unchosen: Option<usize>,
    /// The layer of a `decode_up` that no `decode_down` has followed yet.
    up: Option<usize>,
}

impl Scratch {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Scratch, Error> {
        Ok(Scratch { arrived: device.zeros(1)?, unchosen: None, up: None })
    }
}

impl Cuda {
    fn machine(&self) -> Machine {
        let q8 = crate::kernels::types(&self.model).contains(&Dtype::Q8_0);
        Machine {
            processors: self.device.gpu.processors,
            shared: shared_memory(self.device.gpu.arch),
            terms: if q8 { SLICE / Dtype::Q8_0.block_len() } else { 1 },
            planes: if self.activations == Activations::A16 { 2 } else { 1 },
        }
    }

    /// The plan of a product of `bands` bands, each `columns` slices of `matrices`, with a row of `values`; nothing where
    /// the general path must run.
    fn decode_plan(
        &self,
        matrices: &[Matrix],
        bands: usize,
        columns: usize,
        values: usize,
        normed: bool,
    ) -> Option<Plan> {
        if self.step.rows() != 1 {
            return None;
        }
        self.machine().plan(Work {
            bands,
            columns,
            values,
            normed,
            slice: largest_slice(matrices)?,
            depth: DEPTH,
        })
    }

    fn launch_plan(&self, name: &str, plan: Plan, arguments: Arguments) -> Result<bool, Error> {
        let function = self.kernels.get(name);
        let shape = Shape::new(plan.grid, THREADS).shared(plan.shared);
        function.launch(&self.device, shape, arguments.push(plan.arg))?;
        Ok(true)
    }

    /// `qkv` in one launch.
    pub(crate) fn decode_qkv(&self, layer: usize) -> Result<bool, Error> {
        let (w, b, d) = (&self.weights.layers[layer], &self.buffers, self.model.config.hidden);
        let matrices = [w.q, w.k, w.v];
        let bands = matrices.iter().map(|m| m.rows.div_ceil(BAND)).sum();
        let Some(plan) = self.decode_plan(&matrices, bands, d / SLICE, d, true) else { return Ok(false) };
        // The first layer's may start before the step's position is there.
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(w.attn_norm)
            .push(w.q.arg())
            .push(w.k.arg())
            .push(w.v.arg())
            .push(b.q.ptr())
            .push(b.k.ptr())
            .push(b.v.ptr())
            .push(if layer > 0 { self.cache.layer(layer) } else { Ptr::NULL })
            .push(self.step.arg());
        self.launch_plan("decode_qkv", plan, arguments)
    }

    /// `attn_out` in one launch; reads `attn_fixed`.
    pub(crate) fn decode_attn_out(&self, layer: usize) -> Result<bool, Error> {
        let (w, b) = (self.weights.layers[layer].out, &self.buffers);
        let Some(plan) = self.decode_plan(&[w], w.rows.div_ceil(BAND), w.k / SLICE, w.k, false) else {
            return Ok(false);
        };
        let arguments = Arguments::default().push(b.attn_fixed.arg()).push(w.arg()).push(b.x.ptr());
        self.launch_plan("decode_attn_out", plan, arguments)
    }

    /// `route` in one launch. In a whole step the choice of experts is left to `decode_up` and `decode_down`.
    pub(crate) fn decode_route(&mut self, layer: usize) -> Result<bool, Error> {
        let (w, b, d) = (&self.weights.layers[layer], &self.buffers, self.model.config.hidden);
        let Ffn::Moe { router, .. } = w.ffn else { return Ok(false) };
        let bytes = match router.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            _ => return Ok(false),
        };
        // `ROWS` of decode_route.cu: router rows to a block of threads, a warp each at most.
        let rows = router.rows.div_ceil(128);
        // `Shared` of decode_route.cu: the row, a barrier and a flag; then router rows.
        let state = normed_bytes(d, self.machine().planes) + 2 * size_of::<u64>();
        let shared = state.next_multiple_of(16) + rows * d * bytes;
        if self.step.rows() != 1 || !d.is_multiple_of(SLICE) || rows > WARPS || shared > self.machine().shared
        {
            return Ok(false);
        }
        // By both or by none: only `decode_down` writes it down for others.
        let later = self.whole && self.up_plan(layer).is_some() && self.down_plan(layer).is_some();
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(w.ffn_norm)
            .push(router.arg())
            .push(b.normed.ptr())
            .push(b.normed_fixed.arg())
            .push(b.router_logits.ptr())
            .push(b.experts.ptr())
            .push(b.expert_weights.ptr())
            .push(if later { Ptr::NULL } else { b.decode.arrived.ptr() });
        let function = self.kernels.get("decode_route");
        let shape = Shape::new(router.rows.div_ceil(rows), THREADS).shared(shared);
        function.launch(&self.device, shape, arguments)?;
        self.buffers.decode.unchosen = later.then_some(layer);
        Ok(true)
    }

    /// The choice of experts of `layer`; to be made from the logits if nobody has made it.
    fn choice(&self, layer: usize) -> ChoiceArg {
        let b = &self.buffers;
        let unmade = b.decode.unchosen == Some(layer);
        let logits = if unmade { b.router_logits.ptr() } else { Ptr::NULL };
        ChoiceArg { experts: b.experts.ptr(), weights: b.expert_weights.ptr(), logits }
    }

    /// `experts_up` in one launch; reads `normed_fixed`.
    pub(crate) fn decode_experts_up(&mut self, layer: usize) -> Result<bool, Error> {
        self.decode_up(layer)
    }

    /// `experts_down` in one launch.
    pub(crate) fn decode_experts_down(&mut self, layer: usize) -> Result<bool, Error> {
        self.decode_down(layer)
    }

    /// `ffn` of a dense model in two launches.
    pub(crate) fn decode_ffn(&mut self, layer: usize) -> Result<bool, Error> {
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
        let bands = self.ranks() * gate.rows.div_ceil(BAND);
        let normed = matches!(self.model.config.ffn, model::Ffn::Dense { .. });
        self.decode_plan(&[gate, up], bands, 2 * gate.k / SLICE, gate.k, normed)
    }

    fn down_plan(&self, layer: usize) -> Option<Plan> {
        let (Ffn::Dense { down, .. } | Ffn::Moe { down, .. }) = self.weights.layers[layer].ffn;
        let values = self.ranks() * down.k;
        self.decode_plan(&[down], down.rows.div_ceil(BAND), values / SLICE, values, false)
    }

    fn decode_up(&mut self, layer: usize) -> Result<bool, Error> {
        let (w, b) = (&self.weights.layers[layer], &self.buffers);
        let (Ffn::Dense { gate, up, .. } | Ffn::Moe { gate, up, .. }) = w.ffn;
        let Some(plan) = self.up_plan(layer) else { return Ok(false) };
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(w.ffn_norm)
            .push(b.normed_fixed.arg())
            .push(self.choice(layer))
            .push(gate.arg())
            .push(up.arg())
            .push(b.hidden.ptr());
        self.launch_plan("decode_up", plan, arguments)?;
        self.buffers.decode.up = Some(layer);
        Ok(true)
    }

    fn decode_down(&mut self, layer: usize) -> Result<bool, Error> {
        let (w, b) = (&self.weights.layers[layer], &self.buffers);
        let (Ffn::Dense { down, .. } | Ffn::Moe { down, .. }) = w.ffn;
        let Some(plan) = self.down_plan(layer) else { return Ok(false) };
        // Only `decode_up` holds its dependents back until what the choice of experts is made of stands: any other kernel
        // ahead may still overlap the one that makes it.
        let early = u32::from(b.decode.up == Some(layer));
        let arguments = Arguments::default()
            .push(b.hidden.ptr())
            .push(self.choice(layer))
            .push(down.arg())
            .push(b.x.ptr())
            .push(early);
        self.launch_plan("decode_down", plan, arguments)?;
        (self.buffers.decode.up, self.buffers.decode.unchosen) = (None, None);
        Ok(true)
    }

    /// `head` for one wanted row, in one launch. The step may have more rows.
    pub(crate) fn decode_head(&self) -> Result<bool, Error> {
        let (w, b, d) = (self.weights.head, &self.buffers, self.model.config.hidden);
        let (bands, columns) = (w.rows.div_ceil(BAND), d / SLICE);
        let plan = largest_slice(&[w]).and_then(|slice| {
            self.machine().plan(Work { bands, columns, values: d, normed: true, slice, depth: DEPTH })
        });
        let Some(plan) = plan.filter(|_| self.step.outputs() == 1) else { return Ok(false) };
        let arguments = Arguments::default()
            .push(b.x.ptr())
            .push(self.step.wanted())
            .push(self.weights.output_norm)
            .push(w.arg())
            .push(b.logits.ptr());
        self.launch_plan("decode_head", plan, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::TILE;

    /// The blocks, the pass, and a warp's slots.
    fn check(processors: usize, arch: u32, work: Work, want: Option<(usize, u32, u32)>) {
        let machine = Machine { processors, shared: shared_memory(arch), terms: 1, planes: 2 };
        let plan = machine.plan(work);
        assert_eq!(plan.map(|p| (p.grid, p.arg.pass, p.arg.slots)), want, "{work:?} on sm_{arch}");
        let Some(plan) = plan else { return };
        assert!(
            plan.shared <= machine.shared && plan.arg.ring % 16 == 0 && plan.arg.slots as usize <= work.depth
        );
        // A pass has a thread for every row; slices all have a place to land, or as many as fit or are wanted.
        assert!(plan.arg.pass as usize * BAND <= THREADS as usize);
        let slices = work.bands.div_ceil(plan.grid) * work.columns;
        let slots = plan.arg.slots as usize;
        let with_one_more = plan.arg.ring as usize + slices.min((slots + 1) * WARPS) * work.slice;
        assert!(slots == work.depth || slots * WARPS >= slices || with_one_more > machine.shared);
    }

    #[test]
    fn rings_are_as_deep_as_the_processor_allows() {
        let slice = |dtype| slice_bytes(dtype).unwrap();
        let qkv =
            Work { bands: 320, columns: 8, values: 2048, normed: true, slice: slice(Dtype::Q6K), depth: 3 };
        check(132, 90, qkv, Some((132, 3, 2)));
        check(82, 86, qkv, Some((82, 4, 1)));
        let down =
            Work { bands: 128, columns: 24, values: 6144, normed: false, slice: slice(Dtype::Q6K), depth: 3 };
        check(132, 90, down, Some((128, 1, 2)));
        check(132, 89, down, Some((128, 1, 2)));
        let head =
            Work { bands: 9496, columns: 8, values: 2048, normed: true, slice: slice(Dtype::Q6K), depth: 3 };
        check(132, 90, head, Some((132, 32, 3)));
        // The row alone would not fit.
        check(132, 90, Work { values: 1 << 18, ..head }, None);
    }

    #[test]
    fn a_slice_is_half_a_tile() {
        for dtype in [Dtype::Q4K, Dtype::Q5K, Dtype::Q6K, Dtype::Q8_0] {
            let column = TILE * SLICE / dtype.block_len() * dtype.block_bytes();
            assert_eq!(slice_bytes(dtype), Some(column / 2), "{dtype}");
            assert_eq!(column / 2 % 16, 0, "{dtype}");
        }
        assert_eq!(slice_bytes(Dtype::Q2K), None);
    }
}
