//! The named buffers of the current step, read and replaced from outside between two stages.

use model::{Buffer, Ffn};

use crate::driver::Memory;
use crate::{Cuda, Error};

impl Cuda {
    /// A buffer of floats and how many of its values the current step has.
    pub(crate) fn floats(&self, buffer: Buffer) -> Option<(&Memory<f32>, usize)> {
        let (config, b) = (&self.model.config, &self.buffers);
        let (t, r) = (self.step.rows(), self.step.outputs());
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let moe = match config.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense { .. } => None,
        };
        let of_moe = |len: fn(&model::Moe) -> usize| moe.as_ref().map_or(0, len);
        Some(match buffer {
            Buffer::X => (&b.x, t * config.hidden),
            Buffer::Q => (&b.q, t * q),
            Buffer::K => (&b.k, t * kv),
            Buffer::V => (&b.v, t * kv),
            Buffer::Attn => (&b.attn, t * q),
            Buffer::Normed => (&b.normed, if moe.is_some() { t * config.hidden } else { 0 }),
            Buffer::RouterLogits => (&b.router_logits, t * of_moe(|m| m.experts)),
            Buffer::ExpertWeights => (&b.expert_weights, t * of_moe(|m| m.used)),
            Buffer::Hidden if moe.is_some() => (&b.hidden, t * of_moe(|m| m.used * m.width)),
            Buffer::Logits => (&b.logits, r * config.vocab),
            Buffer::Experts | Buffer::CacheK | Buffer::CacheV => return None,
            Buffer::Gate | Buffer::Up | Buffer::Down | Buffer::Hidden => return self.inside_buffer(buffer),
        })
    }

    /// Replaces a buffer of floats, and its copy in fixed point where stages read that.
    pub(crate) fn write_floats(&self, buffer: Buffer, values: &[f32]) -> Result<(), Error> {
        self.device.bind()?;
        if let Some((memory, _)) = self.floats(buffer) {
            memory.write(0, values)?;
        }
        let (b, t) = (&self.buffers, self.step.rows());
        match buffer {
            Buffer::Attn => self.fix(b.attn.ptr(), t, &b.attn_fixed),
            Buffer::Normed => self.fix(b.normed.ptr(), t, &b.normed_fixed),
            _ => Ok(()),
        }
    }

    /// How many values of a buffer the current step has; 0 of one that its model has not.
    pub(crate) fn values_of(&self, buffer: Buffer) -> usize {
        match buffer {
            Buffer::Experts => self.expert_ids(),
            _ => self.floats(buffer).map_or(0, |(_, len)| len),
        }
    }

    /// Whether a buffer exists only while it is observed.
    pub(crate) fn is_inside(&self, buffer: Buffer) -> bool {
        match (buffer, self.model.config.ffn) {
            (Buffer::Gate | Buffer::Up | Buffer::Down, _) => true,
            // What is a buffer between two stages of a mixture of experts lies within the one of a dense network.
            (Buffer::Hidden, Ffn::Dense { .. }) => true,
            _ => false,
        }
    }

    pub(crate) fn expert_ids(&self) -> usize {
        match self.model.config.ffn {
            Ffn::Moe(moe) => self.step.rows() * moe.used,
            Ffn::Dense { .. } => 0,
        }
    }

    pub(crate) fn read_buffer(&self, buffer: Buffer) -> Result<Vec<f32>, Error> {
        self.device.bind()?;
        if let Some((memory, len)) = self.floats(buffer) {
            let mut values = vec![0.0; len];
            memory.read(0, &mut values)?;
            return Ok(values);
        }
        match buffer {
            Buffer::Experts => {
                let mut ids = vec![0u32; self.expert_ids()];
                self.buffers.experts.read(0, &mut ids)?;
                Ok(ids.into_iter().map(|id| id as f32).collect())
            }
            _ => {
                let (keys, values) = self.cache.rows(&self.step)?;
                Ok(if buffer == Buffer::CacheK { keys } else { values })
            }
        }
    }
}
