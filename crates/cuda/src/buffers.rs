//! The activations of a step on the GPU: the named buffers of [`model::Buffer`], and what only stages see.
//!
//! A layer is attention, then the feed-forward network, and neither needs what the other has left but `X`: their buffers
//! lie in the same memory. `held.rs` knows which of them can be read when.

use std::sync::Arc;

use model::{Config, Ffn};
use quant::fixed::{Activations, SUB, block_len};

use crate::Error;
use crate::driver::{Argument, Device, Memory, PART_ALIGN, Plain, Ptr};
use crate::launch::attend;
use crate::launch::decode::Scratch;
use crate::launch::group::Groups;
use crate::launch::route::FEW_GROUPS;

/// Rows in fixed point as kernels see them (`Fixed` in prelude.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct FixedArg {
    pub(crate) hi: Ptr,
    pub(crate) lo: Ptr,
    pub(crate) sum: Ptr,
    pub(crate) scale: Ptr,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for FixedArg {}

impl FixedArg {
    /// For a kernel that is to write none.
    pub(crate) const NONE: FixedArg =
        FixedArg { hi: Ptr::NULL, lo: Ptr::NULL, sum: Ptr::NULL, scale: Ptr::NULL };
}

/// `rows` rows of `k` values in fixed point.
pub(crate) struct Fixed {
    hi: Memory<i8>,
    lo: Memory<i8>,
    sum: Memory<i32>,
    scale: Memory<f32>,
    pub(crate) k: usize,
}

/// Lengths of the arrays of [`Fixed`]: both planes, sums, scales.
fn fixed_lens(rows: usize, k: usize, activations: Activations) -> [usize; 4] {
    let low = if activations == Activations::A16 { rows * k } else { 0 };
    [rows * k, low, rows * (k / SUB), rows * (k / block_len(k))]
}

impl Fixed {
    fn new(device: &Arc<Device>, rows: usize, k: usize, activations: Activations) -> Result<Fixed, Error> {
        let [hi, lo, sum, scale] = fixed_lens(rows, k, activations);
        Ok(Fixed {
            hi: device.alloc(hi)?,
            lo: device.alloc(lo)?,
            sum: device.alloc(sum)?,
            scale: device.alloc(scale)?,
            k,
        })
    }

    fn within(lent: &mut Lent<'_>, rows: usize, k: usize, activations: Activations) -> Fixed {
        let [hi, lo, sum, scale] = fixed_lens(rows, k, activations);
        Fixed { hi: lent.take(hi), lo: lent.take(lo), sum: lent.take(sum), scale: lent.take(scale), k }
    }

    /// Bytes of each array.
    fn bytes(rows: usize, k: usize, activations: Activations) -> [usize; 4] {
        let [hi, lo, sum, scale] = fixed_lens(rows, k, activations);
        [hi, lo, 4 * sum, 4 * scale]
    }

    pub(crate) fn arg(&self) -> FixedArg {
        FixedArg { hi: self.hi.ptr(), lo: self.lo.ptr(), sum: self.sum.ptr(), scale: self.scale.ptr() }
    }
}

/// Rows in fixed point on the host: `[rows, K]`, `[rows, K]` or empty, `[rows, K / SUB]`, `[rows, K / block_len(K)]`.
#[cfg(test)]
pub(crate) struct Planes {
    pub(crate) hi: Vec<i8>,
    pub(crate) lo: Vec<i8>,
    pub(crate) sum: Vec<i32>,
    pub(crate) scale: Vec<f32>,
}

#[cfg(test)]
impl Fixed {
    /// The first `rows` rows.
    pub(crate) fn read(&self, rows: usize) -> Result<Planes, Error> {
        let n = rows * self.k;
        let (mut hi, mut lo) = (vec![0; n], vec![0; n.min(self.lo.len())]);
        let (mut sum, mut scale) = (vec![0; n / SUB], vec![0.0; n / block_len(self.k)]);
        self.hi.read(0, &mut hi)?;
        self.lo.read(0, &mut lo)?;
        self.sum.read(0, &mut sum)?;
        self.scale.read(0, &mut scale)?;
        Ok(Planes { hi, lo, sum, scale })
    }
}

/// Shapes as in [`model::Buffer`].
pub(crate) struct Buffers {
    pub(crate) x: Memory<f32>,
    pub(crate) q: Memory<f32>,
    pub(crate) k: Memory<f32>,
    pub(crate) v: Memory<f32>,
    pub(crate) attn: Memory<f32>,
    pub(crate) normed: Memory<f32>,
    pub(crate) router_logits: Memory<f32>,
    pub(crate) experts: Memory<u32>,
    pub(crate) expert_weights: Memory<f32>,
    /// `[T, K, F]`, or `[T, F]` for a dense model.
    pub(crate) hidden: Memory<f32>,
    /// Grows with what is asked for: see [`Buffers::reserve_logits`].
    pub(crate) logits: Memory<f32>,
    /// What a projection adds to the residual stream, `[T, D]`; or the experts' outputs, `[T, K, D]`.
    pub(crate) delta: Memory<f32>,
    /// The input of `qkv`, of `route` and the experts, of `ffn` and of `head`, `[T, D]`.
    pub(crate) normed_fixed: Fixed,
    /// The input of `attn_out`, `[T, H * HD]`.
    pub(crate) attn_fixed: Fixed,
    /// The input of `experts_down` (`[T * K, F]`) or of the dense network's down projection (`[T, F]`).
    pub(crate) hidden_fixed: Fixed,
    /// What attention leaves between its blocks of threads.
    pub(crate) attend: attend::Scratch,
    /// The step's pairs by expert.
    pub(crate) groups: Groups,
    /// Blocks of `route_few` that have arrived, by group of rows: zero between launches.
    pub(crate) route_arrived: Memory<u32>,
    /// What fused decoding keeps between launches.
    pub(crate) decode: Scratch,
}

