// out[t][n] = w[n] . x[t] for weights in F32, F16 or BF16 (ARCHITECTURE.md, rule 2), few rows of activations.
//
// A warp takes ROWS weight rows by COLUMNS activation rows at a time; a lane is a partial sum: k = lane (mod 32), fused
// multiply-adds in ascending k, then the butterfly 16 ... 1. STEPS times 32 values are loaded before they are used.
// Grid: x over groups of weight rows, y over groups of columns: those that a block takes, or a tile of pairs that `group`
// made, walked that many at a time.
// Bytes: weights once for every group of columns; activations once for every group of weight rows, and again for every
// warp of a block, from the cache.
#include "float_job.cuh"

// The twin of `FloatTiling` in launch/product.rs.
template <u32 R, u32 C, u32 S, u32 WARPS_M, u32 WARPS_N> struct Shape {
    static constexpr u32 ROWS = R, COLUMNS = C, STEPS = S, THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr u32 BLOCK_ROWS = R * WARPS_M, BLOCK_COLUMNS = C * WARPS_N;
};
typedef Shape<1, 8, 8, 4, 1> Narrow;

// A warp's weight rows and the columns that its block takes.
template <class S> struct Work {
    const u8* weights[S::ROWS];
    u32 row0;
    u32 first;  // column, or index of `groups.pair`
    u32 count;
};

// N steps of 32 values from `step` on.
template <class S, u32 T, u32 N> __device__ __forceinline__ void load(const Work<S>& work, u32 step, f32 (&a)[N][S::ROWS]) {
#pragma unroll
    for (u32 s = 0; s < N; s++)
#pragma unroll
        for (u32 r = 0; r < S::ROWS; r++) a[s][r] = weight_at<T>(work.weights[r], (step + s) * 32 + threadIdx.x % 32);
}
template <u32 R, u32 C, u32 N> __device__ __forceinline__ void add(const f32 (&a)[N][R], const f32* const (&x)[C], u32 step, f32 (&sums)[R][C]) {
    f32 b[N][C];
#pragma unroll
    for (u32 s = 0; s < N; s++)
#pragma unroll
        for (u32 c = 0; c < C; c++) b[s][c] = x[c][(step + s) * 32];
#pragma unroll
    for (u32 s = 0; s < N; s++)
#pragma unroll
        for (u32 c = 0; c < C; c++)
#pragma unroll
            for (u32 r = 0; r < R; r++) sums[r][c] = __fmaf_rn(a[s][r], b[s][c], sums[r][c]);
}

template <class S, u32 C> __device__ __forceinline__ void store(const Job& job, const Work<S>& work, u32 c0, const f32 (&sums)[S::ROWS][C]) {
    // Outputs take lanes in turn.
    constexpr u32 EACH = (S::ROWS * C + 31) / 32;
    const u32 lane = threadIdx.x % 32;
    f32 mine[EACH];
#pragma unroll
    for (u32 i = 0; i < S::ROWS * C; i++) {
        const f32 v = butterfly(sums[i / C][i % C]);
        if (lane == i % 32) mine[i / 32] = v;
    }
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 at = i * 32 + lane, row = work.row0 + at / C, column = c0 + at % C;
        if (at >= S::ROWS * C || row >= job.w.rows || column >= work.count) continue;
        write_output(job, column_id(job, work.first + column), row, mine[i]);
    }
}

// Columns c0 to c0 + C; those beyond the last repeat it and are not stored. `ready`: `a` holds the first steps.
template <class S, u32 T, u32 C>
__device__ __forceinline__ void columns(const Job& job, const Work<S>& work, u32 c0, bool ready, f32 (&a)[S::STEPS][S::ROWS]) {
    const u32 steps = job.k / 32, whole = steps / S::STEPS * S::STEPS;
    const f32* x[C];
#pragma unroll
    for (u32 c = 0; c < C; c++) {
        const u32 id = column_id(job, work.first + min(c0 + c, work.count - 1));
        x[c] = job.x + (u64)(job.share > 1 ? id / job.share : id) * job.k + threadIdx.x % 32;
    }
    f32 sums[S::ROWS][C] = {};
    for (u32 step = 0; step < whole; step += S::STEPS) {
        if (!ready) load<S, T>(work, step, a);
        ready = false;
        add(a, x, step, sums);
    }
#pragma unroll 1
    for (u32 step = whole; step < steps; step++) {
        f32 last[1][S::ROWS];
        load<S, T>(work, step, last);
        add(last, x, step, sums);
    }
    store<S>(job, work, c0, sums);
}

template <class S, u32 T> __device__ __forceinline__ void product(const Job& job) {
    const u32 warp = threadIdx.x / 32, warps_m = S::BLOCK_ROWS / S::ROWS;
    Work<S> work;
    work.row0 = blockIdx.x * S::BLOCK_ROWS + warp % warps_m * S::ROWS;
    u32 expert = 0;
    if (job.share > 0) {
        wait_dependencies();
        if (blockIdx.y >= *job.groups.tile_count) return;
        const u32* tile = job.groups.tile + (u64)blockIdx.y * 3;
        expert = tile[0], work.first = tile[1], work.count = tile[2];
    } else {
        work.first = blockIdx.y * S::BLOCK_COLUMNS;
        work.count = min(S::BLOCK_COLUMNS, job.rows - work.first);
    }
#pragma unroll
    for (u32 r = 0; r < S::ROWS; r++) {
        const u64 row = (u64)expert * job.w.rows + min(work.row0 + r, job.w.rows - 1);
        work.weights[r] = job.w.data + row * job.k * FLOAT_BYTES<T>;
    }
    f32 a[S::STEPS][S::ROWS];
    bool ready = job.k / 32 >= S::STEPS;
    if (ready) load<S, T>(work, 0, a);
    // Weights are the only thing that may be read before the kernels ahead have ended.
    if (job.share == 0) wait_dependencies();
    for (u32 c0 = warp / warps_m * S::COLUMNS; c0 < work.count; c0 += S::BLOCK_COLUMNS) {
        if (work.count - c0 == 1) columns<S, T, 1>(job, work, c0, ready, a);
        else columns<S, T, S::COLUMNS>(job, work, c0, ready, a);
        ready = false;
    }
}

template <class S> __device__ __forceinline__ void dispatch(const Job& job) {
    launch_dependents();
    switch (job.w.type) {
        case T_F32: if constexpr (has(T_F32)) product<S, T_F32>(job); break;
        case T_F16: if constexpr (has(T_F16)) product<S, T_F16>(job); break;
        case T_BF16: if constexpr (has(T_BF16)) product<S, T_BF16>(job); break;
    }
}

extern "C" __global__ void __launch_bounds__(Narrow::THREADS) float_product_narrow(const __grid_constant__ Job job) {
    dispatch<Narrow>(job);
}
