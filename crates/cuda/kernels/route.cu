// Router logits to the chosen experts and their weights (choose.cuh).
//
// Grid: a warp a row, 8 a block. Bytes a row: 4 E read, 8 K written.
#include "choose.cuh"

constexpr u32 THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) choose(const f32* logits, u32 rows, u32* experts, f32* weights) {
    const u32 t = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    launch_dependents();
    wait_dependencies();
    if (t >= rows) return;
    choose_row(logits + (u64)t * E, experts + (u64)t * K, weights + (u64)t * K);
}
