// The float arithmetic: the twin of model::math, quant::fixed and cpu::ops (ARCHITECTURE.md, rules 1 to 4), operation
// for operation. Compiled with -fmad=false: a fused multiply-add happens where __fmaf_rn stands and nowhere else.
#pragma once
#include "prelude.cuh"

// Comparisons written so that a NaN passes through unchanged.
__device__ __forceinline__ f32 clamp_range(f32 x, f32 low, f32 high) {
    x = high < x ? high : x;
    return low > x ? low : x;
}

// 2^r for |r| <= 1/2; the constants are model::math::EXP2_POLY.
__device__ __forceinline__ f32 exp2_poly(f32 r) {
    f32 p = __fmaf_rn(r, __int_as_float(EXP2_C5), __int_as_float(EXP2_C4));
    p = __fmaf_rn(r, p, __int_as_float(EXP2_C3));
    p = __fmaf_rn(r, p, __int_as_float(EXP2_C2));
    p = __fmaf_rn(r, p, __int_as_float(EXP2_C1));
    p = __fmaf_rn(r, p, __int_as_float(EXP2_C0));
    return __fmaf_rn(r, p, 1.0f);
}

// 2^n for -126 <= n <= 127.
__device__ __forceinline__ f32 pow2i(i32 n) { return __uint_as_float((u32)(n + 127) << 23); }

// p * 2^n in two halves: a subnormal result is rounded once. NaN becomes 0 as an integer, and p is NaN then.
__device__ __forceinline__ f32 scale_pow2(f32 p, f32 n) {
    i32 i = __float2int_rn(n);
    i32 half = i >> 1;
    return __fmul_rn(__fmul_rn(p, pow2i(half)), pow2i(i - half));
}

// 2^x (model::math::exp2).
__device__ __forceinline__ f32 exp2_exact(f32 x) {
    x = clamp_range(x, -160.0f, 129.0f);
    f32 n = rintf(x);
    return scale_pow2(exp2_poly(__fsub_rn(x, n)), n);
}

// e^x (model::math::exp).
__device__ __forceinline__ f32 exp_exact(f32 x) {
    const f32 hi = __int_as_float(LOG2_E_HI), lo = __int_as_float(LOG2_E_LO);
    x = clamp_range(x, -110.0f, 89.5f);
    f32 n = rintf(__fmul_rn(x, hi));
    f32 r = __fmaf_rn(x, lo, __fmaf_rn(x, hi, -n));
    return scale_pow2(exp2_poly(r), n);
}

// x / (1 + e^-x).
__device__ __forceinline__ f32 silu(f32 x) { return __fdiv_rn(x, __fadd_rn(1.0f, exp_exact(-x))); }

// The sum over a warp's lanes in the written order: xor 16, 8, 4, 2, 1. Every lane gets it. Addition is commutative
// in every bit (all NaNs being one), so both lanes of a pair compute the same sum.
__device__ __forceinline__ f32 butterfly(f32 v) {
#pragma unroll
    for (int w = 16; w > 0; w /= 2) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, w));
    return v;
}

// Magnitudes order as their bit patterns do, with NaN above infinity: an exact maximum in any order.
__device__ __forceinline__ u32 magnitude(f32 v) { return __float_as_uint(v) & 0x7fffffffu; }

__device__ __forceinline__ u32 warp_max(u32 v) { return __reduce_max_sync(0xffffffffu, v); }

// Magnitudes from 2^-60 to 2^60, as bit patterns.
__device__ __forceinline__ bool is_tame(u32 magnitude) { return magnitude - 0x21800000u <= 0x5d800000u - 0x21800000u; }

// a / b, rounded to nearest, for tame a and b (or a = 0): Newton's step on the inverse and one on the quotient, which is
// what __fdiv_rn does when it has made sure that nothing leaves the range of normal numbers (Markstein, IBM J. Res. Dev. 34,
// 1990). Without a branch each, several divisions run side by side.
__device__ __forceinline__ f32 divide_tame(f32 a, f32 b) {
    f32 r = inverse_nearly(b);
    r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
    const f32 q = __fmul_rn(a, r);
    return __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
}

// The scale of a fixed-point block and the factor on its values, from the largest magnitude (quant::round_block).
// A block whose scale would be subnormal is zero; a block with NaN or infinity has a NaN scale and zero integers.
struct Rounding {
    f32 scale;
    f32 inverse;
    bool zero;
};
__device__ __forceinline__ Rounding rounding(u32 amax, f32 limit) {
    const f32 largest = __uint_as_float(amax);
    const bool bad = amax >= 0x7f800000u;
    Rounding r;
    if (is_tame(amax)) return {divide_tame(largest, limit), divide_tame(limit, largest), false};
    r.scale = __fdiv_rn(largest, limit);
    r.zero = bad || r.scale < 1.17549435e-38f;
    r.inverse = __fdiv_rn(limit, largest);
    if (r.zero) r.scale = bad ? __uint_as_float(0x7fc00000u) : 0.0f;
    return r;
}
constexpr f32 LIMIT_A16 = 32639.0f;
constexpr f32 LIMIT = PLANES == 2 ? 32639.0f : 127.0f;

// Round to nearest, ties to even, for |x| < 2^22.
__device__ __forceinline__ i32 round_fixed(f32 v, Rounding r) {
    return r.zero ? 0 : __float_as_int(__fadd_rn(__fmul_rn(v, r.inverse), 12582912.0f)) - 0x4b400000;
}

// q = 256 hi + lo, both signed, for |q| <= 32639.
__device__ __forceinline__ i32 low_plane(i32 q) { return (i32)(i8)q; }
__device__ __forceinline__ i32 high_plane(i32 q) { return (q - low_plane(q)) >> 8; }

// 256 h + l, rounded once after two conversions.
__device__ __forceinline__ f32 join(i32 h, i32 l) { return __fmaf_rn(256.0f, __int2float_rn(h), __int2float_rn(l)); }
