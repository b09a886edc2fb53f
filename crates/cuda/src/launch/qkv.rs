//! `qkv`: the attention norm and the three projections.

use super::product::{Columns, Epilogue, Input, is_quantised};
use crate::buffers::FixedArg;
use crate::driver::Ptr;
use crate::weights::Layer;
use crate::{Cuda, Error};

impl Cuda {
    /// Writes `Q`, `K` and `V`.
    pub(crate) fn qkv(&mut self, layer: usize) -> Result<(), Error> {
        let normed = std::mem::take(&mut self.normed);
        if self.decode_qkv(layer)? {
            return Ok(());
        }
        let (w, b, t) = (&self.weights.layers[layer], &self.buffers, self.step.rows());
        let matrices = [(w.q, b.q.ptr()), (w.k, b.k.ptr()), (w.v, b.v.ptr())];
        if !normed {
            let (float, fixed) = self.qkv_input(w);
            self.normalise(b.x.ptr(), None, t, w.attn_norm, float, fixed.is_some())?;
        }
        let x = Input { float: b.normed.ptr(), fixed: &b.normed_fixed, columns: Columns::Rows(t) };
        self.products(&matrices, x, Epilogue::Store)
    }

    /// Where the norm of `layer`'s input goes, as floats and in fixed point, as its matrices want it. `Normed` is shown by
    /// `route`, which comes later; until then it may hold this stage's.
    pub(super) fn qkv_input(&self, layer: &Layer) -> (Option<Ptr>, Option<FixedArg>) {
        let any = |wanted: bool| [layer.q, layer.k, layer.v].iter().any(|m| is_quantised(m) == wanted);
        let b = &self.buffers;
        (any(false).then(|| b.normed.ptr()), any(true).then(|| b.normed_fixed.arg()))
    }
}
