// A warp's share of a product: 32 weight rows (or 16 of them) against column tiles of 8 activations, for 256 values of k.
//
// The order of every float operation is rule 1's: an output's terms, one a block, are added to its running sum in block
// order. Integers are summed by tensor cores in any order.
#pragma once
#include "product_open.cuh"

// Activations of one slot (256 values of k) of N columns in shared memory.
template <u32 N> struct Panel {
    // A plane's column: 256 bytes and 16 more, so that eight columns' 16 bytes meet no bank twice.
    static constexpr u32 PITCH = 272;
    static constexpr u32 LOW = N * PITCH;
    static constexpr u32 SUMS = PLANES * LOW;        // i32 [N][16]
    static constexpr u32 SCALES = SUMS + N * 64;     // f32 [8][N], one a block of 32; or [N], one for all
    static constexpr u32 BYTES = SCALES + N * 32;
};

// The lane's row address for load_matrices: matrices are halves of 32 values, then planes.
template <u32 N> __device__ __forceinline__ const u8* matrix_row(const u8* panel) {
    const u32 lane = threadIdx.x % 32;
    return panel + lane % 8 * Panel<N>::PITCH + lane / 8 % 2 * 16 + (PLANES == 2 ? lane / 16 * Panel<N>::LOW : 0);
}

// Scales of columns 8 tile + 2t and the next.
template <u32 N> __device__ __forceinline__ float2 column_scales(const u8* panel, u32 block, u32 tile) {
    return *(const float2*)(panel + Panel<N>::SCALES + (block * N + tile * 8 + fragment_quad() * 2) * 4);
}

// G, the sums of the minima's products: q's sums in byte planes, each shifted up by the ones after it.
__device__ __forceinline__ void minimum_sums(const u32 (&minima)[2], const u32 (&sums)[4], i32 (&g)[4]) {
#pragma unroll
    for (i32 p = PLANES; p >= 0; p--) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) g[i] = p == PLANES ? 0 : g[i] * 256;
        if (p == PLANES) mma_k16<true>(g, minima[0], minima[1], sums[p]);
        else mma_k16<false>(g, minima[0], minima[1], sums[p]);
    }
}

// F of one output from the accumulators of PARTS weight planes.
template <u32 T, u32 PARTS> __device__ __forceinline__ f32 joined(const i32 (&acc)[PARTS * PLANES][4], u32 i) {
    i32 sum[PLANES];
#pragma unroll
    for (u32 p = 0; p < PLANES; p++) {
        sum[p] = acc[p][i];
        if constexpr (PARTS == 2) sum[p] += acc[PLANES + p][i] * PLANE_BASE<T>;
        if constexpr (NEGATED<T>) sum[p] = -sum[p];
    }
    if constexpr (PLANES == 2) return join(sum[0], sum[1]);
    else return __int2float_rn(sum[0]);
}

// With few column tiles, opening weights takes longer than multiplying them. So where a scale covers the 32 values of an
// instruction, codes are multiplied as they are, in half the instructions, and their sums by the scale.
template <u32 T, u32 J> constexpr bool SCALED_AFTER = J <= 2 && (T == T_Q4K || T == T_Q5K);

// Adds one super-block's terms to sums[m][j][c]: rows 16 m.. of the tile, column tile first + j * STRIDE.
template <u32 T, u32 N, u32 J, u32 STRIDE, u32 ALL>
__device__ __forceinline__ void add_super(const u8* column, const u8* panel, u32 first, f32 (&sums)[2][ALL][4]) {
    const u32 row = fragment_row();
    constexpr bool AFTER = SCALED_AFTER<T, J>;
    constexpr u32 PARTS = AFTER ? 1 : WEIGHT_PLANES<T>;
    i32 acc[2][J][PARTS * PLANES][4];
#pragma unroll
    for (u32 i = 0; i < 2 * J * PARTS * PLANES * 4; i++) (&acc[0][0][0][0])[i] = 0;

    const u8* b_row = matrix_row<N>(panel) + first * 8 * Panel<N>::PITCH;
#pragma unroll 1
    for (u32 h = 0; h < 2; h++) {
        uint2 scales[2][2];
#pragma unroll
        for (u32 i = 0; i < 4; i++) scales[i / 2][i % 2] = half_scales<T>(band_of<T>(column, i / 2), row + i % 2 * 8, h);
#pragma unroll
        for (u32 s = 0; s < 4; s++) {
            u32 a[2][2][4];
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                if constexpr (AFTER) open_codes<T>(band_of<T>(column, m), row, h, s, a[m][0]);
                else open_super<T>(band_of<T>(column, m), row, h, s, scales[m], a[m]);
            }
#pragma unroll
            for (u32 j = 0; j < J; j++) {
                u32 b[2 * PLANES];
                load_matrices(b, b_row + j * STRIDE * 8 * Panel<N>::PITCH + h * 128 + s * 32);
#pragma unroll
                for (u32 m = 0; m < 2; m++)
#pragma unroll
                    for (u32 p = 0; p < PLANES; p++) {
                        if constexpr (AFTER) {
                            i32 dot[4] = {};
                            mma_k32<false>(dot, a[m][0], b[2 * p], b[2 * p + 1]);
#pragma unroll
                            for (u32 i = 0; i < 4; i++) acc[m][j][p][i] += factor<T>(scales[m][i / 2], s, 0) * dot[i];
                        } else {
                            mma_k32<SIGNED<T> && PARTS == 1>(acc[m][j][p], a[m][0], b[2 * p], b[2 * p + 1]);
                            if constexpr (PARTS == 2) mma_k32<SIGNED<T>>(acc[m][j][PLANES + p], a[m][1], b[2 * p], b[2 * p + 1]);
                        }
                    }
            }
        }
    }

    float2 d[2][2];
    u32 minimum[2][2];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u8* band = band_of<T>(column, i / 2);
        d[i / 2][i % 2] = block_scales<T>(band, row + i % 2 * 8);
        if constexpr (HAS_MINIMUM<T>) minimum[i / 2][i % 2] = minima<T>(band, row + i % 2 * 8);
    }
