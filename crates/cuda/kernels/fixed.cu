// Norms and rounding to fixed point (ARCHITECTURE.md, rules 3 and 1): cpu::ops::rms_norm::<256>, quant::FixedRowMut::fill.
#include "fixed.cuh"

constexpr u32 THREADS = 256;
// Values that a block of threads takes at a time, and how often it does for a row of HIDDEN.
constexpr u32 PASS = 8 * THREADS;
constexpr u32 PASSES = (HIDDEN + PASS - 1) / PASS;

// Row blockIdx.x of x [.., D], or row picks[blockIdx.x]: normalised to `normed` [T][D] and rounded to `fixed`, each of
// which may be absent. Grid: T. Sum of squares: 256 partial sums, partial p takes k = p (mod 256) ascending, then a
// butterfly 128 ... 1. Bytes a row: 4 D read, 4 D and 2 D written.
extern "C" __global__ void __launch_bounds__(THREADS)
normalise(const f32* x, const u32* picks, const f32* weight, f32* normed, Fixed fixed) {
    __shared__ f32 partial[THREADS];
    const u32 t = threadIdx.x, lane = t % 32;
    launch_dependents();
    // Weights may be read before the wait: they hide behind the kernel ahead.
    Eight w[PASSES <= 2 ? PASSES : 1];
    if constexpr (PASSES <= 2) {
#pragma unroll
        for (u32 i = 0; i < PASSES; i++)
            if (i * PASS + t * 8 < HIDDEN) w[i] = load_eight(weight + i * PASS + t * 8);
    }
    wait_dependencies();

    const u32 row = picks ? picks[blockIdx.x] : blockIdx.x;
    x += (u64)row * HIDDEN;
    f32 sum = 0.0f;
#pragma unroll 8
    for (u32 k = t; k < HIDDEN; k += THREADS) {
        const f32 v = x[k];
        sum = __fmaf_rn(v, v, sum);
    }
    partial[t] = sum;
    __syncthreads();
    // The butterfly's first three levels in every warp, by lane, then the rest by shuffles.
    f32 s[8];
#pragma unroll
    for (u32 i = 0; i < 8; i++) s[i] = partial[i * 32 + lane];
#pragma unroll
    for (u32 step = 4; step > 0; step /= 2)
#pragma unroll
        for (u32 i = 0; i < step; i++) s[i] = __fadd_rn(s[i], s[i + step]);
    const f32 mean = __fdiv_rn(butterfly(s[0]), (f32)HIDDEN);
    const f32 r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, __int_as_float(RMS_EPS))));

#pragma unroll
    for (u32 i = 0; i < PASSES; i++) {
        const u32 k = i * PASS + t * 8;
        const bool active = k < HIDDEN;
        Eight v = {};
        if (active) {
            v = load_eight(x + k);
            const Eight by = PASSES <= 2 ? w[PASSES <= 2 ? i : 0] : load_eight(weight + k);
#pragma unroll
            for (int j = 0; j < 8; j++) v.v[j] = __fmul_rn(__fmul_rn(v.v[j], r), by.v[j]);
        }
        const u64 at = (u64)blockIdx.x * HIDDEN + k;
        if (normed && active) {
            ((float4*)(normed + at))[0] = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
            ((float4*)(normed + at))[1] = make_float4(v.v[4], v.v[5], v.v[6], v.v[7]);
        }
        if (fixed.hi) round_eight<block_len(HIDDEN)>(v, at, active, fixed);
    }
}

// Rounds `eights` times eight values of rows laid end to end, whose length decides that of a block: 256 or 32.
// Grid: a thread to eight values. Bytes a value: 4 read, 2.27 written.
template <u32 LEN> __device__ __forceinline__ void fix(const f32* values, u32 eights, const Fixed& to) {
    launch_dependents();
    wait_dependencies();
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = i < eights;
    Eight v = {};
    if (active) v = load_eight(values + i * 8);
    round_eight<LEN>(v, i * 8, active, to);
}

extern "C" __global__ void __launch_bounds__(THREADS) fix_256(const f32* values, u32 eights, Fixed to) { fix<256>(values, eights, to); }
extern "C" __global__ void __launch_bounds__(THREADS) fix_32(const f32* values, u32 eights, Fixed to) { fix<32>(values, eights, to); }
