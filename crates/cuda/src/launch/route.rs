//! `route`: the feed-forward norm, router logits and the choice of experts (`kernels/route.cu`).

use crate::driver::{Arguments, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::Ffn;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("route.cu", &["choose"]);

pub(super) const THREADS: u32 = 256;
/// A warp takes one row.
const ROWS_PER_BLOCK: usize = THREADS as usize / 32;

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
        let (b, t) = (&self.buffers, self.step.rows());
        self.normalise(b.x.ptr(), None, t, weights.ffn_norm, Some(b.normed.ptr()), true)?;
        self.product(&router, b.normed.ptr(), &b.normed_fixed, t, b.router_logits.ptr())?;
        self.choose()
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
