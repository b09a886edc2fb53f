// The norm of a row (ARCHITECTURE.md, rule 3: cpu::ops::rms_norm::<256>) by one block of threads, and its rounding.
#pragma once
#include "fixed.cuh"

// Threads of a block that normalises a row, values that they take at a time, and how often for a row of HIDDEN.
constexpr u32 NORM_THREADS = 256;
constexpr u32 NORM_PASS = 8 * NORM_THREADS;
constexpr u32 NORM_PASSES = (HIDDEN + NORM_PASS - 1) / NORM_PASS;

// A thread's values of a row of norm weights, which may be read before the wait: they hide behind the kernel ahead. Long
// rows are read when they are needed.
struct NormWeights {
    static constexpr bool KEPT = NORM_PASSES <= 2;
    const f32* weight;
    Eight kept[KEPT ? NORM_PASSES : 1];

    __device__ __forceinline__ NormWeights(const f32* weight) : weight(weight) {
        if constexpr (KEPT) {
#pragma unroll
            for (u32 i = 0; i < NORM_PASSES; i++)
                if (i * NORM_PASS + threadIdx.x * 8 < HIDDEN) kept[i] = load_eight(weight + i * NORM_PASS + threadIdx.x * 8);
        }
    }
    __device__ __forceinline__ Eight at(u32 i) const {
        return KEPT ? kept[KEPT ? i : 0] : load_eight(weight + i * NORM_PASS + threadIdx.x * 8);
    }
};

// What a row is multiplied with by rule 3, for a block that has it in `x` [D], in shared or global memory. Sum of squares:
// 256 partial sums, partial p takes k = p (mod 256) ascending, then a butterfly 128 ... 1, its first three levels in every
// warp by lane. `partial` [NORM_THREADS] is shared.
__device__ __forceinline__ f32 norm_factor(const f32* x, f32* partial) {
    f32 sum = 0.0f;
#pragma unroll 8
    for (u32 k = threadIdx.x; k < HIDDEN; k += NORM_THREADS) {
        const f32 v = x[k];
        sum = __fmaf_rn(v, v, sum);
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    f32 s[8];
#pragma unroll
    for (u32 i = 0; i < 8; i++) s[i] = partial[i * 32 + threadIdx.x % 32];
#pragma unroll
    for (u32 step = 4; step > 0; step /= 2)
#pragma unroll
        for (u32 i = 0; i < step; i++) s[i] = __fadd_rn(s[i], s[i + step]);
    const f32 mean = __fdiv_rn(butterfly(s[0]), (f32)HIDDEN);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, __int_as_float(RMS_EPS))));
}

// Row `t` of a step, which the block has in `x`: normalised to `normed` [T][D] and rounded to `fixed`, each of which may be
// absent.
__device__ __forceinline__ void store_normed(const f32* x, f32 factor, const NormWeights& weights, u32 t, f32* normed, const Fixed& fixed) {
#pragma unroll
    for (u32 i = 0; i < NORM_PASSES; i++) {
        const u32 k = i * NORM_PASS + threadIdx.x * 8;
        const bool active = k < HIDDEN;
        Eight v = {};
        if (active) {
            v = load_eight(x + k);
            const Eight by = weights.at(i);
#pragma unroll
            for (int j = 0; j < 8; j++) v.v[j] = __fmul_rn(__fmul_rn(v.v[j], factor), by.v[j]);
        }
        const u64 at = (u64)t * HIDDEN + k;
        if (normed && active) {
            ((float4*)(normed + at))[0] = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
            ((float4*)(normed + at))[1] = make_float4(v.v[4], v.v[5], v.v[6], v.v[7]);
        }
        if (fixed.hi) round_eight<block_len(HIDDEN)>(v, at, active, fixed);
    }
}
