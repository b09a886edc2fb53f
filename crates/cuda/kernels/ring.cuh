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

// Starts the copy of `bytes` (a multiple of 16) that are read once (ptx.cuh) to shared memory, a part of what `full` waits for:
// from sm_90 on by one lane, which has announced them by mbarrier_expect; before, by a warp, which says by async_arrive when it
// has asked for all.
__device__ __forceinline__ void copy_once(void* to, const void* from, u32 bytes, u64* full) {
#if __CUDA_ARCH__ >= 900
    bulk_copy_once(to, from, bytes, full);
#else
    for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512) async_copy16((u8*)to + i, (const u8*)from + i);
#endif
}

// A whole warp copies `bytes` (a multiple of 16) to shared memory; `full` completes when they are there. ONCE: they are read
// once (ptx.cuh).
template <bool ONCE = false> __device__ __forceinline__ void copy_stage(void* to, const void* from, u32 bytes, u64* full) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 != 0) return;
    mbarrier_expect(full, bytes);
    if constexpr (ONCE) bulk_copy_once(to, from, bytes, full);
    else bulk_copy(to, from, bytes, full);
#else
    copy_once(to, from, bytes, full);
    async_arrive(full);
#endif
}
