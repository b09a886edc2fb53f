// x[t][i] += sum over ranks of weight * output, by fma in rank order from zero (ARCHITECTURE.md, rule 6).
// Grid: a thread to four values. Bytes a row: 4 K D read, 8 D read and written.
#include "arith.cuh"

constexpr u32 THREADS = 256;

// `outputs` [T][K][D], `weights` [T][K], x [T][D].
extern "C" __global__ void __launch_bounds__(THREADS) combine(const f32* outputs, const f32* weights, f32* x, u32 rows) {
    launch_dependents();
    wait_dependencies();
    const u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= (u64)rows * HIDDEN) return;
    const u64 t = i / HIDDEN, at = i % HIDDEN;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 rank = 0; rank < USED; rank++) {
        const f32 weight = weights[t * USED + rank];
        const float4 v = *(const float4*)(outputs + (t * USED + rank) * HIDDEN + at);
        sum.x = __fmaf_rn(weight, v.x, sum.x);
        sum.y = __fmaf_rn(weight, v.y, sum.y);
        sum.z = __fmaf_rn(weight, v.z, sum.z);
        sum.w = __fmaf_rn(weight, v.w, sum.w);
    }
    float4* to = (float4*)(x + i);
    const float4 old = *to;
    *to = make_float4(__fadd_rn(old.x, sum.x), __fadd_rn(old.y, sum.y), __fadd_rn(old.z, sum.z), __fadd_rn(old.w, sum.w));
}
