// The key/value cache: tiles of 64 positions of one KV head in the fixed point of ARCHITECTURE.md, rule 5, in the order in
// which integer tensor cores take them.
//
// A layer is [blocks][KH] tiles. A tile is
//   keys     two planes (high, low) of [8][HD / 64] atoms of 8 keys x 64 dimensions
//   scales   f32 [64] of the keys, then [64] of the values
//   values   two planes of [HD / 8] atoms of 8 dimensions x 64 keys
// An atom is 8 rows of 64 bytes, the four 16-byte pieces of a row permuted (`byte_at`): what wgmma calls a swizzle of 64
// bytes, and what ldmatrix reads without conflicts of banks. Where HD is no multiple of 64, the last atom of keys has rows
// of 32 bytes, not permuted. A thread (g, t) of a warp that reads piece t of row g has four words of the A operand of mma
// m16n8k32 for two steps, if the other operand's values are taken in the same order; a warp reads 512 bytes in a row.
// The 64 keys of a value atom stand at the places that `place_of_key` says: the order in which the results of the score
// product lie in a thread's registers, so that probabilities need not move.
// That is the size of f16 and a scale to a row. Slots never stored in hold zeros or leftovers: their scales are never
// used, and their planes meet integer zeros alone.
#pragma once
#include "prelude.cuh"

constexpr u32 PLANE_BYTES = BLOCK * HEAD_DIM;
constexpr u32 KEYS_AT = 0, SCALES_AT = 2 * PLANE_BYTES, VALUES_AT = SCALES_AT + 2 * BLOCK * 4;
constexpr u32 TILE_BYTES = VALUES_AT + 2 * PLANE_BYTES;
// Bytes of an atom, and from eight rows to the next eight.
constexpr u32 ATOM = 512, KEY_ROWS = 8 * HEAD_DIM, VALUE_ROWS = 8 * BLOCK;
// Steps of 32 along its second index.
constexpr u32 KEY_CHUNKS = HEAD_DIM / 32, VALUE_CHUNKS = BLOCK / 32;

// The tile of a KV head in a block; `layer` is the layer's first byte. 64 bits: a layer may exceed 4 GB.
__device__ __forceinline__ const u8* tile_at(const u8* layer, u32 block, u32 head) {
    return layer + ((u64)block * KV_HEADS + head) * TILE_BYTES;
}

// Asks for a decoding row's tiles, as many from the first one on as `AHEAD` to a block of threads, to be in the second-level
// cache when attention wants them: memory is idle while a row is projected. By any warp, before the wait: what it looks at
// was written before the layer ahead.
__device__ __forceinline__ void prefetch_tiles(const u8* layer, const Step& step) {
#if __CUDA_ARCH__ >= 900
    constexpr u32 AHEAD = 2;  // more would queue before the next kernels' weights: at depth 32,768, 8 cost 2%
    const u32 n = threadIdx.x % 32 * gridDim.x + blockIdx.x, tile = n / KV_HEADS;
    if (threadIdx.x % 32 >= AHEAD || tile > load_fresh(step.position) / BLOCK) return;
    const u32 block = load_fresh(step.tables + (u64)load_fresh(step.sequence) * step.stride + tile);
    prefetch_bulk(tile_at(layer, block, n % KV_HEADS), TILE_BYTES);
#endif
}

// Byte of piece `piece` of row `row` in an atom.
__device__ __forceinline__ u32 piece_at(u32 row, u32 piece) { return row * 64 + (piece ^ row / 2) % 4 * 16; }

// Byte of (row, place) in eight rows of `places`.
__device__ __forceinline__ u32 byte_at(u32 row, u32 place, u32 places) {
    const u32 atom = place / 64 * ATOM, rest = place % 64;
    return atom + (places - place / 64 * 64 >= 64 ? piece_at(row, rest / 16) + rest % 16 : row * 32 + rest);
}

// The place of key k among 64: of 16 keys, places 4t to 4t + 3 are keys 2t, 2t + 1, 8 + 2t, 9 + 2t.
__device__ __forceinline__ u32 place_of_key(u32 k) { return k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2; }

// Offset in a tile of dimension d of key i's high plane; the low plane is PLANE_BYTES on.
__device__ __forceinline__ u32 key_at(u32 i, u32 d) { return KEYS_AT + i / 8 * KEY_ROWS + byte_at(i % 8, d, HEAD_DIM); }
// The same for values.
__device__ __forceinline__ u32 value_at(u32 i, u32 d) {
    return VALUES_AT + d / 8 * VALUE_ROWS + byte_at(d % 8, place_of_key(i), BLOCK);
}
