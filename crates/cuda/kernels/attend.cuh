// The float operations of attention (ARCHITECTURE.md, rule 5): the twin of cpu::attention, for both of its kernels.
//
// Three things are computed in fewer operations than the CPU spells, with the same bits:
// - Integer products: the CPU converts HH and HL and joins them by fma(256, HH, HL). Both fit f32 exactly, so that is the
//   integer 256 HH + HL (below 2^31) rounded once.
// - Powers of two with arguments <= 0: no clamp from above, and one multiplication instead of two (`exp2_below`).
// - NaN: a score that is NaN or +infinity makes the sum and every dimension of its tile NaN, and NaN stays through all
//   merges. So scores are searched for one once (`Scores::bad`), and the rest may assume that there is none.
#pragma once
#include "arith.cuh"
#include "cache.cuh"
#include "fragment.cuh"

// Query heads of a KV head.
constexpr u32 GROUP = HEADS / KV_HEADS;
// Keys of a span: what is summed from nothing.
constexpr u32 SPAN = SPAN_TILES * BLOCK;
// The exponent of no key at all: finite, so that no difference of exponents is NaN.
constexpr f32 FLOOR = -1e30f;

// The host computes how much shared memory a launch needs: if it got that wrong, it shall be noticed.
__device__ __forceinline__ void require_shared(u32 bytes) {
    if (dynamic_shared_bytes() < bytes) __trap();
}

constexpr f32 MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
// Results of 2^x are made 2^40 times too large, which keeps them normal down to 2^-160, and scaled back: that rounds a
// subnormal once, as the CPU's two half factors do.
constexpr u32 LIFT = 40;
constexpr f32 DROP = 9.094947017729282e-13f;  // 2^-40

// 2^x for x <= 0 or -infinity: model::math::exp2. Without DEEP, x is not below -125: no clamp, and nothing to scale back.
template <bool DEEP = true> __device__ __forceinline__ f32 exp2_below(f32 x) {
    constexpr u32 UP = DEEP ? LIFT << 23 : 0;
    if (DEEP) x = fmaxf(x, -160.0f);
    const f32 shifted = __fadd_rn(x, MAGIC);
    const f32 r = __fsub_rn(x, __fsub_rn(shifted, MAGIC));
    f32 p = __fmaf_rn(r, __uint_as_float(EXP2_C5 + UP), __uint_as_float(EXP2_C4 + UP));
    p = __fmaf_rn(r, p, __uint_as_float(EXP2_C3 + UP));
    p = __fmaf_rn(r, p, __uint_as_float(EXP2_C2 + UP));
    p = __fmaf_rn(r, p, __uint_as_float(EXP2_C1 + UP));
    p = __fmaf_rn(r, p, __uint_as_float(EXP2_C0 + UP));
    p = __fmaf_rn(r, p, __uint_as_float(0x3f800000u + UP));
    // The integer stands in the low bits of `shifted`, whose others leave at the top.
    p = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
    return DEEP ? __fmul_rn(p, DROP) : p;
}

// 2^n for an integer n <= 0, exact or zero.
__device__ __forceinline__ f32 pow2_below(f32 n) {
    const f32 shifted = __fadd_rn(fmaxf(n, -160.0f), MAGIC);
    return __fmul_rn(__uint_as_float(((127 + LIFT) << 23) + (__float_as_uint(shifted) << 23)), DROP);
}

// The factors on what was there and on what is added when exponents meet, at least one of them 1; `exponent` becomes the
// larger one.
struct Factors {
    f32 a, b;
};
__device__ __forceinline__ Factors meet(f32& exponent, f32 next) {
    const f32 power = pow2_below(-fabsf(__fsub_rn(next, exponent)));
    const bool above = next > exponent;
    exponent = above ? next : exponent;
    return {above ? power : 1.0f, above ? 1.0f : power};
}

// What was there and what is added, joined.
__device__ __forceinline__ f32 merge(f32 x, f32 y, Factors f) { return __fmaf_rn(x, f.a, __fmul_rn(y, f.b)); }

// 256 HH + HL in f32.
__device__ __forceinline__ f32 join_exact(i32 hh, i32 hl) { return __int2float_rn(hh * 256 + hl); }

// Probabilities times value scales are rounded with this added, which leaves q + 128 in the low 16 bits: its high byte is
// the high plane, its low byte is the low plane with the sign bit turned.
constexpr f32 MAGIC_SPLIT = MAGIC + 128.0f;
__device__ __forceinline__ u32 round_split(f32 u, f32 inverse) {
    return __float_as_uint(__fadd_rn(__fmul_rn(u, inverse), MAGIC_SPLIT));
}
