//! Norms, and rows of floats rounded to fixed point (`kernels/fixed.cu`): what stands between stages.

use crate::buffers::{Fixed, FixedArg};
use crate::driver::{Arguments, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("fixed.cu", &["normalise", "fix_256", "fix_32"]);

pub(super) const THREADS: u32 = 256;

impl Cuda {
    /// Normalises `rows` rows of `x` (`[.., D]`) by rule 3 with `weight` (`[D]`): row `i`, or row `picks[i]`. Writes them
    /// as floats to `normed` (`[rows, D]`), if given, and in fixed point to the buffer `normed_fixed`, if asked.
    pub(crate) fn normalise(
        &self,
        x: Ptr,
        picks: Option<Ptr>,
        rows: usize,
        weight: Ptr,
        normed: Option<Ptr>,
        with_fixed: bool,
    ) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        let fixed = if with_fixed { self.buffers.normed_fixed.arg() } else { FixedArg::NONE };
        let arguments = Arguments::default()
            .push(x)
            .push(picks.unwrap_or(Ptr::NULL))
            .push(weight)
            .push(normed.unwrap_or(Ptr::NULL))
            .push(fixed);
        self.kernels.get("normalise").launch(&self.device, Shape::new(rows, THREADS), arguments)
    }

    /// Rounds `rows` rows of `values` (`[rows, K]`, the `K` of `to`) to fixed point by rule 1.
    pub(crate) fn fix(&self, values: Ptr, rows: usize, to: &Fixed) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        let eights = rows * to.k / 8;
        let kernel = if quant::fixed::block_len(to.k) == 256 { "fix_256" } else { "fix_32" };
        let arguments = Arguments::default().push(values).push(size(eights)).push(to.arg());
        let shape = Shape::new(eights.div_ceil(THREADS as usize), THREADS);
        self.kernels.get(kernel).launch(&self.device, shape, arguments)
    }
}
