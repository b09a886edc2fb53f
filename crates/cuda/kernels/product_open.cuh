// Blocks of weights, opened from a tile in shared memory into A fragments (fragment.cuh): what open_super and open_small
// of quant::block say, for the 16 rows from `row - g` on, by the lane that holds rows `row` and `row + 8`.
//
// A code times its sub-block's integer scale is still a small integer (at most 16 bits), so it is opened as one or two
// byte planes, low and high, and the sum over a whole super-block is plain int8 tensor-core work: no scale is left to
// apply until the block ends. Where codes and scales are unsigned and short, the planes are the codes times the scale's
// octal digits: four such products fit the bytes of a word, and one multiplication makes them. Loads are 4 bytes a lane, 8 rows of 16 bytes a warp: 128 contiguous bytes, no conflict.
#pragma once
#include "arith.cuh"
#include "fragment.cuh"
#include "types.cuh"

constexpr __device__ bool is_super(u32 type) { return type >= T_Q2K && type <= T_Q6K; }

// Bytes of 256 values of a tile's 32 rows.
template <u32 T> constexpr u32 SLOT_BYTES = COLUMN_BYTES<T> * (256 / Layout<T>::VALUES);

// Byte planes of a code times its scale: |scale * code| <= 45 (Q2_K), 128 (Q3_K), 945 (Q4_K), 1953 (Q5_K), 4096 (Q6_K).
template <u32 T> constexpr u32 WEIGHT_PLANES = T == T_Q2K || T == T_Q3K ? 1 : 2;
// What the high plane counts.
template <u32 T> constexpr i32 PLANE_BASE = T == T_Q4K || T == T_Q5K ? 8 : 256;
// Whether the highest plane is signed; a low plane under a high one never is.
template <u32 T> constexpr bool SIGNED = T == T_Q3K || T == T_Q6K;
// Q3_K's product reaches 128 and its opposite does not: opened negated, so that it fits a signed byte.
template <u32 T> constexpr bool NEGATED = T == T_Q3K;
template <u32 T> constexpr bool HAS_MINIMUM = T == T_Q2K || T == T_Q4K || T == T_Q5K || T == T_Q4_1 || T == T_Q5_1;

__device__ __forceinline__ u32 shared_word(const u8* p) { return *(const u32*)p; }

// Word t of 16-byte piece u of a row.
__device__ __forceinline__ u32 word(const u8* band, u32 u, u32 row) { return shared_word(unit(band, u, row) + fragment_quad() * 4); }

// Types whose codes have bits in a second place.
template <u32 T> constexpr bool HAS_HIGH = T == T_Q3K || T == T_Q5K || T == T_Q6K;
// The pieces that hold the codes of weights 128 h + 32 s + 16 half.. : their low bits, and the others.
template <u32 T> constexpr __device__ u32 low_piece(u32 h, u32 s, u32 half) {
    if constexpr (T == T_Q4K || T == T_Q5K) return Layout<T>::QS + 2 * (2 * h + s / 2) + half;
    else if constexpr (T == T_Q6K) return Layout<T>::QL + 4 * h + s % 2 * 2 + half;
    else return Layout<T>::QS + 2 * h + half;
}
template <u32 T> constexpr __device__ u32 high_piece(u32 h, u32 half) {
    if constexpr (T == T_Q6K) return Layout<T>::QH + 2 * h + half;
    else if constexpr (T == T_Q5K) return Layout<T>::QH + half;
    else if constexpr (T == T_Q3K) return Layout<T>::HMASK + half;
    else return 0;
}
// Four codes, a byte each, of sub-block (h, s) from words of those pieces.
template <u32 T> __device__ __forceinline__ u32 join_codes(u32 low, u32 high, u32 h, u32 s) {
    if constexpr (T == T_Q4K) return low >> (s % 2 * 4) & 0x0f0f0f0f;
    else if constexpr (T == T_Q5K) return (low >> (s % 2 * 4) & 0x0f0f0f0f) | (high >> (4 * h + s) & 0x01010101) << 4;
    else if constexpr (T == T_Q6K) return (low >> (s / 2 * 4) & 0x0f0f0f0f) | (high >> (2 * s) & 0x03030303) << 4;
    else if constexpr (T == T_Q3K) return (low >> (2 * s) & 0x03030303) | (high >> (4 * h + s) & 0x01010101) << 2;
    else return low >> (2 * s) & 0x03030303;
}

// Codes of weights 128 h + 32 s + 16 half + 4t.. of a row, a byte each.
template <u32 T> __device__ __forceinline__ u32 codes(const u8* band, u32 row, u32 h, u32 s, u32 half) {
    const u32 high = HAS_HIGH<T> ? word(band, high_piece<T>(h, half), row) : 0;
    return join_codes<T>(word(band, low_piece<T>(h, s, half), row), high, h, s);
}

// The scales of half h of a row's super-block, a byte each: of 32 weights in x (Q4_K, Q5_K), else of 16 in x, then y.
template <u32 T> __device__ __forceinline__ uint2 half_scales(const u8* band, u32 row, u32 h) {
    using L = Layout<T>;
    if constexpr (T == T_Q4K || T == T_Q5K) {
        const uint4 head = *(const uint4*)unit(band, 0, row);
        return make_uint2(h == 0 ? head.y & 0x3f3f3f3f : (head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030), 0);
    } else if constexpr (T == T_Q3K) {
        const uint2 low = *(const uint2*)(band + L::SCALES + row * 8);
        const u32 high = shared_word(band + L::SCALES_HIGH + row * 4) >> (4 * h);
        return make_uint2((low.x >> (4 * h) & 0x0f0f0f0f) | (high << 4 & 0x30303030),
                          (low.y >> (4 * h) & 0x0f0f0f0f) | (high << 2 & 0x30303030));
    } else {
        const uint2 both = *(const uint2*)(unit(band, L::SCALES, row) + 8 * h);
        return T == T_Q2K ? make_uint2(both.x & 0x0f0f0f0f, both.y & 0x0f0f0f0f) : both;
    }
}

