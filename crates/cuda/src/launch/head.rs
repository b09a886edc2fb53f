//! `head`: the output norm of the wanted rows, and their logits.

use super::product::is_quantised;
use crate::{Cuda, Error};

impl Cuda {
    /// Writes `Logits`.
    pub(crate) fn head(&mut self) -> Result<(), Error> {
        if self.decode_head()? {
            return Ok(());
        }
        let (w, b, r) = (&self.weights, &self.buffers, self.step.outputs());
        let fixed = is_quantised(&w.head);
        let normed = (!fixed).then(|| b.normed.ptr());
        self.normalise(b.x.ptr(), Some(self.step.wanted()), r, w.output_norm, normed, fixed)?;
        self.product(&w.head, b.normed.ptr(), &b.normed_fixed, r, b.logits.ptr())
    }
}
