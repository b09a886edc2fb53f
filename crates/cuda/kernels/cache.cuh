// The key/value cache: tiles of 64 positions of one KV head in the fixed point of ARCHITECTURE.md, rule 5, in the order in
// which integer tensor cores take them.
//
// A layer is [blocks][KH] tiles. A tile is
//   keys     two planes (high, low) of [4][HD / 32] fragments of 16 keys x 32 dimensions
//   scales   f32 [64] of the keys, then [64] of the values
//   values   two planes of [HD / 16][2] fragments of 16 dimensions x 32 keys
// A fragment is 512 bytes, which a warp reads in one coalesced load: the 16 bytes of lane l are its two words of the B
// operand of mma m16n8k32 (fragment.cuh) for the fragment's rows 0 to 7, then those for rows 8 to 15. The same words, the
// middle ones swapped, are the A operand of all 16 rows: prefill takes query heads as rows (A) and keys as columns (B),
// and wants its operands in neighbouring registers; decode, with few query heads, takes them the other way round.
// The 32 keys of a value fragment stand at the places that `place_of_key` says: the order in which the results of the
// score product lie in a thread's registers, so that probabilities need not move.
// That is the size of f16 and a scale to a row. Slots never stored in hold zeros or leftovers: their scales are never
// used, and their planes meet integer zeros alone.
#pragma once
#include "prelude.cuh"

constexpr u32 PLANE_BYTES = BLOCK * HEAD_DIM;
constexpr u32 KEYS_AT = 0, SCALES_AT = 2 * PLANE_BYTES, VALUES_AT = SCALES_AT + 2 * BLOCK * 4;
constexpr u32 TILE_BYTES = VALUES_AT + 2 * PLANE_BYTES;
constexpr u32 FRAGMENT = 512;
// Fragments of a plane along its second index.
constexpr u32 KEY_CHUNKS = HEAD_DIM / 32, VALUE_CHUNKS = BLOCK / 32;

// The tile of a KV head in a block; `layer` is the layer's first byte. 64 bits: a layer may exceed 4 GB.
__device__ __forceinline__ const u8* tile_at(const u8* layer, u32 block, u32 head) {
    return layer + ((u64)block * KV_HEADS + head) * TILE_BYTES;
}

// Where a lane's four words of a fragment begin, `which` counting a plane's fragments from its first byte.
__device__ __forceinline__ u32 fragment_at(u32 which, u32 lane) { return which * FRAGMENT + lane * 16; }

// Byte of (row, place) in a fragment of 16 rows x 32 places.
__device__ __forceinline__ u32 byte_at(u32 row, u32 place) {
    const u32 lane = row % 8 * 4 + place % 16 / 4, word = row / 8 * 2 + place / 16;
    return lane * 16 + word * 4 + place % 4;
}

// The place of key k (of 32) in a value fragment: within 16 keys, places 4t to 4t + 3 are keys 2t, 2t + 1, 8 + 2t, 9 + 2t.
__device__ __forceinline__ u32 place_of_key(u32 k) { return k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2; }

// Offset in a tile of dimension d of key i's high plane; the low plane is PLANE_BYTES on.
__device__ __forceinline__ u32 key_at(u32 i, u32 d) {
    return KEYS_AT + (i / 16 * KEY_CHUNKS + d / 32) * FRAGMENT + byte_at(i % 16, d % 32);
}
// The same for values.
__device__ __forceinline__ u32 value_at(u32 i, u32 d) {
    return VALUES_AT + (d / 16 * VALUE_CHUNKS + i / 32) * FRAGMENT + byte_at(d % 16, place_of_key(i % 32));
}