// What the codes of sub-block (s, half) are multiplied by.
template <u32 T> __device__ __forceinline__ i32 factor(uint2 scales, u32 s, u32 half) {
    if constexpr (T == T_Q4K || T == T_Q5K) return scales.x >> (8 * s) & 0xff;
    const u32 word = s < 2 ? scales.x : scales.y, at = (s % 2 * 2 + half) * 8;
    if constexpr (T == T_Q6K) return (i32)(word << (24 - at)) >> 24;
    const i32 scale = word >> at & 0xff;
    return T == T_Q3K ? 32 - scale : scale;
}

// Four codes times their factor, less the bias, as bytes of two planes. For Q3_K and Q6_K two codes share a multiplication:
// their products stand in the halves of a word, raised by 2^15 where they may be negative so that neither borrows from the other.
template <u32 T> __device__ __forceinline__ void multiply(u32 w, i32 c, u32& low, u32& high) {
    if constexpr (T == T_Q2K) {
        low = w * (u32)c;
        return;
    }
    if constexpr (PLANE_BASE<T> == 8) {
        // At most 31 * 7.
        low = w * ((u32)c & 7), high = w * ((u32)c >> 3);
        return;
    }
    // (2^15 - bias c) in both halves.
    constexpr u32 BIAS = T == T_Q6K ? 32 : T == T_Q3K ? 4 : 0;
    const u32 offset = SIGNED<T> ? 0x80008000u - (u32)c * (BIAS * 0x10001u) : 0;
    const u32 even = __byte_perm(w, 0, 0x4240) * (u32)c + offset, odd = __byte_perm(w, 0, 0x4341) * (u32)c + offset;
    low = __byte_perm(even, odd, 0x6240);
    if constexpr (WEIGHT_PLANES<T> == 2) high = __byte_perm(even, odd, 0x7351) ^ (SIGNED<T> ? 0x80808080u : 0);
}

// The A fragment of the codes of weights 128 h + 32 s.. of the 16 rows from `row - g` on, unsigned.
template <u32 T> __device__ __forceinline__ void open_codes(const u8* band, u32 row, u32 h, u32 s, u32 (&a)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) a[i] = codes<T>(band, row + i % 2 * 8, h, s, i / 2);
}

// The A fragments of weights 128 h + 32 s.. of the 16 rows from `row - g` on times their scales, in planes.
template <u32 T>
__device__ __forceinline__ void open_super(const u8* band, u32 row, u32 h, u32 s, const uint2 (&scales)[2], u32 (&a)[2][4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) multiply<T>(codes<T>(band, row + i % 2 * 8, h, s, i / 2), factor<T>(scales[i % 2], s, i / 2), a[0][i], a[1][i]);
}

// The minima of sub-blocks 4t.. of 16 weights, a byte each.
template <u32 T> __device__ __forceinline__ u32 minima(const u8* band, u32 row) {
    const u32 t = fragment_quad();
    if constexpr (T == T_Q2K) return shared_word(unit(band, Layout<T>::SCALES, row) + t * 4) >> 4 & 0x0f0f0f0f;
    const uint4 head = *(const uint4*)unit(band, 0, row);
    const u32 first = head.z & 0x3f3f3f3f, last = (head.w >> 4 & 0x0f0f0f0f) | (head.z >> 2 & 0x30303030);
    return __byte_perm(first, last, 0x1100 + 0x2222 * t);
}

// d, and dmin or m (0 for types without).
template <u32 T> __device__ __forceinline__ float2 block_scales(const u8* band, u32 row) {
    if constexpr (T == T_Q4K || T == T_Q5K) {
        const u32 both = shared_word(unit(band, 0, row));
        return make_float2(f16_to_f32((u16)both), f16_to_f32((u16)(both >> 16)));
    } else if constexpr (HAS_MINIMUM<T>) {
        const u32 both = shared_word(band + Layout<T>::D + row * 4);
        return make_float2(f16_to_f32((u16)both), f16_to_f32((u16)(both >> 16)));
    } else {
        return make_float2(f16_to_f32(*(const u16*)(band + Layout<T>::D + row * 2)), 0.0f);
    }
}

// Bytes less `bias`, where no byte has its top bit set.
__device__ __forceinline__ u32 less(u32 bytes, u32 bias) { return ((bytes | 0x80808080) - bias * 0x01010101) ^ 0x80808080; }

// The A fragment of a small block: its 32 codes, signed.
template <u32 T> __device__ __forceinline__ void open_small(const u8* band, u32 row, u32 (&a)[4]) {
    using L = Layout<T>;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if constexpr (T == T_Q8_0) {
            a[i] = word(band, L::QS + i / 2, row + i % 2 * 8);
        } else {
            a[i] = word(band, L::QS, row + i % 2 * 8) >> (i / 2 * 4) & 0x0f0f0f0f;
            if constexpr (T == T_Q5_0 || T == T_Q5_1) {
                const u32 bits = shared_word(band + L::QH + (row + i % 2 * 8) * 4) >> (i / 2 * 16 + fragment_quad() * 4) & 15;
                // Copies of the four bits, each shifted so that one of them lands in the place of a byte.
                a[i] |= (bits * 0x00204081u & 0x01010101) << 4;
            }
            if constexpr (T == T_Q4_0 || T == T_Q5_0) a[i] = less(a[i], T == T_Q4_0 ? 8 : 16);
        }
    }
}
