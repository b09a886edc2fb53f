//! `embed`: token rows of the embedding to `X` (`kernels/embed.cu`).

use crate::driver::{Arguments, Shape};
use crate::kernels::UnitOf;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("embed.cu", &["embed"]);

pub(super) const THREADS: u32 = 256;

impl Cuda {
    pub(crate) fn embed(&mut self) -> Result<(), Error> {
        let (d, t) = (self.model.config.hidden, self.step.rows());
        let arguments = Arguments::default()
            .push(self.weights.embedding.arg())
            .push(self.step.arg())
            .push(self.buffers.x.ptr());
        let shape = Shape::new(1, THREADS).grid(d.div_ceil(THREADS as usize), t, 1);
        self.kernels.get("embed").launch(&self.device, shape, arguments)
    }
}
