//! `attend`: few rows by spans over all processors (`kernels/attend_split.cu`), many rows by streams of tiles
//! (`kernels/attend_stream.cu`, on Hopper `kernels/attend_groups.cu`). A single row of a step that nobody observes takes
//! `rope_store` and `attend` in one launch (`kernels/attend_one.cu`). Which kernel runs depends on the number of rows, the
//! model and the GPU, never on positions: a recorded step serves all of them.

use std::sync::Arc;

use model::{BLOCK, Config};
use quant::fixed::block_len;

use super::decode::shared_memory;
use crate::driver::{Arguments, Device, Memory, Shape, size};
use crate::kernels::UnitOf;
use crate::{Cuda, Error};

pub(crate) const UNIT_SPLIT: UnitOf = ("attend_split.cu", &["attend_split"]);
pub(crate) const UNIT_ONE: UnitOf = ("attend_one.cu", &["attend_one"]);
pub(crate) const UNIT_STREAM: UnitOf = ("attend_stream.cu", &["attend_stream"]);
pub(crate) const UNIT_GROUPS: UnitOf = ("attend_groups.cu", &["attend_groups"]);

/// Rows of the largest step that is split by spans; a lane of `attend_split` knows two rows.
const SPLIT_ROWS: usize = 64;
/// The compute capability, times ten, whose instructions `attend_groups` uses.
const HOPPER: u32 = 90;
/// `ATOM` of `cache.cuh`: what shared memory of `attend_groups` is aligned to.
const ATOM: usize = 512;
/// Tiles of a span (rule 5).
const SPAN_TILES: usize = 4;
/// `ITEMS` of the split kernel: items that a block knows ahead.
const ITEMS: usize = 32;
/// `DEEP_STAGES` of `attend_deep.cuh`.
const RING: usize = 3;
/// `KEY_WARP` of `attend_one.cu`: query heads of a unit that leave two warps to the row's own key and value.
const ONE_HEADS: usize = 14;
/// Bytes that partial results may take. What does not fit takes several launches.
const SCRATCH: usize = 64 << 20;

/// How the split kernel cuts a model's heads.
#[derive(Debug, Clone, Copy)]
struct Split {
    /// Query heads of a unit.
    wide: usize,
    /// KV heads, or slices of them.
    units: usize,
    head_dim: usize,
}

impl Split {
    fn of(config: &Config) -> Split {
        let group = config.heads / config.kv_heads;
        Split { wide: group.min(16), units: config.kv_heads * group.div_ceil(16), head_dim: config.head_dim }
    }

    /// Values of a partial result: those of each head, 16 exponents, 16 sums.
    fn partial(self) -> usize {
        self.wide * self.head_dim + 32
    }

    /// `DEEP_BYTES` of the kernel, or where a block of threads has less, `SHARED_BYTES`.
    fn shared(self, arch: u32) -> usize {
        let groups = SPAN_TILES;
        let stage = 2 * BLOCK * self.head_dim + 2 * BLOCK * 4;
        let deep = self.shallow().next_multiple_of(128) + groups * RING * (stage + 8);
        if deep <= shared_memory(arch) { deep } else { self.shallow() }
    }

    fn shallow(self) -> usize {
        let octets = self.wide.div_ceil(8);
        let queries = octets * (self.head_dim / 32) * 512;
        let weights = SPAN_TILES * (BLOCK / 32) * octets * 512;
        let tile = (self.wide * (self.head_dim + 4)).max(self.wide * (BLOCK + 4) + queries / 4);
        let tiles = SPAN_TILES * tile;
        let known = ITEMS * 4 * (5 + SPAN_TILES) + 4 * self.head_dim;
        let items = known + queries + weights + 4 * (tiles + 4 * SPAN_TILES * 16 + 4);
        let heads = 256 / self.head_dim + 2;
        items.max(heads * 64 * 8 + 4 * (heads + 256))
    }
}

/// What the split kernel leaves between its blocks of threads.
pub(crate) struct Scratch {
    /// `[rows, units, spans]` partial results.
    partials: Memory<f32>,
    /// Spans that are there and jobs that are done, `[2, rows, units]`; zero between launches.
    counters: Memory<u32>,
}

impl Scratch {
    /// With [`Scratch::partials`] values of memory that nothing else uses while `attend` runs.
    pub(crate) fn new(
        device: &Arc<Device>,
        config: &Config,
        partials: Memory<f32>,
    ) -> Result<Scratch, Error> {
        Ok(Scratch { partials, counters: device.zeros(Scratch::counters(config))? })
    }

