// out[t][n] = w[n] . x[t] for weights in F32, F16 or BF16 (ARCHITECTURE.md, rule 2), many rows of activations: bound by the
// multiply-adds, if the loads keep out of their way.
//
// A warp has R weight rows by C activation rows, whose partial sums stay in registers; a lane is a partial sum: k = lane
// (mod 32), fused multiply-adds in ascending k, then the butterfly 16 ... 1. Both come from shared memory, R + C loads for
// R C multiply-adds, where asynchronous copies put them, STAGES chunks of 128 values of k deep.
// Grid: x over groups of weight rows, y over groups of columns: those that a block takes, or a tile of pairs that `group`
// made, walked that many at a time.
// Bytes: weights once for every group of columns, activations once for every group of weight rows.
#include "float_job.cuh"

// The twin of `FloatTiling` in launch/product.rs.
template <u32 R_, u32 C_, u32 WARPS_M_, u32 WARPS_N_> struct Shape {
    static constexpr u32 R = R_, C = C_, WARPS_M = WARPS_M_;
    static constexpr u32 ROWS = R * WARPS_M, COLUMNS = C * WARPS_N_;
};
typedef Shape<8, 8, 4, 2> Wide;
typedef Shape<16, 8, 2, 4> Broad;
constexpr u32 THREADS = 256;

constexpr u32 CHUNK = 128, STAGES = 3;

// The sums over lanes of 32 values, each as `butterfly` adds it; lane i gets that of v[i]. At each level, from W = 16 on, a
// lane keeps half of its values and hands the others over.
template <u32 W = 16> __device__ __forceinline__ f32 butterflies(f32 (&v)[2 * W]) {
    const bool upper = threadIdx.x & W;
    f32 half[W];
#pragma unroll
    for (u32 i = 0; i < W; i++) {
        const f32 keep = upper ? v[i + W] : v[i], give = upper ? v[i] : v[i + W];
        half[i] = __fadd_rn(keep, __shfl_xor_sync(0xffffffffu, give, W));
    }
    if constexpr (W > 1) return butterflies<W / 2>(half);
    else return half[0];
}

