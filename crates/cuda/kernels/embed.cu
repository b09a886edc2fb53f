// Token rows of the embedding to x [T][D] (cpu::Cpu::embed).
//
// Grid: (D / 256 rounded up, T), a thread a weight. Bytes a row: one row of the embedding read, 4 D written.
#include "open.cuh"

constexpr u32 THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) embed(Matrix table, Step step, f32* x) {
    const u32 k = blockIdx.x * THREADS + threadIdx.x, t = blockIdx.y;
    launch_dependents();
    wait_dependencies();
    if (k < HIDDEN) x[(u64)t * HIDDEN + k] = open_weight(table, HIDDEN, step.token[t], k);
}
