//! `experts_down`: the chosen experts' down projections, weighted and summed in rank order into the residual stream
//! (`kernels/combine.cu`).

use super::product::{Columns, Epilogue, Input, is_quantised};
use super::stream::Streamed;
use crate::buffers::FixedArg;
use crate::driver::{Arguments, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::Ffn;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("combine.cu", &["combine", "combine_normalise"]);

pub(super) const THREADS: u32 = 256;
/// `MAX_NORMED` of combine.cu: the longest row that `combine_normalise` takes.
pub(super) const MAX_NORMED: usize = 8192;

impl Cuda {
    /// Adds to `X`.
    pub(crate) fn experts_down(&mut self, layer: usize) -> Result<(), Error> {
        // The general path leaves `Down` where it is observed.
        if self.inside.is_none() && self.decode_experts_down(layer)? {
            return Ok(());
        }
        let Ffn::Moe { down, .. } = self.weights.layers[layer].ffn else {
            unreachable!("`run` refuses `experts_down` for a dense model")
        };
        let (b, count) = (&self.buffers, self.expert_ids());
        let list = [(down, b.delta.ptr())];
        if !self.streamed(&list, Streamed::OfPairs(b.hidden.ptr(), count), Epilogue::Store)? {
            // Whoever else wrote `Hidden` and `Experts` (a fused kernel, a forced comparison) has left neither of these.
            if !self.grouped {
                self.group(self.group_columns(count))?;
            }
            if is_quantised(&down) {
                self.fix(b.hidden.ptr(), count, &b.hidden_fixed)?;
            }
            let columns = Columns::Pairs { count, share: 1 };
            let x = Input { float: b.hidden.ptr(), fixed: &b.hidden_fixed, columns };
            self.products(&list, x, Epilogue::Store)?;
        }
        self.combine(layer)
    }

    /// The experts' sum into `X`; in a whole step with the next layer's norm, which is a launch less.
    fn combine(&mut self, layer: usize) -> Result<(), Error> {
        let (b, rows, hidden) = (&self.buffers, self.step.rows(), self.model.config.hidden);
        let arguments = Arguments::default().push(b.delta.ptr()).push(b.expert_weights.ptr()).push(b.x.ptr());
        let next = self.weights.layers.get(layer + 1).filter(|_| self.whole && hidden <= MAX_NORMED);
        let Some(next) = next else {
            let shape = Shape::new((rows * hidden / 4).div_ceil(THREADS as usize), THREADS);
            return self.kernels.get("combine").launch(&self.device, shape, arguments.push(size(rows)));
        };
        let (normed, fixed) = self.qkv_input(next);
        let arguments = arguments
            .push(next.attn_norm)
            .push(normed.unwrap_or(Ptr::NULL))
            .push(fixed.unwrap_or(FixedArg::NONE));
        self.kernels.get("combine_normalise").launch(&self.device, Shape::new(rows, THREADS), arguments)?;
        self.normed = true;
        Ok(())
    }
}
