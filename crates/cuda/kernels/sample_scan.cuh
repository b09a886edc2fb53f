// Exact integer sums over a block of threads, and where they cross a target.
#pragma once
#include "sample.cuh"

// One word a warp, and the answer of `cross`.
struct Scratch {
    u64 warp[32];
    u64 before;
    u32 at;
};

// Sum of `v` over the threads before this one; `total` is that of all. All threads call it.
template <u32 THREADS> __device__ __forceinline__ u64 block_prefix(u64 v, u64& total, Scratch& scratch) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 upto = v;
#pragma unroll
    for (u32 w = 1; w < 32; w *= 2) {
        const u64 other = __shfl_up_sync(0xffffffffu, upto, w);
        if (lane >= w) upto += other;
    }
    if (lane == 31) scratch.warp[warp] = upto;
    __syncthreads();
    u64 warps = lane < THREADS / 32 ? scratch.warp[lane] : 0;
#pragma unroll
    for (u32 w = 1; w < 32; w *= 2) {
        const u64 other = __shfl_up_sync(0xffffffffu, warps, w);
        if (lane >= w) warps += other;
    }
    total = __shfl_sync(0xffffffffu, warps, 31);
    const u64 before = __shfl_sync(0xffffffffu, warps, (warp + 31) % 32);
    __syncthreads();
    return (warp > 0 ? before : 0) + upto - v;
}

template <u32 THREADS> __device__ __forceinline__ u64 block_sum(u64 v, Scratch& scratch) {
    u64 total;
    block_prefix<THREADS>(v, total, scratch);
    return total;
}

// Where a running sum reaches a target: the index, and the sum before it.
struct Crossing {
    u32 at;
    u64 before;
};

// The first of the block's values (PER to a thread, in order; `before` is the sum before a thread's first) at which the
// running sum reaches `target`, which must not be above the sum of all, nor 0. All threads call it.
template <u32 PER, typename V>
__device__ __forceinline__ Crossing cross(const V (&values)[PER], u64 before, u64 target, Scratch& scratch) {
#pragma unroll
    for (u32 i = 0; i < PER; i++) {
        const u64 after = before + values[i];
        if (before < target && target <= after) {
            scratch.at = threadIdx.x * PER + i;
            scratch.before = before;
        }
        before = after;
    }
    __syncthreads();
    const Crossing found = {scratch.at, scratch.before};
    __syncthreads();
    return found;
}

// Of a bin: what comes before it, and its own.
struct Share {
    u64 before, own;
};

// A row's histogram over the bins, shared by a block's threads. Tokens are counted for top-k, weights for top-p.
template <u32 THREADS> struct Histogram {
    static constexpr u32 PER = BINS / THREADS;
    u32 count[PER];
    u64 weight[PER];
    u64 counts, weights;                // of all bins
    u64 counts_before, weights_before;  // before this thread's bins

    __device__ __forceinline__ Histogram(const Sampling& s, u32 row, Scratch& scratch) {
        u64 own_counts = 0, own_weights = 0;
#pragma unroll
        for (u32 i = 0; i < PER; i++) {
            const u64 at = (u64)row * BINS + threadIdx.x * PER + i;
            own_counts += count[i] = s.count[at];
            own_weights += weight[i] = s.weight[at];
        }
        counts_before = block_prefix<THREADS>(own_counts, counts, scratch);
        weights_before = block_prefix<THREADS>(own_weights, weights, scratch);
    }
    // The weight before and in a bin.
    __device__ __forceinline__ Share weight_of_bin(u32 bin, Scratch& scratch) const {
        u64 before = weights_before;
#pragma unroll
        for (u32 i = 0; i < PER; i++) {
            if (threadIdx.x * PER + i == bin) scratch.before = before, scratch.warp[0] = weight[i];
            before += weight[i];
        }
        __syncthreads();
        const Share share = {scratch.before, scratch.warp[0]};
        __syncthreads();
        return share;
    }
    // Whether top-k drops any of the tokens that are counted.
    __device__ __forceinline__ bool limits(const Choice& choice) const { return choice.top_k > 0 && choice.top_k < counts; }
    __device__ __forceinline__ Crossing by_count(u64 target, Scratch& scratch) const { return cross(count, counts_before, target, scratch); }
    __device__ __forceinline__ Crossing by_weight(u64 target, Scratch& scratch) const { return cross(weight, weights_before, target, scratch); }
};
