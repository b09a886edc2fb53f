//! `rope_store`: norms of the heads, rotation, and the step's keys and values into the cache (`kernels/rope_store.cu`).

use crate::driver::{Arguments, Shape};
use crate::kernels::UnitOf;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("rope_store.cu", &["rope_store"]);

/// A warp takes a head of a row.
const WARPS: usize = 8;

impl Cuda {
    /// Rotates `Q` in place and stores the step's keys and values; `K` and `V` stay as projected. Or leaves all of it to
    /// `attend`, where nobody sees `Q` in between.
    pub(crate) fn rope_store(&mut self, layer: usize) -> Result<(), Error> {
        if self.attends_at_once() {
            self.cache.set_stored(layer);
            return Ok(());
        }
        let (b, weights, config) = (&self.buffers, &self.weights.layers[layer], &self.model.config);
        let heads = self.step.rows() * (config.heads + 2 * config.kv_heads);
        let arguments = Arguments::default()
            .push(b.q.ptr())
            .push(b.k.ptr())
            .push(b.v.ptr())
            .push(weights.q_norm)
            .push(weights.k_norm)
            .push(self.rope.ptr())
            .push(self.step.arg())
            .push(self.cache.layer(layer));
        let shape = Shape::new(heads.div_ceil(WARPS), 32 * WARPS as u32)
            .shared(WARPS * config.head_dim * size_of::<f32>());
        self.kernels.get("rope_store").launch(&self.device, shape, arguments)?;
        self.cache.set_stored(layer);
        Ok(())
    }
}
