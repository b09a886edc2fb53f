// Checksums of exp, exp2, SiLU and the scales of fixed point over all 2^32 inputs, so that equality with model::math can be seen at all of them.
//
// Grid: (64, 256), 256 threads. blockIdx.y is a chunk of 2^24 bit patterns; a thread takes 1,024 of them. A checksum is
// the wrapping sum of mix(bits of x, bits of f(x)): sums of integers, in any order. Every NaN counts as one.
#include "arith.cuh"

constexpr u32 THREADS = 256;
constexpr u32 CHUNK = 1u << 24;

// Multipliers of xxHash32 and MurmurHash3: a changed bit of either argument changes about half of the result's.
__device__ __forceinline__ u32 mix(u32 x, u32 y) {
    const u32 m = (y ^ x * 0x9E3779B1u) * 0x85EBCA6Bu;
    return m ^ m >> 15;
}

__device__ __forceinline__ u32 one_nan(f32 v) { return v != v ? 0x7fc00000u : __float_as_uint(v); }

// sums [256][4]: exp, exp2, silu; of a block whose largest value is x, the scale and the factor on its values.
extern "C" __global__ void __launch_bounds__(THREADS) exp_check(u64* sums) {
    __shared__ u64 block[4];
    if (threadIdx.x < 4) block[threadIdx.x] = 0;
    __syncthreads();
    const u32 step = gridDim.x * THREADS, chunk = blockIdx.y;
    u64 own[4] = {};
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < CHUNK; i += step) {
        const u32 bits = chunk * CHUNK + i;
        const f32 x = __uint_as_float(bits);
        own[0] += mix(bits, one_nan(exp_exact(x)));
        own[1] += mix(bits, one_nan(exp2_exact(x)));
        own[2] += mix(bits, one_nan(silu(x)));
        const Rounding r = rounding(magnitude(x), LIMIT_A16);
        own[3] += mix(bits, one_nan(r.scale)) + mix(~bits, r.zero ? 0 : __float_as_uint(r.inverse));
    }
    for (int f = 0; f < 4; f++) atomicAdd(&block[f], own[f]);
    __syncthreads();
    if (threadIdx.x < 4) atomicAdd(&sums[chunk * 4 + threadIdx.x], block[threadIdx.x]);
}
