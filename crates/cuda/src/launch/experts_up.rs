//! `experts_up`: gate and up projections of the chosen experts, and SwiGLU.

use super::product::{Columns, Epilogue, Input, is_quantised};
use super::stream::Streamed;
use crate::driver::Ptr;
use crate::weights::{Ffn, Matrix};
use crate::{Cuda, Error};

impl Cuda {
    /// Writes `Hidden`; reads `Normed` in the form that `route` left.
    pub(crate) fn experts_up(&mut self, layer: usize) -> Result<(), Error> {
        if self.inside.is_none() && self.decode_experts_up(layer)? {
            return Ok(());
        }
        let Ffn::Moe { gate, up, .. } = self.weights.layers[layer].ffn else {
            unreachable!("`run` refuses `experts_up` for a dense model")
        };
        let (b, count) = (&self.buffers, self.expert_ids());
        let (hidden, few) = (b.hidden.ptr(), Streamed::OfRows(&b.normed_fixed, count));
        if self.inside.is_none() && self.streamed(&[(gate, hidden), (up, hidden)], few, Epilogue::SwiGlu)? {
            self.routed = true;
            return Ok(());
        }
        self.group(self.group_columns(count))?;
        self.grouped = true;
        let share = count / self.step.rows();
        let columns = Columns::Pairs { count, share };
        let x = Input { float: b.normed.ptr(), fixed: &b.normed_fixed, columns };
        self.swiglu(gate, up, x, b.hidden.ptr())
    }

    /// `out = silu(gate x) * (up x)`.
    pub(crate) fn swiglu(&self, gate: Matrix, up: Matrix, x: Input<'_>, out: Ptr) -> Result<(), Error> {
        if self.observed_swiglu(gate, up, x, out)? {
            return Ok(());
        }
        if is_quantised(&gate) && is_quantised(&up) {
            return self.products(&[(gate, out), (up, out)], x, Epilogue::SwiGlu);
        }
        self.products(&[(up, out)], x, Epilogue::Store)?;
        self.products(&[(gate, out)], x, Epilogue::Gate)
    }
}