    /// Values that partial results take with a cache of `blocks` blocks.
    pub(crate) fn partials(config: &Config, blocks: usize) -> usize {
        let split = Split::of(config);
        // No sequence has more spans than the cache has.
        let rows = SPLIT_ROWS * blocks.div_ceil(SPAN_TILES) * split.units * split.partial();
        rows.min(SCRATCH / size_of::<f32>())
    }

    /// Values that are kept from launch to launch.
    pub(crate) fn counters(config: &Config) -> usize {
        2 * SPLIT_ROWS * Split::of(config).units
    }

    /// Rows that one launch can take, when tables have `stride` blocks.
    fn rows(&self, split: Split, stride: usize) -> usize {
        let row = stride.div_ceil(SPAN_TILES) * split.units * split.partial();
        (self.partials.len() / row).min(SPLIT_ROWS)
    }
}

/// How attention of many rows is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stream {
    kernel: &'static str,
    /// Of a block of threads, with one KV head.
    rows: usize,
    threads: u32,
    shared: usize,
}

impl Stream {
    fn of(config: &Config, arch: u32) -> Stream {
        let fits = config.head_dim.is_multiple_of(64) && config.head_dim <= 128;
        if arch == HOPPER && fits { Stream::groups(config) } else { Stream::general(config, arch) }
    }

    /// `attend_groups`: `Shared` there.
    fn groups(config: &Config) -> Stream {
        let (pairs, columns, hands) = (2, 64, 2);
        let (planes, scales) = (2 * BLOCK * config.head_dim, 2 * BLOCK * 4);
        let hand = 4 * 128 * 16 + columns * (16 + 8) + 4 * 4;
        let rings = 3 * (planes + scales) + 2 * planes;
        let barriers = 8 * (2 * (3 + 2) + 2 * pairs * hands);
        let shared = rings
            + pairs * (2 * columns * config.head_dim + 4 * config.head_dim * 64 + hands * hand)
            + barriers
            + ATOM;
        let rows = pairs * columns / (config.heads / config.kv_heads);
        Stream { kernel: "attend_groups", rows, threads: 512, shared }
    }

    /// `attend_stream`: its constants of these names.
    fn general(config: &Config, arch: u32) -> Stream {
        let large = matches!(arch, 80 | 90 | 100);
        let (warps, stages) = match (config.head_dim > 128, large) {
            (false, true) => (8, 4),
            (false, false) => (4, 4),
            (true, true) => (4, 2),
            (true, false) => (2, 2),
        };
        let rows = 16 * warps / (config.heads / config.kv_heads);
        let stage = 2 * BLOCK * config.head_dim + 2 * BLOCK * 4;
        let shared = stages * (stage + 16) + warps * config.head_dim * 64;
        Stream { kernel: "attend_stream", rows, threads: 32 * size(warps), shared }
    }
}

