//! How a block-quantised matrix lies in device memory: tiles of 32 rows, in two bands whose blocks' pieces interleave, so
//! that every load is whole and a band's block is one run of bytes (`kernels/types.cuh` says what a kernel makes of it). A
//! permutation of the file's bytes: nothing is added, rounded or lost, and `restore` (of the tests) undoes it.

use gguf::Dtype;

/// Rows of a tile.
pub(crate) const TILE: usize = 32;

/// Rows of a band, of which a tile has two: those of a left operand of the tensor cores.
pub(crate) const BAND: usize = 16;

/// A run of a block's bytes that stays together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it lies in the block of the file.
    pub(crate) offset: usize,
    /// 16, 8, 4 or 2 bytes.
    pub(crate) size: usize,
}

/// The pieces of a block in the order in which a tile holds them, largest first so that each is aligned to its size;
/// empty for float types, which stay as they are in the file.
pub(crate) fn pieces(dtype: Dtype) -> Vec<Piece> {
    let list: &[(usize, usize)] = match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => &[],
        Dtype::Q8_0 => &[(2, 32), (0, 2)],
        Dtype::Q4_0 => &[(2, 16), (0, 2)],
        Dtype::Q4_1 => &[(4, 16), (0, 4)],
        Dtype::Q5_0 => &[(6, 16), (2, 4), (0, 2)],
        Dtype::Q5_1 => &[(8, 16), (0, 4), (4, 4)],
        Dtype::Q2K => &[(0, 80), (80, 4)],
        Dtype::Q3K => &[(0, 96), (96, 8), (104, 4), (108, 2)],
        Dtype::Q4K => &[(0, 144)],
        Dtype::Q5K => &[(0, 176)],
        Dtype::Q6K => &[(0, 208), (208, 2)],
    };
    let units = |&(offset, size): &(usize, usize)| {
        let unit = size.min(16);
        (0..size / unit).map(move |i| Piece { offset: offset + i * unit, size: unit })
    };
    list.iter().flat_map(units).collect()
}

/// Bytes of a matrix of `experts` times `rows` rows of `k` on the device: whole tiles for each expert.
pub(crate) fn device_bytes(dtype: Dtype, k: usize, rows: usize, experts: usize) -> usize {
    let row = dtype.row_bytes(k).expect("the reader checked that rows are whole blocks");
    let rows = if pieces(dtype).is_empty() { rows } else { rows.next_multiple_of(TILE) };
    experts * rows * row
}

/// The file's bytes of one expert, in tiles. The device does the same with `repack.cu`; this is what that is tested
/// against.
#[cfg(test)]
pub(crate) fn tiles(dtype: Dtype, k: usize, rows: usize, file: &[u8]) -> Vec<u8> {
    let mut out = vec![0; device_bytes(dtype, k, rows, 1)];
    places(dtype, k, rows, |from, to, size| out[to..to + size].copy_from_slice(&file[from..from + size]));
    out
}

/// The inverse of `tiles`.
#[cfg(test)]
pub(crate) fn restore(dtype: Dtype, k: usize, rows: usize, tiles: &[u8]) -> Vec<u8> {
    let mut out = vec![0; rows * dtype.row_bytes(k).expect("as in `tiles`")];
    places(dtype, k, rows, |from, to, size| out[from..from + size].copy_from_slice(&tiles[to..to + size]));
    out
}

/// Calls `each` with every piece's offset in the file, its offset in the tiles, and its size.
#[cfg(test)]
fn places(dtype: Dtype, k: usize, rows: usize, mut each: impl FnMut(usize, usize, usize)) {
    let (block, pieces) = (dtype.block_bytes(), pieces(dtype));
    let blocks = k / dtype.block_len();
    for row in 0..rows {
        for b in 0..blocks {
            let from = (row * blocks + b) * block;
            let mut to = ((row / TILE * blocks + b) * TILE + row % TILE / BAND * BAND) * block;
            for piece in &pieces {
                each(from + piece.offset, to + row % BAND * piece.size, piece.size);
                to += BAND * piece.size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_block_once_and_are_aligned() {
        for dtype in Dtype::ALL {
            let pieces = pieces(dtype);
            if pieces.is_empty() {
                assert!(matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16), "{dtype}");
                continue;
            }
            let mut covered = vec![0; dtype.block_bytes()];
            let mut at = 0;
            for piece in pieces {
                covered[piece.offset..][..piece.size].iter_mut().for_each(|n| *n += 1);
                assert!(at % piece.size == 0, "{dtype}: {piece:?} would lie at {at}");
                at += BAND * piece.size;
            }
            assert!(covered.iter().all(|&n| n == 1), "{dtype}: {covered:?}");
            assert_eq!(at % 16, 0, "{dtype}: the next band would not be aligned");
        }
    }

    #[test]
    fn a_matrix_comes_back() {
        for dtype in Dtype::ALL.into_iter().filter(|&d| !pieces(d).is_empty()) {
            for rows in [1, 31, 32, 33, 96] {
                let k = 2 * dtype.block_len();
                let file: Vec<u8> =
                    (0..rows * dtype.row_bytes(k).unwrap()).map(|i| (i * 7 + i / 251) as u8).collect();
                let tiles = tiles(dtype, k, rows, &file);
                assert_eq!(tiles.len(), device_bytes(dtype, k, rows, 1), "{dtype} {rows}");
                assert_eq!(restore(dtype, k, rows, &tiles), file, "{dtype} {rows}");
                assert!(rows == 1 || tiles != file, "{dtype} {rows}: nothing was moved");
            }
        }
    }
}
