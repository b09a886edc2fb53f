// What the host asks of a product kernel, whatever its shape: product.cu, product_many.cu.
#pragma once
#include "product_open.cuh"

// What is done with a product v: the twin of `Epilogue` in launch/product.rs.
enum Epilogue : u32 {
    STORE = 0,   // out = v
    ADD = 1,     // out += v
    GATE = 2,    // out = silu(v) * out
    SWIGLU = 3,  // out[0] = silu(v of the first matrix) * v of the second, which has the same rows
};

struct Job {
    Matrix w[3];
    f32* out[3];   // [T][rows], or [T * K][rows]
    Fixed x;       // [T][k], or [T * K][k]
    Groups groups;
    u32 matrices;
    u32 k;
    u32 rows;      // T, not grouped
    u32 share;     // pairs that read the same row of x; 0: not grouped, row t is column t
    u32 epilogue;
    u32 weight_bytes;  // room for a tile's slot
    u32 stages;
};

// Bytes of 256 values of a tile's 32 rows: a multiple of 16 for super-blocks, of 8 for all types.
__device__ __forceinline__ u32 slot_bytes(u32 type) {
    switch (type) {
        case T_Q8_0: return SLOT_BYTES<T_Q8_0>;
        case T_Q4_0: return SLOT_BYTES<T_Q4_0>;
        case T_Q4_1: return SLOT_BYTES<T_Q4_1>;
        case T_Q5_0: return SLOT_BYTES<T_Q5_0>;
        case T_Q5_1: return SLOT_BYTES<T_Q5_1>;
        case T_Q2K: return SLOT_BYTES<T_Q2K>;
        case T_Q3K: return SLOT_BYTES<T_Q3K>;
        case T_Q4K: return SLOT_BYTES<T_Q4K>;
        case T_Q5K: return SLOT_BYTES<T_Q5K>;
        default: return SLOT_BYTES<T_Q6K>;
    }
}
