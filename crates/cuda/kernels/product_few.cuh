// A warp's product of a slice (32 weight rows by 256 values of k) of Q4_K or Q6_K with few columns: product_blocks.cuh's
// add_super in fewer instructions, which are what counts when each weight meets few activations.
//
// Codes are multiplied as they stand in their bytes, a left operand straight from `ldmatrix`, and the sums of a sub-block
// then by its scale. Where up to four columns come in two planes (NARROW), the planes are neighbouring columns of one
// instruction: half the multiplications, and half the sums to scale. All integers are exact; floats in rule 1's order.
#pragma once
#include "product_blocks.cuh"

template <u32 T> constexpr bool HAS_FEW = T == T_Q4K || T == T_Q6K;

// Results of a lane: row g (+ 8) (+ 16) of the slice, and for NARROW column t, else columns 2t and 2t + 1 of each tile.
template <bool NARROW, u32 N> constexpr u32 FEW_RESULTS = NARROW ? 4 : N;

// Where a result of a slice stands: `i` of FEW_RESULTS.
template <bool NARROW> __device__ __forceinline__ u32 few_row(u32 i, u32 lane) {
    return NARROW ? i * 8 + lane / 4 : i / 2 % 4 * 8 + lane / 4;
}
template <bool NARROW> __device__ __forceinline__ u32 few_column(u32 i, u32 lane) {
    return NARROW ? lane % 4 : i / 8 * 8 + lane % 4 * 2 + i % 2;
}

// Two neighbouring 16-byte pieces of a band's rows, as a left operand.
__device__ __forceinline__ void load_rows(u32 (&a)[4], const u8* band, u32 u) {
    const u32 lane = threadIdx.x % 32;
    load_matrices(a, band + (u + lane / 16) * 256 + lane % 16 * 16);
}

// acc += factor times a b, where the factors are of rows g and g + 8.
template <bool SIGNED> __device__ __forceinline__ void add_scaled(i32 (&acc)[4], i32 upper, i32 lower, const u32 (&a)[4], u32 b0, u32 b1) {
    i32 dot[4] = {};
    mma_k32<SIGNED>(dot, a, b0, b1);
    acc[0] += upper * dot[0], acc[1] += upper * dot[1];
    acc[2] += lower * dot[2], acc[3] += lower * dot[3];
}

// What multiplies the sub-blocks of a row's half: of 32 values (Q4_K) or of 16 (Q6_K).
template <u32 T> struct Factors;
template <> struct Factors<T_Q4K> {
    u32 word;
    __device__ __forceinline__ Factors(const u8* band, u32 row, u32 half) { word = half_scales<T_Q4K>(band, row, half).x; }
    __device__ __forceinline__ i32 at(u32 s) const { return word >> (s * 8) & 0xff; }
};
template <> struct Factors<T_Q6K> {
    uint2 words;
    __device__ __forceinline__ Factors(const u8* band, u32 row, u32 half) { words = half_scales<T_Q6K>(band, row, half); }
    __device__ __forceinline__ i32 at(u32 s) const { return (i32)permute(s < 4 ? words.x : words.y, 0, s % 4 | (s % 4 | 8) * 0x1110); }
};

