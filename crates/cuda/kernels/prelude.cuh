// What every kernel may use: names of types, the constants of the model, the structures that the host passes.
//
// The host compiles each file for one model and one GPU and defines, as integers unless said otherwise:
//   HIDDEN (D), HEADS (H), KV_HEADS (KH), HEAD_DIM (HD), VOCAB (V), LAYERS
//   WIDTH (F: of an expert, or of the dense network), EXPERTS (E) and USED (K), both 0 for a dense model
//   PLANES: 2 for A16, 1 for A8
//   RENORMALISE: 0 or 1
//   RMS_EPS, EXPERT_SCALE: bit patterns of f32
//   TYPES: bit mask over the tensor types (1 << T_...) that the model's matrices have
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef float f32;

#include "ptx.cuh"

// GGUF's ids of the tensor types.
enum Type : u32 {
    T_F32 = 0, T_F16 = 1, T_Q4_0 = 2, T_Q4_1 = 3, T_Q5_0 = 6, T_Q5_1 = 7, T_Q8_0 = 8,
    T_Q2K = 10, T_Q3K = 11, T_Q4K = 12, T_Q5K = 13, T_Q6K = 14, T_BF16 = 30,
};

// Whether the model has a matrix of this type: code for other types is not compiled.
constexpr __device__ bool has(u32 type) { return (TYPES >> type) & 1; }

// A weight matrix [experts][rows][k], in the layout of layout.rs: block-quantised types in tiles of 32 rows, float
// types row by row as in the file. `rows` is of one expert.
struct Matrix {
    const u8* data;
    u32 type;
    u32 rows;
};

// Rows of K activations in fixed point (ARCHITECTURE.md, rule 1): x ~ scale * (256 hi + lo), or scale * hi (A8).
struct Fixed {
    i8* hi;      // [T][K]
    i8* lo;      // [T][K]; unused for A8
    i32* sum;    // [T][K / 16]: sums of q over 16 values; q = 256 hi + lo, or hi (A8)
    f32* scale;  // [T][K / block_len(K)]
};

// The rows of a step and where their keys and values live.
struct Step {
    const u32* token;     // [T]
    const u32* position;  // [T]
    const u32* sequence;  // [T], an index of `tables`
    const u32* tables;    // [S][stride]: KV block ids
    u32 stride;
    u32 rows;             // T
};

// The step's (row, rank) pairs by expert: pair = row * USED + rank. Written by `group`.
struct Groups {
    u32* pair;        // [T * K], experts ascending, pairs ascending within an expert
    u32* start;       // [E + 1]: where each expert's pairs begin
    u32* tile;        // [tiles][3]: expert, first index in `pair`, count
    u32* tile_count;  // [1]
};

// Values that share a scale in a row of length k.
constexpr __host__ __device__ u32 block_len(u32 k) { return k % 256 == 0 ? 256 : 32; }

// Positions in one KV block, which is one attention tile.
constexpr u32 BLOCK = 64;
// Attention tiles to a span (rule 5).
constexpr u32 SPAN_TILES = 4;