template <class S, u32 T> struct Tile {
    // Bytes of a chunk's row of weights, and of a stage.
    static constexpr u32 ROW = CHUNK * FLOAT_BYTES<T>, PIECES = ROW / 16;
    static constexpr u32 STAGE = S::ROWS * ROW + S::COLUMNS * CHUNK * 4;
    const Job& job;
    u8* shared;
    u32 row0, first, count, chunks;
    const u8* weights;  // row 0 of the expert

    __device__ __forceinline__ u8* stage(u32 chunk) const { return shared + chunk % STAGES * STAGE; }

    __device__ __forceinline__ void load_weights(u32 chunk) const {
        if (chunk >= chunks) return;
        const u32 bytes = min(CHUNK, job.k - chunk * CHUNK) * FLOAT_BYTES<T>;
#pragma unroll
        for (u32 i = threadIdx.x; i < S::ROWS * PIECES; i += THREADS) {
            const u32 r = i / PIECES, at = i % PIECES * 16;
            const u64 from = (u64)min(row0 + r, job.w.rows - 1) * job.k * FLOAT_BYTES<T> + chunk * ROW + at;
            if (at < bytes) async_copy16(stage(chunk) + r * ROW + at, weights + from);
        }
    }

    // Of columns c0 on; those beyond the last repeat it and are not stored.
    __device__ __forceinline__ void load_columns(u32 chunk, const f32* const (&x)[S::COLUMNS / 8]) const {
        if (chunk >= chunks) return;
        const u32 values = min(CHUNK, job.k - chunk * CHUNK), at = threadIdx.x % 32 * 4;
        if (at >= values) return;
        f32* to = (f32*)(stage(chunk) + S::ROWS * ROW);
#pragma unroll
        for (u32 i = 0; i < S::COLUMNS / 8; i++) async_copy16(to + (i * 8 + threadIdx.x / 32) * CHUNK + at, x[i] + chunk * CHUNK + at);
    }

    template <u32 N> __device__ __forceinline__ void step(const u8* a_from, const f32* b_from, u32 first, f32 (&sums)[S::C * S::R]) const {
#pragma unroll
        for (u32 s = 0; s < N; s++) {
            const u32 k = (first + s) * 32 + threadIdx.x % 32;
            f32 a[S::R], b[S::C];
#pragma unroll
            for (u32 c = 0; c < S::C; c++) b[c] = b_from[c * CHUNK + k];
#pragma unroll
            for (u32 r = 0; r < S::R; r++) a[r] = weight_at<T>(a_from + r * ROW, k);
#pragma unroll
            for (u32 c = 0; c < S::C; c++)
#pragma unroll
                for (u32 r = 0; r < S::R; r++) sums[c * S::R + r] = __fmaf_rn(a[r], b[c], sums[c * S::R + r]);
        }
    }

    // Columns c0 to c0 + COLUMNS. `ahead`: the first chunks' weights are under way.
    __device__ __forceinline__ void run(u32 c0, bool ahead) const {
        const u32 warp = threadIdx.x / 32, m = warp % S::WARPS_M * S::R, n = warp / S::WARPS_M * S::C;
        const f32* x[S::COLUMNS / 8];
#pragma unroll
        for (u32 i = 0; i < S::COLUMNS / 8; i++) {
            const u32 id = column_id(job, first + min(c0 + i * 8 + warp, count - 1));
            x[i] = job.x + (u64)(job.share > 1 ? id / job.share : id) * job.k;
        }
        for (u32 chunk = 0; chunk < STAGES - 1; chunk++) {
            if (!ahead) load_weights(chunk);
            load_columns(chunk, x);
            async_commit();
        }
        f32 sums[S::C * S::R] = {};
#pragma unroll 1
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            async_wait<STAGES - 2>();
            __syncthreads();
            load_weights(chunk + STAGES - 1);
            load_columns(chunk + STAGES - 1, x);
            async_commit();
            const u8* a = stage(chunk) + m * ROW;
            const f32* b = (const f32*)(stage(chunk) + S::ROWS * ROW) + n * CHUNK;
            const u32 steps = min(CHUNK, job.k - chunk * CHUNK) / 32;
            if (steps == CHUNK / 32) step<CHUNK / 32>(a, b, 0, sums);
            else
#pragma unroll 1
                for (u32 i = 0; i < steps; i++) step<1>(a, b, i, sums);
        }
        async_wait<0>();
#pragma unroll
        for (u32 i = 0; i < S::C * S::R; i += 32) {
            f32 part[32];
#pragma unroll
            for (u32 o = 0; o < 32; o++) part[o] = sums[i + o];
            const f32 v = butterflies(part);
            const u32 o = i + threadIdx.x % 32, row = row0 + m + o % S::R, column = c0 + n + o / S::R;
            if (row < job.w.rows && column < count) write_output(job, column_id(job, first + column), row, v);
        }
    }
};

template <class S, u32 T> __device__ __forceinline__ void product(const Job& job) {
    Tile<S, T> tile = {job, dynamic_shared<u8>(), blockIdx.x * S::ROWS, blockIdx.y * S::COLUMNS, 0, (job.k + CHUNK - 1) / CHUNK, job.w.data};
    if (job.share > 0) {
        wait_dependencies();
        if (blockIdx.y >= *job.groups.tile_count) return;
        const u32* entry = job.groups.tile + (u64)blockIdx.y * 3;
        tile.weights += (u64)entry[0] * job.w.rows * job.k * FLOAT_BYTES<T>;
        tile.first = entry[1], tile.count = entry[2];
    } else {
        tile.count = min(S::COLUMNS, job.rows - tile.first);
        // Weights are the only thing that may be read before the kernels ahead have ended.
        for (u32 chunk = 0; chunk < STAGES - 1; chunk++) tile.load_weights(chunk);
        wait_dependencies();
    }
    for (u32 c0 = 0; c0 < tile.count; c0 += S::COLUMNS) {
        if (c0 > 0) __syncthreads();
        tile.run(c0, job.share == 0 && c0 == 0);
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

extern "C" __global__ void __launch_bounds__(THREADS, 2) float_tile_wide(const __grid_constant__ Job job) { dispatch<Wide>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) float_tile_broad(const __grid_constant__ Job job) { dispatch<Broad>(job); }
