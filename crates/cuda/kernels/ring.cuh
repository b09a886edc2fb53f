// A ring of stages in shared memory, filled by asynchronous copies and guarded by mbarriers: a stage is copied by one warp,
// read by all, and free again when every reader has said so. Warps may drift apart by as much as the ring holds.
//
// From sm_90 on a copy is one bulk instruction; before, the 32 lanes copy 16 bytes at a time.
#pragma once
#include "prelude.cuh"

// Arrivals that complete the barrier of a full stage.
#if __CUDA_ARCH__ >= 900
constexpr u32 FULL_ARRIVALS = 1;
#else
constexpr u32 FULL_ARRIVALS = 32;
#endif

// Waits for the end of the phase of this parity; a fresh barrier is in phase 0.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
    while (!mbarrier_test(barrier, parity)) {}
}

// A whole warp copies `bytes` (a multiple of 16) to shared memory; `full` completes when they are there.
__device__ __forceinline__ void copy_stage(void* to, const void* from, u32 bytes, u64* full) {
    const u32 lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        mbarrier_expect(full, bytes);
        bulk_copy(to, from, bytes, full);
    }
#else
    for (u32 i = lane * 16; i < bytes; i += 512) async_copy16((u8*)to + i, (const u8*)from + i);
    async_arrive(full);
#endif
}
