// out[t][n] = w[n] . x[t] for weights in F32, F16 or BF16 (ARCHITECTURE.md, rule 2), any number of rows of activations.
//
// A warp takes ROWS weight rows by COLUMNS activation rows at a time; a lane is a partial sum: k = lane (mod 32), fused
// multiply-adds in ascending k, then the butterfly 16 ... 1.
// Grid: x over groups of ROWS * WARPS weight rows, y over groups of columns: COLUMNS rows of the step, or a tile of pairs
// that `group` made, walked COLUMNS at a time.
// Bytes: weights once for every group of columns; activations once for every warp, from the cache but for the first.
#include "arith.cuh"

constexpr u32 ROWS = 4, COLUMNS = 8, WARPS = 4;

// The twin of `Epilogue` in launch/product.rs.
enum Epilogue : u32 { STORE = 0, ADD = 1, GATE = 2 };

__device__ __forceinline__ f32 weight_at(const u8* row, u32 type, u32 k) {
    if (type == T_F32) return ((const f32*)row)[k];
    const u16 bits = ((const u16*)row)[k];
    return type == T_F16 ? f16_to_f32(bits) : __uint_as_float((u32)bits << 16);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
float_product(Matrix w, const f32* x, f32* out, Groups groups, u32 k, u32 rows, u32 share, u32 epilogue) {
    const u32 lane = threadIdx.x % 32, row0 = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    launch_dependents();
    wait_dependencies();
    u32 expert = 0, first = blockIdx.y * COLUMNS, count = min(COLUMNS, rows - min(rows, first));
    if (share > 0) {
        if (blockIdx.y >= *groups.tile_count) return;
        const u32* tile = groups.tile + (u64)blockIdx.y * 3;
        expert = tile[0], first = tile[1], count = tile[2];
    }
    if (row0 >= w.rows) return;
    const u64 row_bytes = (u64)k * (w.type == T_F32 ? 4 : 2);
    const u8* weights[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
        weights[r] = w.data + ((u64)expert * w.rows + min(row0 + r, w.rows - 1)) * row_bytes;

    for (u32 c0 = 0; c0 < count; c0 += COLUMNS) {
        u32 id[COLUMNS];  // the row of `out`
        const f32* from[COLUMNS];
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) {
            // Columns beyond the last repeat it and are not stored.
            const u32 at = first + min(c0 + c, count - 1);
            id[c] = share > 0 ? groups.pair[at] : at;
            from[c] = x + (u64)(share > 1 ? id[c] / share : id[c]) * k;
        }
        f32 sums[ROWS][COLUMNS] = {};
        for (u32 i = lane; i < k; i += 32) {
            f32 a[ROWS];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) a[r] = weight_at(weights[r], w.type, i);
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) {
                const f32 b = from[c][i];
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) sums[r][c] = __fmaf_rn(a[r], b, sums[r][c]);
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++)
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) {
                const f32 v = butterfly(sums[r][c]);
                // A lane an output.
                if (lane != r * COLUMNS + c || row0 + r >= w.rows || c0 + c >= count) continue;
                f32* to = out + (u64)id[c] * w.rows + row0 + r;
                if (epilogue == ADD) *to = __fadd_rn(*to, v);
                else if (epilogue == GATE) *to = __fmul_rn(silu(v), *to);
                else *to = v;
            }
    }
}
