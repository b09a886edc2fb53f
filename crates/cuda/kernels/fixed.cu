// Norms and rounding to fixed point (ARCHITECTURE.md, rules 3 and 1): cpu::ops::rms_norm::<256>, quant::FixedRowMut::fill.
//
// Both kernels hand a lane eight neighbouring values, so that planes leave in 8-byte stores, a sum over 16 values is one
// shuffle, and a block of 256 is a warp (a block of 32: four lanes). Largest magnitudes are maxima of integers: exact in
// any order.
#include "arith.cuh"

struct Eight {
    f32 v[8];
};

__device__ __forceinline__ Eight load_eight(const f32* p) {
    const float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// Rounds values `at` to `at + 7` of rows laid end to end. All lanes of a warp call it, those without values inactive;
// the lanes of a fixed-point block of LEN are active together.
template <u32 LEN> __device__ __forceinline__ void round_eight(const Eight& x, u64 at, bool active, const Fixed& to) {
    u32 amax = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) amax = max(amax, magnitude(x.v[i]));
    if constexpr (LEN == 256) {
        amax = warp_max(amax);
    } else {
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    }
    const Rounding r = rounding(amax, LIMIT);
    u32 hi[2] = {0, 0}, lo[2] = {0, 0};
    i32 sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const i32 q = round_fixed(x.v[i], r);
        sum += q;
        if constexpr (PLANES == 2) {
            hi[i / 4] |= (u32)(high_plane(q) & 0xff) << (i % 4 * 8);
            lo[i / 4] |= (u32)(q & 0xff) << (i % 4 * 8);
        } else {
            hi[i / 4] |= (u32)(q & 0xff) << (i % 4 * 8);
        }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (!active) return;
    *(uint2*)(to.hi + at) = make_uint2(hi[0], hi[1]);
    if constexpr (PLANES == 2) *(uint2*)(to.lo + at) = make_uint2(lo[0], lo[1]);
    if (at % 16 == 0) to.sum[at / 16] = sum;
    if (at % LEN == 0) to.scale[at / LEN] = r.scale;
}

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
