//! `experts_down`: the chosen experts' down projections, weighted and summed in rank order into the residual stream
//! (`kernels/combine.cu`).

use super::product::{Columns, Epilogue, Input, is_quantised};
use super::stream::Streamed;
use crate::driver::{Arguments, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::Ffn;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("combine.cu", &["combine"]);

const THREADS: u32 = 256;

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
        let rows = self.step.rows();
        let arguments = Arguments::default()
            .push(b.delta.ptr())
            .push(b.expert_weights.ptr())
            .push(b.x.ptr())
            .push(size(rows));
        let fours = rows * self.model.config.hidden / 4;
        let shape = Shape::new(fours.div_ceil(THREADS as usize), THREADS);
        self.kernels.get("combine").launch(&self.device, shape, arguments)
    }
}
