// One weight of any type as f32, from where it lies in a tile: quant::dequantise_row bit for bit. Simple, for what reads
// few weights; products open whole blocks as integers instead.
#pragma once
#include "arith.cuh"
#include "types.cuh"

// Bit fields in runs (quant::block::planes): byte l of a run of RUN bytes has BITS bits of weights l, RUN + l, ...
// `pieces` is the row's first 16-byte piece of the field.
template <u32 BITS, u32 RUN> __device__ __forceinline__ u32 plane_field(const u8* pieces, u32 i) {
    constexpr u32 WEIGHTS = RUN * 8 / BITS;
    const u32 byte = i / WEIGHTS * RUN + i % RUN, shift = i % WEIGHTS / RUN * BITS;
    return (pieces[byte / 16 * (BAND * 16) + byte % 16] >> shift) & ((1u << BITS) - 1);
}

__device__ __forceinline__ f32 f16_at(const u8* p) { return f16_to_f32(*(const u16*)p); }

// (d * scale) * code - dmin * min; types without minima give min = 0 and subtract +0, which changes no bit.
__device__ __forceinline__ f32 super_weight(f32 d, i32 scale, i32 code, f32 dmin, u32 min) {
    const f32 s = __fmul_rn(d, __int2float_rn(scale));
    return __fsub_rn(__fmul_rn(s, __int2float_rn(code)), __fmul_rn(dmin, __int2float_rn((i32)min)));
}

// Scale and minimum of sub-block j < 8 of Q4_K and Q5_K from the 12 packed bytes (quant::block::six_bits).
__device__ __forceinline__ void packed_scale_min(const u8* packed, u32 j, i32& scale, u32& min) {
    if (j < 4) {
        scale = packed[j] & 63;
        min = packed[4 + j] & 63;
    } else {
        scale = (packed[4 + j] & 15) | (packed[j - 4] >> 6 << 4);
        min = (packed[4 + j] >> 4) | (packed[j] >> 6 << 4);
    }
}

// Weight i of the block of row `row` (0 to 15) among a band's blocks.
template <u32 T> __device__ __forceinline__ f32 open_weight_in(const u8* band, u32 row, u32 i) {
    using L = Layout<T>;
    if constexpr (T == T_Q4K || T == T_Q5K) {
        const u8* head = unit(band, 0, row);
        i32 scale;
        u32 min;
        packed_scale_min(head + 4, i / 32, scale, min);
        u32 code = plane_field<4, 32>(unit(band, L::QS, row), i);
        if constexpr (T == T_Q5K) code |= plane_field<1, 32>(unit(band, L::QH, row), i) << 4;
        return super_weight(f16_at(head), scale, (i32)code, f16_at(head + 2), min);
    } else if constexpr (T == T_Q6K) {
        const u32 code = plane_field<4, 64>(unit(band, L::QL, row), i) | plane_field<2, 32>(unit(band, L::QH, row), i) << 4;
        const i32 scale = (i8)unit(band, L::SCALES, row)[i / 16];
        return super_weight(f16_at(band + L::D + row * 2), scale, (i32)code - 32, 0.0f, 0);
    } else if constexpr (T == T_Q2K) {
        const u32 code = plane_field<2, 32>(unit(band, L::QS, row), i), both = unit(band, L::SCALES, row)[i / 16];
        const u8* d = band + L::D + row * 4;
        return super_weight(f16_at(d), (i32)(both & 15), (i32)code, f16_at(d + 2), both >> 4);
    } else if constexpr (T == T_Q3K) {
        const u32 code = plane_field<2, 32>(unit(band, L::QS, row), i) | plane_field<1, 32>(unit(band, L::HMASK, row), i) << 2;
        const u32 j = i / 16;
        const u32 low = band[L::SCALES + row * 8 + j % 8] >> (j / 8 * 4) & 15;
        const u32 high = band[L::SCALES_HIGH + row * 4 + j % 4] >> (j / 4 * 2) & 3;
        return super_weight(f16_at(band + L::D + row * 2), (i32)(low | high << 4) - 32, (i32)code - 4, 0.0f, 0);
    } else if constexpr (T == T_Q8_0) {
        const i32 code = (i8)unit(band, L::QS + i / 16, row)[i % 16];
        return __fmul_rn(f16_at(band + L::D + row * 2), __int2float_rn(code));
    } else {
        u32 code = plane_field<4, 16>(unit(band, L::QS, row), i);
        if constexpr (T == T_Q5_0 || T == T_Q5_1) code |= (*(const u32*)(band + L::QH + row * 4) >> i & 1) << 4;
        if constexpr (T == T_Q4_0 || T == T_Q5_0) {
            return __fmul_rn(f16_at(band + L::D + row * 2), __int2float_rn((i32)code - (T == T_Q4_0 ? 8 : 16)));
        } else {
            const u8* d = band + L::D + row * 4;
            return __fadd_rn(__fmul_rn(f16_at(d), __int2float_rn((i32)code)), f16_at(d + 2));
        }
    }
}

template <u32 T> __device__ __forceinline__ f32 open_weight_of(const u8* tiles, u32 row_len, u32 row, u32 k) {
    using L = Layout<T>;
    const u8* column = tiles + row / 32 * tile_bytes<T>(row_len) + (u64)(k / L::VALUES) * COLUMN_BYTES<T>;
    return open_weight_in<T>(band_of<T>(column, row % 32 / BAND), row % BAND, k % L::VALUES);
}

// Weight k of row `row` of a matrix with rows of `row_len`, of its first expert.
__device__ __forceinline__ f32 open_weight(const Matrix& m, u32 row_len, u32 row, u32 k) {
    const u64 i = (u64)row * row_len + k;
    switch (m.type) {
        case T_F32: if constexpr (has(T_F32)) return ((const f32*)m.data)[i]; break;
        case T_F16: if constexpr (has(T_F16)) return f16_to_f32(((const u16*)m.data)[i]); break;
        case T_BF16: if constexpr (has(T_BF16)) return __uint_as_float((u32)((const u16*)m.data)[i] << 16); break;
        case T_Q8_0: if constexpr (has(T_Q8_0)) return open_weight_of<T_Q8_0>(m.data, row_len, row, k); break;
        case T_Q4_0: if constexpr (has(T_Q4_0)) return open_weight_of<T_Q4_0>(m.data, row_len, row, k); break;
        case T_Q4_1: if constexpr (has(T_Q4_1)) return open_weight_of<T_Q4_1>(m.data, row_len, row, k); break;
        case T_Q5_0: if constexpr (has(T_Q5_0)) return open_weight_of<T_Q5_0>(m.data, row_len, row, k); break;
        case T_Q5_1: if constexpr (has(T_Q5_1)) return open_weight_of<T_Q5_1>(m.data, row_len, row, k); break;
        case T_Q2K: if constexpr (has(T_Q2K)) return open_weight_of<T_Q2K>(m.data, row_len, row, k); break;
        case T_Q3K: if constexpr (has(T_Q3K)) return open_weight_of<T_Q3K>(m.data, row_len, row, k); break;
        case T_Q4K: if constexpr (has(T_Q4K)) return open_weight_of<T_Q4K>(m.data, row_len, row, k); break;
        case T_Q5K: if constexpr (has(T_Q5K)) return open_weight_of<T_Q5K>(m.data, row_len, row, k); break;
        case T_Q6K: if constexpr (has(T_Q6K)) return open_weight_of<T_Q6K>(m.data, row_len, row, k); break;
    }
    // A matrix of a type that TYPES does not list: the host lists every matrix's.
    return __uint_as_float(0x7fc00000u);
}
