// Hopper's warpgroup products (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): four warps multiply 64 rows of
// bytes, which they hold in registers, by N columns in shared memory, while they go on with something else.
//
// Each warp has its own 16 rows, in the fragments of fragment.cuh: A is one m16n8k32 fragment; C is N / 8 of them, column
// tile after column tile. B is a panel of columns of 128 bytes, eight of them an atom of 1024 bytes that begins at a
// multiple of 1024; within a column, 16-byte chunk c lies at c ^ column % 8 ("128-byte swizzle"): no bank conflicts,
// neither for who writes a column's chunks nor for the tensor cores. Or columns are 64 bytes and an atom 512, chunk c lying
// at c ^ column / 2 % 4 ("64-byte swizzle").
#pragma once
#include "prelude.cuh"

// Whether this compilation knows the instructions: only sm_90a does.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(TALLY_EMULATOR)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

// Where 16-byte chunk `chunk` (0..7) of a panel's column lies.
__device__ __forceinline__ u32 swizzled(u32 column, u32 chunk) { return column * 128 + (chunk ^ column % 8) * 16; }

#if defined(TALLY_EMULATOR)
#include "wgmma.h"
#elif HAS_WGMMA

// How far a place of shared memory is from the next multiple of `to` bytes.
__device__ __forceinline__ u32 shared_padding(const void* p, u32 to) { return (to - shared_address(p) % to) % to; }

// Before the first product, and after registers that a product uses have changed.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the newest N groups are done; then the registers of those groups may be read (C, once it has been
// `wgmma_settle`d) and changed (A).
template <u32 N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Tells the compiler that sums change behind its back until here.
template <u32 N> __device__ __forceinline__ void wgmma_settle(i32 (&c)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+r"(c[i])::"memory");
}
// Makes what other threads copied to shared memory known to the tensor cores.
__device__ __forceinline__ void wgmma_see_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// B: 32 values of k of a panel, as the hardware describes them: address; stride between atoms (1024 bytes); 128-byte
// swizzle. All in units of 16 bytes.
struct Panel128 {
    u64 descriptor;
    // The first 32 values of the panel that begins here.
    __device__ __forceinline__ explicit Panel128(const u8* panel) : descriptor((shared_address(panel) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62) {}
    __device__ __forceinline__ explicit Panel128(u64 descriptor) : descriptor(descriptor) {}
    // `bytes` on: a multiple of 1024, and 32 for each 32 values of k.
    __device__ __forceinline__ Panel128 at(u32 bytes) const { return Panel128(descriptor + bytes / 16); }
};

// The same with columns of 64 bytes, `stride` bytes from eight of them to the next eight. Also A, with rows for columns.
struct Panel64 {
    u64 descriptor;
    __device__ __forceinline__ Panel64(const u8* panel, u32 stride) {
        // From one lane: what follows is uniform then, and needs no vector registers.
        const u32 address = __shfl_sync(0xffffffffu, shared_address(panel) >> 4, 0);
        descriptor = (address & 0x3fff) | 1ull << 16 | (u64)(stride >> 4) << 32 | 2ull << 62;
    }
    __device__ __forceinline__ Panel64(u64 descriptor) : descriptor(descriptor) {}
    // `bytes` on: a multiple of 512, and 32 for the second 32 values of k.
    __device__ __forceinline__ Panel64 at(u32 bytes) const { return Panel64(descriptor + (bytes >> 4)); }
};

#define C4(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define C8(i) C4(i), C4(i + 4)
// An asm statement numbers its operands: C's registers, A's four, B's descriptor, whether to add to C. So each width spells
// its own numbers; OPERANDS is all but the last, ADD the test of that one.
#define WGMMA(N, A_TYPE, OPERANDS, ADD, ...)                                                                          \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, " ADD "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32." A_TYPE      \
                 ".s8 {" OPERANDS "p; }"                                                                                 \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"((u32)add))
#define WGMMA_16(T) WGMMA(16, T, "%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, ", "%13, 0; ", C8(0))
#define WGMMA_32(T) WGMMA(32, T, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, ",     \
                          "%21, 0; ", C8(0), C8(8))
#define WGMMA_48(T) WGMMA(48, T, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, " \
                          "{%24,%25,%26,%27}, %28, ", "%29, 0; ", C8(0), C8(8), C8(16))
#define WGMMA_64(T) WGMMA(64, T, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
                          "%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, ", "%37, 0; ", C8(0), C8(8), C8(16), C8(24))

// c = a b, or c += a b if `add`; A's bytes signed or not, B's signed.
template <u32 N, bool SIGNED, class Panel>
__device__ __forceinline__ void wgmma(i32 (&c)[N / 2], const u32 (&a)[4], Panel b, bool add) {
    static_assert(N == 16 || N == 32 || N == 48 || N == 64, "the widths that are spelled above");
    if constexpr (N == 16 && SIGNED) WGMMA_16("s8");
    else if constexpr (N == 16) WGMMA_16("u8");
    else if constexpr (N == 32 && SIGNED) WGMMA_32("s8");
    else if constexpr (N == 32) WGMMA_32("u8");
    else if constexpr (N == 48 && SIGNED) WGMMA_48("s8");
    else if constexpr (N == 48) WGMMA_48("u8");
    else if constexpr (SIGNED) WGMMA_64("s8");
    else WGMMA_64("u8");
}
// The same with A in shared memory, signed, and 64 columns.
__device__ __forceinline__ void wgmma_shared(i32 (&c)[32], Panel64 a, Panel64 b, bool add) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p; }"
                 : C8(0), C8(8), C8(16), C8(24) : "l"(a.descriptor), "l"(b.descriptor), "r"((u32)add));
}
#undef C4
#undef C8
#undef WGMMA
#undef WGMMA_16
#undef WGMMA_32
#undef WGMMA_48
#undef WGMMA_64

// Registers of a thread, for all threads of a warpgroup: what one kind of warpgroup gives back, another may take.
template <u32 N> __device__ __forceinline__ void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <u32 N> __device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
#endif
