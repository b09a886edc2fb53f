// x[t][i] += sum over ranks of weight * output, by fma in rank order from zero (ARCHITECTURE.md, rule 6); and the same
// with the norm that the next layer begins with.
#include "norm.cuh"

constexpr u32 THREADS = 256;
static_assert(THREADS == NORM_THREADS, "a block normalises");
// Longest row that a block keeps: the twin of MAX_NORMED in launch/experts_down.rs.
constexpr u32 MAX_NORMED = 8192;

// Four values from `at` on of row t of x.
__device__ __forceinline__ float4 combined(const f32* outputs, const f32* weights, const f32* x, u64 t, u32 at) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 rank = 0; rank < USED; rank++) {
        const f32 weight = weights[t * USED + rank];
        const float4 v = *(const float4*)(outputs + (t * USED + rank) * HIDDEN + at);
        sum.x = __fmaf_rn(weight, v.x, sum.x);
        sum.y = __fmaf_rn(weight, v.y, sum.y);
        sum.z = __fmaf_rn(weight, v.z, sum.z);
        sum.w = __fmaf_rn(weight, v.w, sum.w);
    }
    const float4 old = *(const float4*)(x + t * HIDDEN + at);
    return make_float4(__fadd_rn(old.x, sum.x), __fadd_rn(old.y, sum.y), __fadd_rn(old.z, sum.z), __fadd_rn(old.w, sum.w));
}

// `outputs` [T][K][D], `weights` [T][K], x [T][D]. Grid: a thread to four values. Bytes a row: 4 K D read, 8 D read and
// written.
extern "C" __global__ void __launch_bounds__(THREADS) combine(const f32* outputs, const f32* weights, f32* x, u32 rows) {
    launch_dependents();
    wait_dependencies();
    const u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= (u64)rows * HIDDEN) return;
    *(float4*)(x + i) = combined(outputs, weights, x, i / HIDDEN, (u32)(i % HIDDEN));
}

// The same, and each row normalised with `norm` [D] to `normed` and `fixed`, as `normalise` would (fixed.cu). Grid: T.
extern "C" __global__ void __launch_bounds__(THREADS)
combine_normalise(const f32* outputs, const f32* weights, f32* x, const f32* norm, f32* normed, Fixed fixed) {
    launch_dependents();
    if constexpr (HIDDEN <= MAX_NORMED) {
        __shared__ float4 row[HIDDEN / 4];
        __shared__ f32 partial[THREADS];
        const NormWeights by(norm);
        wait_dependencies();
        const u64 t = blockIdx.x;
#pragma unroll 2
        for (u32 k = threadIdx.x * 4; k < HIDDEN; k += THREADS * 4)
            row[k / 4] = *(float4*)(x + t * HIDDEN + k) = combined(outputs, weights, x, t, k);
        __syncthreads();
        store_normed((const f32*)row, norm_factor((const f32*)row, partial), by, t, normed, fixed);
    } else {
        wait_dependencies();
    }
}
