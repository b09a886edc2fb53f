//! The activations of a step on the GPU: the named buffers of [`model::Buffer`], and what only stages see.

use std::sync::Arc;

use model::{Config, Ffn};
use quant::fixed::{Activations, SUB, block_len};

use crate::Error;
use crate::driver::{Argument, Device, Memory, Ptr};
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

impl Fixed {
    fn new(device: &Arc<Device>, rows: usize, k: usize, activations: Activations) -> Result<Fixed, Error> {
        let low = if activations == Activations::A16 { rows * k } else { 0 };
        Ok(Fixed {
            hi: device.alloc(rows * k)?,
            lo: device.alloc(low)?,
            sum: device.alloc(rows * (k / SUB))?,
            scale: device.alloc(rows * (k / block_len(k)))?,
            k,
        })
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

impl Buffers {
    pub(crate) fn new(
        device: &Arc<Device>,
        config: &Config,
        rows: usize,
        activations: Activations,
    ) -> Result<Buffers, Error> {
        let s = Sizes::of(config);
        let pairs = rows * s.used;
        Ok(Buffers {
            x: device.alloc(rows * s.hidden)?,
            q: device.alloc(rows * s.q)?,
            k: device.alloc(rows * s.kv)?,
            v: device.alloc(rows * s.kv)?,
            attn: device.alloc(rows * s.q)?,
            normed: device.alloc(rows * s.hidden)?,
            router_logits: device.alloc(rows * s.experts)?,
            experts: device.alloc(pairs)?,
            expert_weights: device.alloc(pairs)?,
            hidden: device.alloc(pairs * s.width)?,
            logits: device.alloc(config.vocab)?,
            delta: device.alloc(pairs * s.hidden)?,
            normed_fixed: Fixed::new(device, rows, s.hidden, activations)?,
            attn_fixed: Fixed::new(device, rows, s.q, activations)?,
            hidden_fixed: Fixed::new(device, pairs, s.width, activations)?,
            groups: Groups::new(device, config, rows)?,
            route_arrived: device.zeros(FEW_GROUPS)?,
            decode: Scratch::new(device)?,
        })
    }

    /// Bytes that `new` takes.
    pub(crate) fn bytes(config: &Config, rows: usize) -> usize {
        let s = Sizes::of(config);
        // Two planes, a sum to 16 values, a scale to 32 at worst.
        let fixed = |k: usize| 2 * k + k / 4 + k / 8;
        let floats = 2 * s.hidden + 2 * s.q + 2 * s.kv + s.experts + s.used * (2 + s.width + s.hidden);
        rows * (4 * floats + fixed(s.hidden) + fixed(s.q) + s.used * fixed(s.width))
            + 4 * config.vocab
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
