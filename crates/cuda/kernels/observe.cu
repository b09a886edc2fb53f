// The inside of the feed-forward stages, step by step: what fused kernels never write to memory, for who observes it. The
// same operations in the same order, so the same bits.
#include "arith.cuh"

constexpr u32 THREADS = 256;

// out = silu(gate) * up. Grid: a thread a value.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const f32* gate, const f32* up, f32* out, u32 count) {
    launch_dependents();
    wait_dependencies();
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) out[i] = __fmul_rn(silu(gate[i]), up[i]);
}

// x += delta. Grid: a thread a value.
extern "C" __global__ void __launch_bounds__(THREADS) add(const f32* delta, f32* x, u32 count) {
    launch_dependents();
    wait_dependencies();
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) x[i] = __fadd_rn(x[i], delta[i]);
}
