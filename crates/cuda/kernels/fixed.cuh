// Rounding rows to fixed point (ARCHITECTURE.md, rule 1): the twin of quant::FixedRowMut::fill.
//
// A lane has eight neighbouring values, so that planes leave in 8-byte stores, a sum over 16 values is one shuffle, and a
// block of 256 is a warp (a block of 32: four lanes). Largest magnitudes are maxima of integers: exact in any order.
#pragma once
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
