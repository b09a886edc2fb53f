//! The feed-forward stages with their inside kept: gate, up and down each written to memory (`kernels/observe.cu`).

use std::sync::Arc;

use model::Buffer;

use super::product::{Columns, Epilogue, Input};
use crate::driver::{Arguments, Device, Memory, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::weights::Matrix;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("observe.cu", &["swiglu", "add"]);

const THREADS: u32 = 256;

/// What only an observed stage writes; `Down` is the buffer `delta`.
pub(crate) struct Inside {
    /// `[T, K, F]`, or `[T, F]` for a dense model.
    pub(crate) gate: Memory<f32>,
    /// Likewise.
    pub(crate) up: Memory<f32>,
}

impl Inside {
    /// Room for `values` of each.
    pub(crate) fn new(device: &Arc<Device>, values: usize) -> Result<Inside, Error> {
        Ok(Inside { gate: device.zeros(values)?, up: device.zeros(values)? })
    }
}

impl Cuda {
    /// Where an observed buffer lies, and how many values the current step has of it.
    pub(crate) fn inside_buffer(&self, buffer: Buffer) -> Option<(&Memory<f32>, usize)> {
        let inside = self.inside.as_ref()?;
        let (config, t) = (&self.model.config, self.step.rows());
        let (pairs, width) = match config.ffn {
            model::Ffn::Moe(moe) => (t * moe.used, moe.width),
            model::Ffn::Dense { width } => (t, width),
        };
        Some(match buffer {
            Buffer::Gate => (&inside.gate, pairs * width),
            Buffer::Up => (&inside.up, pairs * width),
            // Of a dense model: no stage but `ffn` has it.
            Buffer::Hidden => (&self.buffers.hidden, pairs * width),
            Buffer::Down => (&self.buffers.delta, pairs * config.hidden),
            _ => return None,
        })
    }

    /// Gate, up and SwiGLU one after the other; false if nobody observes.
    pub(crate) fn observed_swiglu(
        &self,
        gate: Matrix,
        up: Matrix,
        x: Input<'_>,
        out: Ptr,
    ) -> Result<bool, Error> {
        let Some(inside) = &self.inside else { return Ok(false) };
        self.products(&[(gate, inside.gate.ptr()), (up, inside.up.ptr())], x, Epilogue::Store)?;
        let rows = match x.columns {
            Columns::Rows(rows) => rows,
            Columns::Pairs { count, .. } => count,
        };
        let arguments = Arguments::default().push(inside.gate.ptr()).push(inside.up.ptr()).push(out);
        self.elementwise("swiglu", arguments, rows * gate.rows)?;
        Ok(true)
    }

    /// The dense network's down projection, then its sum with the residual stream; false if nobody observes.
    pub(crate) fn observed_down(&self, down: Matrix, x: Input<'_>, rows: usize) -> Result<bool, Error> {
        if self.inside.is_none() {
            return Ok(false);
        }
        let b = &self.buffers;
        self.products(&[(down, b.delta.ptr())], x, Epilogue::Store)?;
        let arguments = Arguments::default().push(b.delta.ptr()).push(b.x.ptr());
        self.elementwise("add", arguments, rows * down.rows)?;
        Ok(true)
    }

    fn elementwise(&self, kernel: &str, arguments: Arguments, count: usize) -> Result<(), Error> {
        let shape = Shape::new(count.div_ceil(THREADS as usize), THREADS);
        self.kernels.get(kernel).launch(&self.device, shape, arguments.push(size(count)))
    }
}