/// `256 log2(e) / sqrt(HD)`: turns an integer product (in units of 256) into a score in base 2 (`cpu::attention`).
fn score_scale(head_dim: usize) -> f32 {
    (256.0 * std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32
}

impl Cuda {
    /// Writes `Attn`, and its fixed-point copy, which `attn_out` reads.
    pub(crate) fn attend(&mut self, layer: usize) -> Result<(), Error> {
        let config = &self.model.config;
        let rows = self.step.rows();
        let at_once = self.rows_at_once();
        let (row, group) = (config.heads * config.head_dim, config.heads / config.kv_heads * config.head_dim);
        let fits_units = block_len(row) == 32 || group.is_multiple_of(256);
        if rows <= SPLIT_ROWS && at_once > 0 {
            if self.attends_at_once() {
                self.attend_one(layer)?;
                if fits_units {
                    return Ok(());
                }
                return self.fix(self.buffers.attn.ptr(), rows, &self.buffers.attn_fixed);
            }
            for first in (0..rows).step_by(at_once) {
                self.attend_split(layer, first, at_once.min(rows - first))?;
            }
            // Blocks of fixed point that several units share are rounded when all are there.
            if fits_units {
                return Ok(());
            }
        } else {
            self.attend_stream(layer)?;
        }
        self.fix(self.buffers.attn.ptr(), rows, &self.buffers.attn_fixed)
    }

    /// Rows that the split kernel can take in one launch.
    fn rows_at_once(&self) -> usize {
        self.buffers.attend.rows(Split::of(&self.model.config), self.step.arg().stride as usize)
    }

    /// Whether `attend` does what `rope_store` leaves to it.
    pub(crate) fn attends_at_once(&self) -> bool {
        let config = &self.model.config;
        let fits = config.head_dim.is_multiple_of(64) && config.heads / config.kv_heads <= ONE_HEADS;
        self.whole && self.step.rows() == 1 && fits && self.rows_at_once() > 0
    }

    fn attend_one(&self, layer: usize) -> Result<(), Error> {
        let (b, config, scratch) = (&self.buffers, &self.model.config, &self.buffers.attend);
        let weights = &self.weights.layers[layer];
        let arguments = Arguments::default()
            .push(b.q.ptr())
            .push(b.k.ptr())
            .push(b.v.ptr())
            .push(weights.q_norm)
            .push(weights.k_norm)
            .push(self.rope.ptr())
            .push(self.cache.layer(layer))
            .push(self.step.arg())
            .push(score_scale(config.head_dim))
            .push(b.attn.ptr())
            .push(b.attn_fixed.arg())
            .push(scratch.partials.ptr())
            .push(scratch.counters.ptr());
        let shape = Shape::new(self.device.gpu.processors, 512)
            .shared(Split::of(config).shared(self.device.gpu.arch));
        self.kernels.get("attend_one").launch(&self.device, shape, arguments)
    }

    fn attend_split(&self, layer: usize, first: usize, count: usize) -> Result<(), Error> {
        let (b, config, scratch) = (&self.buffers, &self.model.config, &self.buffers.attend);
        let arguments = Arguments::default()
            .push(b.q.ptr())
            .push(self.cache.layer(layer))
            .push(self.step.arg())
            .push(size(first))
            .push(size(count))
            .push(score_scale(config.head_dim))
            .push(b.attn.ptr())
            .push(b.attn_fixed.arg())
            .push(scratch.partials.ptr())
            .push(scratch.counters.ptr());
        let (kernel, shared) =
            (self.kernels.get("attend_split"), Split::of(config).shared(self.device.gpu.arch));
        // One block of threads a processor: all of them resident, which the kernel relies on.
        kernel.launch(&self.device, Shape::new(self.device.gpu.processors, 512).shared(shared), arguments)
    }

    fn attend_stream(&self, layer: usize) -> Result<(), Error> {
        let (b, config) = (&self.buffers, &self.model.config);
        let stream = Stream::of(config, self.device.gpu.arch);
        let arguments = Arguments::default()
            .push(b.q.ptr())
            .push(self.cache.layer(layer))
            .push(self.step.arg())
            .push(score_scale(config.head_dim))
            .push(b.attn.ptr());
        let blocks = self.step.rows().div_ceil(stream.rows) * config.kv_heads;
        let shape = Shape::new(blocks, stream.threads).shared(stream.shared);
        self.kernels.get(stream.kernel).launch(&self.device, shape, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of a block of threads on sm_86, 89 and 120; on sm_80.
    const SMALL: usize = 99 << 10;
    const LARGE: usize = 163 << 10;
    /// On sm_90.
    const LARGEST: usize = 227 << 10;

    #[test]
    fn every_shape_fits_every_processor() {
        let base = synth::Shape::named("qwen3-30b-a3b").expect("a shape of the list").config;
        for head_dim in (32..=256).step_by(32) {
            for group in 1..=32 {
                let config = Config { heads: 2 * group, kv_heads: 2, head_dim, ..base };
                let (split, name) =
                    (Split::of(&config), format!("HD {head_dim}, {group} heads to a KV head"));
                assert!(split.shallow() <= SMALL, "{name}: split takes {}", split.shallow());
                assert!(split.units * split.wide >= config.heads, "{name}: a head is left out");
                for (arch, limit) in [(80, LARGE), (86, SMALL), (90, LARGEST), (120, SMALL)] {
                    let stream = Stream::of(&config, arch);
                    assert!(
                        stream.shared <= limit,
                        "{name} on sm_{arch}: {} takes {}",
                        stream.kernel,
                        stream.shared
                    );
                    assert!(stream.rows >= 1, "{name} on sm_{arch}: a block takes no row");
                }
            }
        }
    }

    #[test]
    fn scratch_is_bounded_and_serves_a_row_of_any_context() {
        let config = synth::Shape::named("qwen3-30b-a3b").expect("a shape of the list").config;
        for context in [64usize, 4096, 32_768, 262_144] {
            let blocks = context.div_ceil(BLOCK);
            let partials = Scratch::partials(&config, blocks);
            let split = Split::of(&config);
            let row = blocks.div_ceil(SPAN_TILES) * split.units * split.partial();
            assert!(4 * partials <= SCRATCH, "{context} positions: {partials} values");
            assert!(partials >= row, "{context} positions: a row needs {row} values, there are {partials}");
        }
    }
}
