// Norms and rounding to fixed point (ARCHITECTURE.md, rules 3 and 1): cpu::ops::rms_norm::<256>, quant::FixedRowMut::fill.
#include "norm.cuh"

constexpr u32 THREADS = NORM_THREADS;

// Row blockIdx.x of x [.., D], or row picks[blockIdx.x]: normalised to `normed` [T][D] and rounded to `fixed`, each of
// which may be absent. Grid: T. Bytes a row: 4 D read, 4 D and 2 D written.
extern "C" __global__ void __launch_bounds__(THREADS)
normalise(const f32* x, const u32* picks, const f32* weight, f32* normed, Fixed fixed) {
    __shared__ f32 partial[THREADS];
    launch_dependents();
    const NormWeights weights(weight);
    wait_dependencies();
    x += (u64)(picks ? picks[blockIdx.x] : blockIdx.x) * HIDDEN;
    store_normed(x, norm_factor(x, partial), weights, blockIdx.x, normed, fixed);
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
