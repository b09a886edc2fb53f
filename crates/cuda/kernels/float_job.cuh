// What products of float weights have in common: their arguments, and what is done with an output.
#pragma once
#include "arith.cuh"
#include "float_weights.cuh"

// The twin of `Epilogue` in launch/product.rs.
enum Epilogue : u32 { STORE = 0, ADD = 1, GATE = 2 };

struct Job {
    Matrix w;
    const f32* x;  // [T][k], or [T * K][k]
    f32* out;      // [T][rows], or [T * K][rows]
    Groups groups;
    u32 k;
    u32 rows;      // T, not grouped
    u32 share;     // pairs that read the same row of x; 0: not grouped
    u32 epilogue;
};

// The row of `out` that column c is.
__device__ __forceinline__ u32 column_id(const Job& job, u32 at) { return job.share > 0 ? job.groups.pair[at] : at; }

// Output `row` of the column that is row `id` of `out`.
__device__ __forceinline__ void write_output(const Job& job, u32 id, u32 row, f32 v) {
    f32* to = job.out + (u64)id * job.w.rows + row;
    if (job.epilogue == ADD) *to = __fadd_rn(*to, v);
    else if (job.epilogue == GATE) *to = __fmul_rn(silu(v), *to);
    else *to = v;
}
