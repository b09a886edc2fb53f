// Where the fields of a block lie in a tile of weights.
//
// Block-quantised matrices are kept in tiles of 32 rows. A tile is [blocks of a row][2 bands of 16 rows' blocks], and within
// the 16 blocks the pieces of one row interleave with those of the others: piece p of all 16 rows, then piece p + 1.
// So eight rows' 16 bytes are the 128 bytes that a tensor-core fragment wants, without conflicts of banks, and the block of
// a band, which is one left operand, comes by one copy. The bytes are the file's, none more (layout.rs makes and undoes this).
// A matrix whose rows are no multiple of 32 ends with a tile whose missing rows are zero bytes; each expert has tiles
// of its own.
#pragma once
#include "prelude.cuh"

// Offsets are from the start of the 16 rows' blocks; UNIT(u) is the u-th 16-byte piece of row 0, the next row's is 16
// bytes on.
template <u32 T> struct Layout;

// 0: d, dmin (f16 each), 12 bytes of scales and minima. 1..8: nibbles, 32 bytes hold 64 weights, low nibbles first.
template <> struct Layout<T_Q4K> { static constexpr u32 BYTES = 144, VALUES = 256, QS = 1; };
// 0: as Q4_K. 1..2: fifth bits, bit j of byte l belongs to weight 32 j + l. 3..10: nibbles as Q4_K.
template <> struct Layout<T_Q5K> { static constexpr u32 BYTES = 176, VALUES = 256, QH = 1, QS = 3; };
// 0..7: low nibbles, 64 bytes hold 128 weights, low nibbles first. 8..11: two high bits, 32 bytes hold 128 weights.
// 12: 16 signed scales. Then d, f16 a row.
template <> struct Layout<T_Q6K> { static constexpr u32 BYTES = 210, VALUES = 256, QL = 0, QH = 8, SCALES = 12, D = 13 * 256; };
// 0: 16 bytes of (min << 4 | scale). 1..4: two bits, 32 bytes hold 128 weights. Then d, dmin as one u32 a row.
template <> struct Layout<T_Q2K> { static constexpr u32 BYTES = 84, VALUES = 256, SCALES = 0, QS = 1, D = 5 * 256; };
// 0..1: third bits as Q5_K's fifth. 2..5: two bits as Q2_K. Then 8 bytes, then 4 bytes of scales a row; then d, f16.
template <> struct Layout<T_Q3K> {
    static constexpr u32 BYTES = 110, VALUES = 256, HMASK = 0, QS = 2, SCALES = 6 * 256, SCALES_HIGH = SCALES + 128, D = SCALES_HIGH + 64;
};
// 0..1: codes, signed. Then d, f16.
template <> struct Layout<T_Q8_0> { static constexpr u32 BYTES = 34, VALUES = 32, QS = 0, D = 2 * 256; };
// 0: nibbles, low ones are weights 0..15. Then d, f16.
template <> struct Layout<T_Q4_0> { static constexpr u32 BYTES = 18, VALUES = 32, QS = 0, D = 256; };
// 0: nibbles. Then d, m as one u32.
template <> struct Layout<T_Q4_1> { static constexpr u32 BYTES = 20, VALUES = 32, QS = 0, D = 256; };
// 0: nibbles. Then fifth bits as u32: bit i of weight i; then d, f16.
template <> struct Layout<T_Q5_0> { static constexpr u32 BYTES = 22, VALUES = 32, QS = 0, QH = 256, D = 256 + 64; };
// 0: nibbles. Then d, m as one u32; then fifth bits as u32.
template <> struct Layout<T_Q5_1> { static constexpr u32 BYTES = 24, VALUES = 32, QS = 0, D = 256, QH = 256 + 64; };

// Rows of a band. Bytes of a band's blocks and of a tile's in one column of blocks, and of a whole tile of rows of length k.
constexpr u32 BAND = 16;
template <u32 T> constexpr u32 BAND_BYTES = BAND * Layout<T>::BYTES;
template <u32 T> constexpr u32 COLUMN_BYTES = 2 * BAND_BYTES<T>;
template <u32 T> __host__ __device__ constexpr u64 tile_bytes(u32 k) { return (u64)(k / Layout<T>::VALUES) * COLUMN_BYTES<T>; }
// Bytes from one expert's tiles to the next one's.
template <u32 T> __host__ __device__ constexpr u64 expert_bytes(u32 k, u32 rows) { return tile_bytes<T>(k) * ((rows + 31) / 32); }

// The blocks of band 0 or 1 in a column of blocks.
template <u32 T> __device__ __forceinline__ const u8* band_of(const u8* column, u32 band) { return column + band * BAND_BYTES<T>; }
// The u-th 16-byte piece of a row of a band.
__device__ __forceinline__ const u8* unit(const u8* band, u32 u, u32 row) { return band + (u * BAND + row) * 16; }
