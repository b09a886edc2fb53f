// A head's row before it meets the cache: norm and rotation (ARCHITECTURE.md, rules 3 and 4), a warp to a head. Lane l holds
// values l, l + 32, ...
#pragma once
#include "arith.cuh"

constexpr u32 OWN = HEAD_DIM / 32;  // values of a lane

// The head norm: (x * r) * weight. Sum of squares: lane p is partial p and takes d = p (mod 32) ascending, then a butterfly.
__device__ __forceinline__ void normalise(f32 (&x)[OWN], const f32 (&weight)[OWN]) {
    f32 sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < OWN; i++) sum = __fmaf_rn(x[i], x[i], sum);
    const f32 mean = __fdiv_rn(butterfly(sum), (f32)HEAD_DIM);
    const f32 r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, __int_as_float(RMS_EPS))));
#pragma unroll
    for (u32 i = 0; i < OWN; i++) x[i] = __fmul_rn(__fmul_rn(x[i], r), weight[i]);
}

// Rotates the pair (a, b) by an angle of this cosine and sine.
__device__ __forceinline__ void rotate(f32& a, f32& b, float2 turn) {
    const f32 x = a, y = b;
    a = __fmaf_rn(x, turn.x, -__fmul_rn(y, turn.y));
    b = __fmaf_rn(y, turn.x, __fmul_rn(x, turn.y));
}

// The scale and factor of a head's values, which are one block of fixed point whatever HD is.
__device__ __forceinline__ Rounding round_head(const f32 (&x)[OWN]) {
    u32 amax = 0;
#pragma unroll
    for (u32 i = 0; i < OWN; i++) amax = max(amax, magnitude(x[i]));
    return rounding(warp_max(amax), LIMIT_A16);
}
