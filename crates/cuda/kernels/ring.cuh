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

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" :: "r"(shared_address(barrier)) : "memory");
}
// Makes initialised barriers known to the copy engine; before the block's first __syncthreads.
__device__ __forceinline__ void barrier_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ bool barrier_test(u64* barrier, u32 parity) {
    u32 done;
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
    return done != 0;
}
// Waits for the end of the phase of this parity; a fresh barrier is in phase 0.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    while (!barrier_test(barrier, parity)) {}
}

// A whole warp copies `bytes` (a multiple of 16) to shared memory; `full` completes when they are there.
__device__ __forceinline__ void copy_stage(void* to, const void* from, u32 bytes, u64* full) {
    const u32 lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                     :: "r"(shared_address(full)), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(full)) : "memory");
    }
#else
    for (u32 i = lane * 16; i < bytes; i += 512) async_copy16((u8*)to + i, (const u8*)from + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(shared_address(full)) : "memory");
#endif
}
