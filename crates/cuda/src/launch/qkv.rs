//! `qkv`: the attention norm and the three projections.

use super::product::{Columns, Epilogue, Input, is_quantised};
use crate::{Cuda, Error};

impl Cuda {
    /// Writes `Q`, `K` and `V`.
    pub(crate) fn qkv(&mut self, layer: usize) -> Result<(), Error> {
        if self.decode_qkv(layer)? {
            return Ok(());
        }
        let (w, b, t) = (&self.weights.layers[layer], &self.buffers, self.step.rows());
        let matrices = [(w.q, b.q.ptr()), (w.k, b.k.ptr()), (w.v, b.v.ptr())];
        let float = matrices.iter().any(|(m, _)| !is_quantised(m));
        let fixed = matrices.iter().any(|(m, _)| is_quantised(m));
        // `Normed` is shown by `route`, which comes later; until then it may hold this stage's.
        self.normalise(b.x.ptr(), None, t, w.attn_norm, float.then(|| b.normed.ptr()), fixed)?;
        let x = Input { float: b.normed.ptr(), fixed: &b.normed_fixed, columns: Columns::Rows(t) };
        self.products(&matrices, x, Epilogue::Store)
    }
}