/// Sizes of the buffers, in values.
struct Sizes {
    hidden: usize,
    q: usize,
    kv: usize,
    experts: usize,
    /// Chosen experts to a row; 1 for a dense model.
    used: usize,
    width: usize,
}

impl Sizes {
    fn of(config: &Config) -> Sizes {
        let (experts, used, width) = match config.ffn {
            Ffn::Dense { width } => (0, 1, width),
            Ffn::Moe(moe) => (moe.experts, moe.used, moe.width),
        };
        Sizes {
            hidden: config.hidden,
            q: config.heads * config.head_dim,
            kv: config.kv_heads * config.head_dim,
            experts,
            used,
            width,
        }
    }
}

/// Memory given to one half of a layer and then to the other, piece by piece.
struct Lent<'a> {
    memory: &'a Memory<u8>,
    used: usize,
}

impl Lent<'_> {
    fn take<T: Plain>(&mut self, len: usize) -> Memory<T> {
        let at = self.used;
        self.used += piece(len * size_of::<T>());
        self.memory.part(at, len)
    }
}

/// Bytes of lent memory that an array of `bytes` takes.
fn piece(bytes: usize) -> usize {
    bytes.next_multiple_of(PART_ALIGN)
}

/// Bytes of what only `qkv` to `attn_out` use; and of what only the feed-forward stages do.
fn halves(config: &Config, rows: usize, kv_blocks: usize, activations: Activations) -> [usize; 2] {
    let s = Sizes::of(config);
    let pairs = rows * s.used;
    let floats = |lens: &[usize]| lens.iter().map(|len| piece(4 * len)).sum::<usize>();
    let fixed = |rows, k| Fixed::bytes(rows, k, activations).map(piece).iter().sum::<usize>();
    let partials = attend::Scratch::partials(config, kv_blocks);
    [
        floats(&[rows * s.q, rows * s.kv, rows * s.kv, rows * s.q, partials]) + fixed(rows, s.q),
        floats(&[pairs * s.width, pairs * s.hidden]) + fixed(pairs, s.width),
    ]
}

impl Buffers {
    /// For steps of up to `rows` rows over a cache of `kv_blocks` blocks.
    pub(crate) fn new(
        device: &Arc<Device>,
        config: &Config,
        rows: usize,
        kv_blocks: usize,
        activations: Activations,
    ) -> Result<Buffers, Error> {
        let s = Sizes::of(config);
        let pairs = rows * s.used;
        let [attention, feed_forward] = halves(config, rows, kv_blocks, activations);
        let shared = device.alloc(attention.max(feed_forward))?;
        let first = &mut Lent { memory: &shared, used: 0 };
        let second = &mut Lent { memory: &shared, used: 0 };
        let partials = attend::Scratch::partials(config, kv_blocks);
        let buffers = Buffers {
            x: device.alloc(rows * s.hidden)?,
            q: first.take(rows * s.q),
            k: first.take(rows * s.kv),
            v: first.take(rows * s.kv),
            attn: first.take(rows * s.q),
            normed: device.alloc(rows * s.hidden)?,
            router_logits: device.alloc(rows * s.experts)?,
            experts: device.alloc(pairs)?,
            expert_weights: device.alloc(pairs)?,
            hidden: second.take(pairs * s.width),
            logits: device.alloc(config.vocab)?,
            delta: second.take(pairs * s.hidden),
            normed_fixed: Fixed::new(device, rows, s.hidden, activations)?,
            attn_fixed: Fixed::within(first, rows, s.q, activations),
            hidden_fixed: Fixed::within(second, pairs, s.width, activations),
            attend: attend::Scratch::new(device, config, first.take(partials))?,
            groups: Groups::new(device, config, rows)?,
            route_arrived: device.zeros(FEW_GROUPS)?,
            decode: Scratch::new(device)?,
        };
        assert_eq!([first.used, second.used], [attention, feed_forward], "`halves` counts what is taken");
        Ok(buffers)
    }

    /// Bytes that `new` takes, but for a few words.
    pub(crate) fn bytes(config: &Config, rows: usize, kv_blocks: usize, activations: Activations) -> usize {
        let s = Sizes::of(config);
        let [attention, feed_forward] = halves(config, rows, kv_blocks, activations);
        let floats = rows * (2 * s.hidden + s.experts + 2 * s.used) + config.vocab;
        attention.max(feed_forward)
            + 4 * (floats + attend::Scratch::counters(config))
            + Fixed::bytes(rows, s.hidden, activations).iter().sum::<usize>()
            + Groups::bytes(config, rows)
    }

    /// Room for the logits of `rows` rows.
    pub(crate) fn reserve_logits(
        &mut self,
        device: &Arc<Device>,
        rows: usize,
        vocab: usize,
    ) -> Result<bool, Error> {
        let grow = self.logits.len() < rows * vocab;
        if grow {
            device.synchronize()?;
            self.logits = device.alloc(rows * vocab)?;
        }
        Ok(grow)
    }
}
