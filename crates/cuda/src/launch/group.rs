//! The step's (row, rank) pairs sorted by expert (`kernels/group.cu`), for products that take all rows of an expert at
//! once.

use std::sync::Arc;

use model::{Config, Ffn};

use crate::driver::{Argument, Arguments, Device, Memory, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::{Cuda, Error};

pub(crate) const UNIT: UnitOf = ("group.cu", &["group"]);

pub(super) const THREADS: u32 = 256;
/// A warp places one expert's pairs.
const EXPERTS_PER_BLOCK: usize = THREADS as usize / 32;

/// Pairs by expert as kernels see them (`Groups` in prelude.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupsArg {
    pairs: Ptr,
    starts: Ptr,
    tiles: Ptr,
    tile_count: Ptr,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for GroupsArg {}

/// The pairs of a step, `pair = t * K + rank`, experts ascending, pairs ascending within an expert.
pub(crate) struct Groups {
    /// `[T * K]`.
    pairs: Memory<u32>,
    /// Where each expert's pairs begin, `[E + 1]`.
    starts: Memory<u32>,
    /// Expert, first index in `pairs`, count: `[tiles][3]`. An expert's pairs in groups of at most so many columns.
    tiles: Memory<u32>,
    /// `[1]`.
    tile_count: Memory<u32>,
}

impl Groups {
    /// For steps of up to `rows` rows.
    pub(crate) fn new(device: &Arc<Device>, config: &Config, rows: usize) -> Result<Groups, Error> {
        let (pairs, experts) = Groups::sizes(config, rows);
        Ok(Groups {
            pairs: device.alloc(pairs)?,
            starts: device.alloc(experts + 1)?,
            tiles: device.alloc(3 * pairs)?,
            tile_count: device.alloc(1)?,
        })
    }

    /// Bytes that `new` takes.
    pub(crate) fn bytes(config: &Config, rows: usize) -> usize {
        let (pairs, experts) = Groups::sizes(config, rows);
        4 * (4 * pairs + experts + 2)
    }

    fn sizes(config: &Config, rows: usize) -> (usize, usize) {
        match config.ffn {
            Ffn::Dense { .. } => (0, 0),
            Ffn::Moe(moe) => (rows * moe.used, moe.experts),
        }
    }

    pub(crate) fn arg(&self) -> GroupsArg {
        GroupsArg {
            pairs: self.pairs.ptr(),
            starts: self.starts.ptr(),
            tiles: self.tiles.ptr(),
            tile_count: self.tile_count.ptr(),
        }
    }

    /// The most tiles that `pairs` pairs of `experts` experts can make.
    pub(crate) fn max_tiles(pairs: usize, experts: usize, columns: usize) -> usize {
        // Every expert but the full tiles' may leave one tile partly filled.
        pairs.min(pairs / columns + experts.min(pairs))
    }
}

/// What `group` has written, on the host.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Grouped {
    pub(crate) pairs: Vec<u32>,
    pub(crate) starts: Vec<u32>,
    pub(crate) tiles: Vec<[u32; 3]>,
}

#[cfg(test)]
impl Groups {
    /// Of a step of `pairs` pairs.
    pub(crate) fn read(&self, pairs: usize) -> Result<Grouped, Error> {
        let values = |memory: &Memory<u32>, len: usize| -> Result<Vec<u32>, Error> {
            let mut values = vec![0; len];
            memory.read(0, &mut values)?;
            Ok(values)
        };
        let tiles = values(&self.tile_count, 1)?[0] as usize;
        Ok(Grouped {
            pairs: values(&self.pairs, pairs)?,
            starts: values(&self.starts, self.starts.len())?,
            tiles: values(&self.tiles, 3 * tiles)?.as_chunks().0.to_vec(),
        })
    }
}

impl Cuda {
    /// Sorts the pairs of the step's `Experts` into the buffer `groups`, in tiles of at most `columns` pairs.
    pub(crate) fn group(&self, columns: usize) -> Result<(), Error> {
        let Ffn::Moe(moe) = self.model.config.ffn else {
            unreachable!("only stages of a mixture of experts group")
        };
        let arguments = Arguments::default()
            .push(self.buffers.experts.ptr())
            .push(size(self.step.rows() * moe.used))
            .push(size(columns))
            .push(self.buffers.groups.arg());
        let shape = Shape::new(moe.experts.div_ceil(EXPERTS_PER_BLOCK), THREADS);
        self.kernels.get("group").launch(&self.device, shape, arguments)
    }
}
