// All that is spelled in PTX, and dynamic shared memory: what the hardware has and CUDA C++ has no words for. One small
// function to an instruction; the rest of the kernels is plain code, which the emulator runs on a CPU with its own twins
// of these functions (../emulator/ptx.h).
#pragma once
#ifdef TALLY_EMULATOR
#include "ptx.h"
#else

// Dynamic shared memory. It has one address, whoever asks and by whatever type.
template <class T> __device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(128) u8 dynamic_shared_memory[];
    return (T*)dynamic_shared_memory;
}
__device__ __forceinline__ u32 dynamic_shared_bytes() {
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// Dependent launch: lets the next kernel start its prologue; waits until the kernels before have ended and their
// writes are visible. Both do nothing before sm_90 or when the launch has no dependency.
// In a step of few rows a kernel lets the next one start when its own wait is over, not when it starts itself: a product
// asks for its weights as soon as it has started, and what the kernel before is about to read would queue behind them.
// From Q, K and V to the router, on an H200 for 8 / 32 / 64 streams: 3 / 2 / 0.7% of the tokens a second.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_dependencies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets about so many cycles go by.
__device__ __forceinline__ void pause(u32 cycles) {
    u32 began, now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(began) :: "memory");
    do asm volatile("mov.u32 %0, %%clock;" : "=r"(now) :: "memory");
    while (now - began < cycles);
}

// ---- Loads -------------------------------------------------------------------------------------------------------------
// 16 bytes of weights, which nothing in this step has written: may pass through the read-only path, and may be issued
// before `wait_dependencies`.
__device__ __forceinline__ uint4 load_weights(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// 16 bytes that are read once: not worth a place in the first-level cache.
__device__ __forceinline__ uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Activations, which an earlier kernel wrote: past the first-level cache, and never moved ahead of the wait.
__device__ __forceinline__ float4 load_fresh4(const f32* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_fresh16(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ f32 load_fresh(const f32* p) {
    f32 v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 load_fresh(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// A word that another block writes after what it tells of.
__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Counts up; what this thread wrote (and saw written before a barrier) is seen by whoever reads the count by `load_acquire`.
__device__ __forceinline__ void count_release(u32* p) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(p) : "memory");
}
// Counts to `last` and around; what this thread wrote (and saw written before a barrier) is seen by whoever counts later.
__device__ __forceinline__ u32 atomic_inc_acq_rel(u32* p, u32 last) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(last) : "memory");
    return before;
}

// ---- Arithmetic --------------------------------------------------------------------------------------------------------
__device__ __forceinline__ f32 f16_to_f32(u16 bits) {
    f32 v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
// 1 / v to within a unit in the last place, for v between 2^-126 and 2^126.
__device__ __forceinline__ f32 inverse_nearly(f32 v) {
    f32 r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// The larger one, NaN if one is.
__device__ __forceinline__ f32 max_nan(f32 x, f32 y) {
    f32 v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(x), "f"(y));
    return v;
}
// The same value, of which the compiler knows nothing more.
__device__ __forceinline__ u32 opaque(u32 v) {
    asm("" : "+r"(v));
    return v;
}
// Byte i is the one that nibble i of `select` names, of b's over a's; with the nibble's bit 3, its sign eight times.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 select) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(select));
    return v;
}

// ---- Barriers ----------------------------------------------------------------------------------------------------------
// `threads` threads of the block, whole warps, meet at barrier `id`; 0 is __syncthreads.
__device__ __forceinline__ void barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// mbarriers, in shared memory: a phase ends when all have arrived and all expected bytes have come.
__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" :: "r"(shared_address(barrier)) : "memory");
}
// Whether the phase of this parity has ended; a fresh barrier is in phase 0.
__device__ __forceinline__ bool mbarrier_test(u64* barrier, u32 parity) {
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
// Makes initialised barriers known to the copy engine; before the block's first __syncthreads.
__device__ __forceinline__ void mbarrier_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- Copies to shared memory -------------------------------------------------------------------------------------------
// 16 or 4 bytes, asynchronously; done when `async_wait` has returned.
__device__ __forceinline__ void async_copy16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void async_copy4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest N groups of this thread are done.
template <int N> __device__ __forceinline__ void async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
// Arrives at an mbarrier when this thread's copies so far are done.
__device__ __forceinline__ void async_arrive(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// From sm_90 on: any multiple of 16 bytes by one thread; they count as having come to `barrier`.
#if __CUDA_ARCH__ >= 900
// Brings bytes (a multiple of 16, from such an address) into the second-level cache.
__device__ __forceinline__ void prefetch_bulk(const void* global, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(u64* barrier, u32 bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// The same of bytes that nobody reads again before a great many others: the first to leave the second-level cache. A decode
// step reads every weight and every key once, which would drive out the kernels' own code and constants, and then every
// kernel of every layer begins by fetching those from memory: 2.5% of a token at depth 0, 7% at 32,768 (H200).
__device__ __forceinline__ void bulk_copy_once(void* shared, const void* global, u32 bytes, u64* barrier) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}
#endif

// ---- Tensor cores: who holds what is in fragment.cuh -------------------------------------------------------------------
// c += a b over 32 values of k; A's bytes signed or not, B's signed.
template <bool SIGNED> __device__ __forceinline__ void mma_k32(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (SIGNED) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}
// c += a b over 16 values of k; A's bytes unsigned, B's signed or not.
template <bool SIGNED> __device__ __forceinline__ void mma_k16(i32 (&c)[4], u32 a0, u32 a1, u32 b) {
    if constexpr (SIGNED) {
        asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b));
    }
}
// Two or four 8 x 16-byte matrices from shared memory; lane i gives the address of row i % 8 of matrix i / 8, and gets
// bytes 4t.. of row g of each: a B fragment, where a row is a column's values.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_matrices(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)));
}
#endif