// The terms of columns 0 to 8 J - 1 (NARROW: 0 to 3) of N.
template <u32 T, u32 N, bool NARROW, u32 J>
__device__ __forceinline__ void few_terms(const u8* column, const u8* panel, f32 (&terms)[FEW_RESULTS<NARROW, N>]) {
    using L = Layout<T>;
    static_assert(!NARROW || (PLANES == 2 && J == 1), "two planes of four columns");
    // Planes that are apart.
    constexpr u32 SETS = NARROW ? 1 : PLANES;
    const u32 lane = threadIdx.x % 32, row = fragment_row(), quad = fragment_quad();
    // The rows of right operands: two neighbouring sub-blocks of 32 (Q4_K), or two that are 64 apart.
    const u8* b_row = panel + (T == T_Q4K ? lane / 8 * 16 : lane / 8 % 2 * 16 + lane / 16 * 64);
    b_row += NARROW ? lane % 8 / 2 * Panel<N>::PITCH + lane % 2 * Panel<N>::LOW : lane % 8 * Panel<N>::PITCH;

    // Q4_K: low nibbles, and high ones as they stand, sixteen times as much.
    constexpr u32 KINDS = T == T_Q4K ? 2 : 1;
    i32 acc[2][J][SETS][KINDS][4] = {};
#pragma unroll 1
    for (u32 half = 0; half < 2; half++) {
        const Factors<T> factors[4] = {{column, row, half}, {column, row + 8, half}, {band_of<T>(column, 1), row, half}, {band_of<T>(column, 1), row + 8, half}};
        u32 high[2][4];
        if constexpr (T == T_Q6K) load_rows(high[0], column, L::QH + 2 * half), load_rows(high[1], band_of<T>(column, 1), L::QH + 2 * half);
        // Not unrolled: it would not stay in registers, and 10 KB less of code come sooner (H200: 3% of 32 streams).
#pragma unroll 1
        for (u32 pair = 0; pair < 2; pair++) {
            u32 b[J][SETS][4];
#pragma unroll
            for (u32 i = 0; i < J * SETS; i++)
                load_matrices(b[i / SETS][i % SETS], b_row + i % SETS * Panel<N>::LOW + i / SETS * 8 * Panel<N>::PITCH + half * 128 + pair * (T == T_Q4K ? 64 : 32));
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                // Low nibbles and high ones: of the next 32 values (Q4_K), or of those 64 further on.
                u32 w[4], a[2][4];
                load_rows(w, band_of<T>(column, m), (T == T_Q4K ? Layout<T_Q4K>::QS : Layout<T_Q6K>::QL) + 4 * half + 2 * pair);
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    if constexpr (T == T_Q4K) {
                        a[0][i] = w[i] & 0x0f0f0f0f, a[1][i] = w[i] & 0xf0f0f0f0;
                    } else {
                        // Four times the code less 32, which is a signed byte.
                        const u32 near = high[m][i] << (6 - 2 * pair), far = high[m][i] << (2 - 2 * pair);
                        a[0][i] = ((w[i] << 2 & 0x3c3c3c3c) | (near & 0xc0c0c0c0)) ^ 0x80808080;
                        a[1][i] = ((w[i] >> 2 & 0x3c3c3c3c) | (far & 0xc0c0c0c0)) ^ 0x80808080;
                    }
                }
                const Factors<T> &upper = factors[2 * m], &lower = factors[2 * m + 1];
#pragma unroll
                for (u32 j = 0; j < J; j++)
#pragma unroll
                    for (u32 p = 0; p < SETS; p++)
#pragma unroll
                        for (u32 i = 0; i < 2; i++) {
                            i32 (&to)[4] = acc[m][j][p][i % KINDS];
                            const u32 (&of)[4] = b[j][p];
                            if constexpr (T == T_Q4K) {
                                const u32 s = 2 * pair + i;
                                add_scaled<false>(to, upper.at(s), lower.at(s), a[i], of[2 * i], of[2 * i + 1]);
                            } else {
                                // Two sub-blocks of 16, each beside nothing of the other.
                                const u32 s = 2 * pair + 4 * i;
                                add_scaled<true>(to, upper.at(s), lower.at(s), a[i], of[2 * i], 0);
                                add_scaled<true>(to, upper.at(s + 1), lower.at(s + 1), a[i], 0, of[2 * i + 1]);
                            }
                        }
            }
        }
    }
    // The sum of plane p for a result: of row 16 m + 8 r + g, and a column of tile j.
    const auto sum = [&](u32 m, u32 r, u32 j, u32 c, u32 p) {
        const auto& of = acc[m][j][NARROW ? 0 : p];
        const u32 i = 2 * r + (NARROW ? p : c);
        if constexpr (T == T_Q4K) return of[0][i] + (of[KINDS - 1][i] >> 4);
        else return of[0][i] >> 2;
    };
#pragma unroll
    for (u32 j = 0; j < J; j++) {
        float2 scale;
        if constexpr (NARROW) scale.x = *(const f32*)(panel + Panel<N>::SCALES + quad * 4);
        else scale = column_scales<N>(panel, 0, j);
        u32 planes[4];
        if constexpr (HAS_MINIMUM<T>)
            byte_planes(*(const int4*)(panel + Panel<N>::SUMS + (NARROW ? row / 2 : j * 8 + row) * 64 + quad * 16), planes);
#pragma unroll
        for (u32 m = 0; m < 2; m++) {
            i32 g[4];
            if constexpr (HAS_MINIMUM<T>) {
                const u32 minimum[2] = {minima<T>(band_of<T>(column, m), row), minima<T>(band_of<T>(column, m), row + 8)};
                minimum_sums(minimum, planes, g);
            }
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                const float2 d = block_scales<T>(band_of<T>(column, m), 8 * r + row);
#pragma unroll
                for (u32 c = 0; c < (NARROW ? 1 : 2); c++) {
                    f32 f;
                    if constexpr (PLANES == 2) f = join(sum(m, r, j, c, 0), sum(m, r, j, c, 1));
                    else f = __int2float_rn(sum(m, r, j, c, 0));
                    f32 term = __fmul_rn(d.x, f);
                    if constexpr (HAS_MINIMUM<T>) term = __fsub_rn(term, __fmul_rn(d.y, __int2float_rn(g[2 * r + c])));
                    terms[NARROW ? 2 * m + r : ((j * 2 + m) * 2 + r) * 2 + c] = __fmul_rn(c ? scale.y : scale.x, term);
                }
            }
        }
    }
}
