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

// The byte planes of four words: plane p of word i becomes byte i of plane[p].
__device__ __forceinline__ void byte_planes(const int4& v, u32 (&plane)[4]) {
    const u32 low01 = __byte_perm(v.x, v.y, 0x5140), high01 = __byte_perm(v.x, v.y, 0x7362);
    const u32 low23 = __byte_perm(v.z, v.w, 0x5140), high23 = __byte_perm(v.z, v.w, 0x7362);
    plane[0] = __byte_perm(low01, low23, 0x5410);
    plane[1] = __byte_perm(low01, low23, 0x7632);
    plane[2] = __byte_perm(high01, high23, 0x5410);
    plane[3] = __byte_perm(high01, high23, 0x7632);
}