#pragma unroll
    for (u32 j = 0; j < J; j++) {
        const u32 tile = first + j * STRIDE;
        const float2 s = column_scales<N>(panel, 0, tile);
        u32 planes[4];
        if constexpr (HAS_MINIMUM<T>) byte_planes(*(const int4*)(panel + Panel<N>::SUMS + (tile * 8 + row) * 64 + fragment_quad() * 16), planes);
#pragma unroll
        for (u32 m = 0; m < 2; m++) {
            i32 g[4];
            if constexpr (HAS_MINIMUM<T>) minimum_sums(minimum[m], planes, g);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                f32 term = __fmul_rn(d[m][i / 2].x, joined<T, PARTS>(acc[m][j], i));
                // Without minima the rule subtracts +0, which changes no bit.
                if constexpr (HAS_MINIMUM<T>) term = __fsub_rn(term, __fmul_rn(d[m][i / 2].y, __int2float_rn(g[i])));
                sums[m][j][i] = __fadd_rn(sums[m][j][i], __fmul_rn(i % 2 ? s.y : s.x, term));
            }
        }
    }
}

// Adds the terms of `blocks` small blocks to sums[m][j][c]: rows 16 (first_m + m).., column tile first + j * STRIDE.
// `shared`: one activation scale for the slot, not one a block.
template <u32 T, u32 N, u32 M, u32 J, u32 STRIDE>
__device__ __forceinline__ void add_small(const u8* column, const u8* panel, u32 blocks, bool shared, u32 first_m, u32 first, f32 (&sums)[M][J][4]) {
    const u32 row = fragment_row();
    const u8* b_row = matrix_row<N>(panel) + first * 8 * Panel<N>::PITCH;
#pragma unroll 1
    for (u32 block = 0; block < blocks; block++, column += COLUMN_BYTES<T>) {
        u32 a[M][4];
        float2 d[M][2];
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            const u8* band = band_of<T>(column, first_m + m);
            open_small<T>(band, row, a[m]);
            d[m][0] = block_scales<T>(band, row);
            d[m][1] = block_scales<T>(band, row + 8);
        }
#pragma unroll
        for (u32 j = 0; j < J; j++) {
            const u32 tile = first + j * STRIDE;
            const float2 s = column_scales<N>(panel, shared ? 0 : block, tile);
            i32 g[2];
            if constexpr (HAS_MINIMUM<T>) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    const int2 q = *(const int2*)(panel + Panel<N>::SUMS + (tile * 8 + fragment_quad() * 2 + i) * 64 + block * 8);
                    g[i] = q.x + q.y;
                }
            }
            u32 b[2 * PLANES];
            load_matrices(b, b_row + j * STRIDE * 8 * Panel<N>::PITCH + block * 32);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                i32 acc[PLANES][4] = {};
#pragma unroll
                for (u32 p = 0; p < PLANES; p++) mma_k32<true>(acc[p], a[m], b[2 * p], b[2 * p + 1]);
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    f32 f;
                    if constexpr (PLANES == 2) f = join(acc[0][i], acc[1][i]);
                    else f = __int2float_rn(acc[0][i]);
                    f32 term = __fmul_rn(d[m][i / 2].x, f);
                    // Without m the rule adds a zero: no bit of the sum, which is never -0, depends on it.
                    if constexpr (HAS_MINIMUM<T>) term = __fadd_rn(term, __fmul_rn(d[m][i / 2].y, __int2float_rn(g[i % 2])));
                    sums[m][j][i] = __fadd_rn(sums[m][j][i], __fmul_rn(i % 2 ? s.y : s.x, term));
                }
            }
        }
    }
}
