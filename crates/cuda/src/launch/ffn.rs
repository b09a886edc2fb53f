//! `ffn`: the dense feed-forward network.

use super::product::{Columns, Epilogue, Input, is_quantised};
use crate::weights::Ffn;
use crate::{Cuda, Error};

impl Cuda {
    /// Adds to `X`.
    pub(crate) fn ffn(&mut self, layer: usize) -> Result<(), Error> {
        if self.inside.is_none() && self.decode_ffn(layer)? {
            return Ok(());
        }
        let w = &self.weights.layers[layer];
        let Ffn::Dense { gate, up, down } = w.ffn else {
            unreachable!("`run` refuses `ffn` for a mixture of experts")
        };
        let (b, t) = (&self.buffers, self.step.rows());
        let float = !(is_quantised(&gate) && is_quantised(&up));
        let fixed = is_quantised(&gate) || is_quantised(&up);
        self.normalise(b.x.ptr(), None, t, w.ffn_norm, float.then(|| b.normed.ptr()), fixed)?;
        let columns = Columns::Rows(t);
        let x = Input { float: b.normed.ptr(), fixed: &b.normed_fixed, columns };
        self.swiglu(gate, up, x, b.hidden.ptr())?;
        if is_quantised(&down) {
            self.fix(b.hidden.ptr(), t, &b.hidden_fixed)?;
        }
        let x = Input { float: b.hidden.ptr(), fixed: &b.hidden_fixed, columns };
        if self.observed_down(down, x, t)? {
            return Ok(());
        }
        self.products(&[(down, b.x.ptr())], x, Epilogue::Add)
    }
}
