//! Products with many rows of activations on Hopper (`kernels/product_many.cu`): which products they are, and how much
//! shared memory a block gets.

use super::decode::shared_memory;
use crate::kernels::UnitOf;
use crate::layout::TILE;
use crate::weights::Matrix;

pub(crate) const UNIT: UnitOf = ("product_many.cu", &[KERNEL]);

pub(super) const KERNEL: &str = "product_many";
/// Two warpgroups that multiply and one that copies.
pub(super) const THREADS: u32 = 3 * 128;
/// `COLUMNS` of the kernel.
const COLUMNS: usize = 64;
/// `TILES` of the kernel: row tiles of an item, of one matrix or half of them of each of a pair.
const TILES: usize = 4;
/// `MAX_STAGES` of the kernel.
const MAX_STAGES: usize = 8;
/// Bytes of `Outputs` of the kernel, which each of the two warpgroups that multiply has.
const OUTPUTS: usize = COLUMNS * (64 + 1) * 4;
/// Stages begin at multiples of this, since the panels in them do.
const ATOM: usize = 1024;
/// The compute capability, times ten, whose instructions the kernel uses.
const HOPPER: u32 = 90;

/// Whether the kernel can do these products: all weights in super-blocks, and a pair of one type.
pub(super) fn can<'a>(arch: u32, mut list: impl Iterator<Item = &'a Matrix> + Clone, pair: bool) -> bool {
    let first = list.clone().next().map(|w| w.dtype);
    arch == HOPPER
        && list.all(|w| w.dtype.block_len() == super::product::SLOT && (!pair || Some(w.dtype) == first))
}

/// Items of a product: groups of row tiles by groups of columns.
pub(super) fn items<'a>(list: impl Iterator<Item = &'a Matrix>, pair: bool, groups: usize) -> usize {
    let tiles = list.map(|w| w.rows.div_ceil(TILE));
    let across: usize = if pair {
        tiles.take(1).map(|n| n.div_ceil(TILES / 2)).sum()
    } else {
        tiles.map(|n| n.div_ceil(TILES)).sum()
    };
    across * groups
}

/// Bytes of a stage: `Columns` of the kernel and the tiles' slots.
fn stage(weight_bytes: usize, planes: usize) -> usize {
    (COLUMNS * (256 * planes + 64 + 4) + TILES * weight_bytes).next_multiple_of(ATOM)
}

/// How many stages there is room for, `weight_bytes` to a tile's slot, and bytes of shared memory for as many.
pub(super) fn stages(arch: u32, weight_bytes: usize, planes: usize) -> (usize, usize) {
    // The barriers, and what is lost before the first multiple of ATOM.
    let fixed = 8 * 2 * MAX_STAGES + 2 * OUTPUTS + ATOM;
    let stage = stage(weight_bytes, planes);
    let count = ((shared_memory(arch) - fixed) / stage).min(MAX_STAGES);
    (count, fixed + count * stage)
}

#[cfg(test)]
mod tests {
    use gguf::Dtype;

    use super::*;

    #[test]
    fn every_type_leaves_room_for_copies_ahead() {
        for (dtype, wanted) in
            [(Dtype::Q2K, 4), (Dtype::Q3K, 3), (Dtype::Q4K, 3), (Dtype::Q5K, 3), (Dtype::Q6K, 3)]
        {
            let (count, shared) = stages(HOPPER, TILE * dtype.block_bytes(), 2);
            assert_eq!(count, wanted, "{dtype}");
            assert!(shared <= shared_memory(HOPPER), "{dtype}: {shared}");
        }
    }
}
