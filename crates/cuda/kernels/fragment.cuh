// Integer tensor-core fragments: who holds what, and the instructions on them.
//
// mma.sync m16n8k32 and k16 multiply A (16 rows of weights) by B (8 columns of activations), bytes, into int32. With
// g = lane / 4 and t = lane % 4:
//   A, a word of 4 bytes each:  a[0] row g, k 4t..   a[1] row g + 8, k 4t..   a[2], a[3] the same rows, k 16 + 4t..
//   B:                          b[0] column g, k 4t..                         b[1] column g, k 16 + 4t..
//   C:                          c[0] row g, column 2t   c[1] row g, column 2t + 1   c[2], c[3] row g + 8
// (PTX ISA, "Matrix Fragments for mma.m16n8k32"). k16 has the first halves only. All exact: no sum here exceeds int32.
#pragma once
#include "prelude.cuh"

__device__ __forceinline__ u32 fragment_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ u32 fragment_quad() { return threadIdx.x % 4; }

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
    const u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void load_matrices(u32 (&r)[2], const void* row) {
    const u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

// The byte planes of four words: plane p of word i becomes byte i of plane[p].
__device__ __forceinline__ void byte_planes(const int4& v, u32 (&plane)[4]) {
    const u32 low01 = __byte_perm(v.x, v.y, 0x5140), high01 = __byte_perm(v.x, v.y, 0x7362);
    const u32 low23 = __byte_perm(v.z, v.w, 0x5140), high23 = __byte_perm(v.z, v.w, 0x7362);
    plane[0] = __byte_perm(low01, low23, 0x5410);
    plane[1] = __byte_perm(low01, low23, 0x7632);
    plane[2] = __byte_perm(high01, high23, 0x5410);
    plane[3] = __byte_perm(high01, high23, 0x7632);
}
