//! `attn_out`: the output projection, added to the residual stream.

use super::product::{Columns, Epilogue, Input};
use crate::{Cuda, Error};

impl Cuda {
    /// Adds to `X`.
    pub(crate) fn attn_out(&mut self, layer: usize) -> Result<(), Error> {
        if self.decode_attn_out(layer)? {
            return Ok(());
        }
        let (b, t) = (&self.buffers, self.step.rows());
        let x = Input { float: b.attn.ptr(), fixed: &b.attn_fixed, columns: Columns::Rows(t) };
        self.products(&[(self.weights.layers[layer].out, b.x.ptr())], x, Epilogue::Add)
    }
}
