//! The current step on the GPU: which rows, at which positions, with which KV blocks. Fixed addresses, so that a recorded
//! graph finds the next step where it found the last one.

use std::sync::Arc;

use model::{BLOCK, Step};

use crate::Error;
use crate::driver::{Argument, Device, Memory, Ptr, size};

/// A step as kernels see it (`Step` in prelude.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepArg {
    pub(crate) token: Ptr,
    pub(crate) position: Ptr,
    pub(crate) sequence: Ptr,
    pub(crate) tables: Ptr,
    pub(crate) stride: u32,
    pub(crate) rows: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for StepArg {}

/// Sequences that one step can hold.
pub(crate) const MAX_SEQUENCES: usize = 256;

/// The step's arrays, one after the other in one allocation, so that a step is one copy:
/// tokens, positions, sequences and wanted rows `[max_rows]` each, tables `[S][stride]`.
pub(crate) struct DeviceStep {
    memory: Memory<u32>,
    max_rows: usize,
    /// Blocks of the longest sequence.
    stride: usize,
    sequences: usize,
    /// What was sent last, on the host.
    pub(crate) host: Step,
    staging: Vec<u32>,
}

impl DeviceStep {
    pub(crate) fn new(device: &Arc<Device>, max_rows: usize, context: usize) -> Result<DeviceStep, Error> {
        let (stride, sequences) = (context.div_ceil(BLOCK), max_rows.min(MAX_SEQUENCES));
        let memory = device.zeros(4 * max_rows + sequences * stride)?;
        Ok(DeviceStep { memory, max_rows, stride, sequences, host: Step::default(), staging: Vec::new() })
    }

    /// Bytes that `new` takes.
    pub(crate) fn bytes(max_rows: usize, context: usize) -> usize {
        4 * (4 * max_rows + max_rows.min(MAX_SEQUENCES) * context.div_ceil(BLOCK))
    }

    /// Sequences that fit.
    pub(crate) fn max_sequences(&self) -> usize {
        self.sequences
    }

    /// Sends a step that was checked.
    pub(crate) fn set(&mut self, step: &Step) -> Result<(), Error> {
        let rows = self.max_rows;
        self.staging.clear();
        self.staging.resize(4 * rows + step.tables.len() * self.stride, 0);
        for (t, row) in step.rows.iter().enumerate() {
            self.staging[t] = row.token;
            self.staging[rows + t] = row.position;
            self.staging[2 * rows + t] = row.sequence;
        }
        self.staging[3 * rows..][..step.logits.len()].copy_from_slice(&step.logits);
        for (s, table) in step.tables.iter().enumerate() {
            // A table may name blocks beyond the context; no position is there.
            let table = &table[..table.len().min(self.stride)];
            self.staging[4 * rows + s * self.stride..][..table.len()].copy_from_slice(table);
        }
        self.memory.write(0, &self.staging)?;
        self.host.clone_from(step);
        Ok(())
    }

    /// The device has moved every row one position on.
    pub(crate) fn advance(&mut self) {
        self.host.rows.iter_mut().for_each(|row| row.position += 1);
    }

    /// The kernels' view.
    pub(crate) fn arg(&self) -> StepArg {
        StepArg {
            token: self.memory.ptr(),
            position: self.memory.at(self.max_rows),
            sequence: self.memory.at(2 * self.max_rows),
            tables: self.memory.at(4 * self.max_rows),
            stride: size(self.stride),
            rows: size(self.rows()),
        }
    }

    /// Indices of the rows whose logits are wanted, `[R]`.
    pub(crate) fn wanted(&self) -> Ptr {
        self.memory.at(3 * self.max_rows)
    }

    /// `T`.
    pub(crate) fn rows(&self) -> usize {
        self.host.rows.len()
    }

    /// `R`.
    pub(crate) fn outputs(&self) -> usize {
        self.host.logits.len()
    }
}
