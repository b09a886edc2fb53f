// Products of slices with an activation row, and how a slice comes from a tile into shared memory.
//
// A slice is sixteen weight rows ("a band", half a tile) by 256 values. A lane takes half of a row, 128 values: row
// lane % 16, half lane / 16, in four-way dot products (dp4a), which are exact: integers in, 32-bit integers out. The two
// halves meet in one shuffle. Weights are 16-byte pieces that no two lanes of a quarter warp want from the same bank,
// activations the same for all lanes of a half. What counts at batch 1 is how long the chain of instructions is: here
// all sums of sub-blocks are independent of each other.
#pragma once
#include "row.cuh"
#include "types.cuh"

template <u32 V> struct Const { static constexpr u32 value = V; };

// The types that have a product here. Calls f(Const<T>) for the one that `type` is.
template <class F> __device__ __forceinline__ void by_type(u32 type, F&& f) {
    if constexpr (has(T_Q4K)) if (type == T_Q4K) return f(Const<T_Q4K>{});
    if constexpr (has(T_Q6K)) if (type == T_Q6K) return f(Const<T_Q6K>{});
    if constexpr (has(T_Q5K)) if (type == T_Q5K) return f(Const<T_Q5K>{});
    if constexpr (has(T_Q8_0)) if (type == T_Q8_0) return f(Const<T_Q8_0>{});
}

template <u32 T> struct Slice {
    // Blocks of a row; a block is one term of the row's sum.
    static constexpr u32 BLOCKS = 256 / Layout<T>::VALUES;
    // Whole 16-byte pieces of a block, and bytes beyond them: the scale of Q6_K and Q8_0.
    static constexpr u32 UNITS = Layout<T>::BYTES / 16, REST = Layout<T>::BYTES % 16;
    // In shared memory: [BLOCKS][UNITS][16 rows][16 bytes], then [BLOCKS][16 rows][REST].
    static constexpr u32 WHOLE = BLOCKS * UNITS * 256;
    static constexpr u32 BYTES = WHOLE + BLOCKS * 16 * REST;
    // Bytes of 32 rows by 256 values.
    static constexpr u32 COLUMN = BLOCKS * COLUMN_BYTES<T>;
};

// Rows of a slice, and the bands that hold so many rows.
constexpr u32 BAND = 16;
constexpr __host__ __device__ u32 bands(u32 rows) { return (rows + BAND - 1) / BAND; }

// Terms that a slice of any type of this model may have.
constexpr u32 TERMS = has(T_Q8_0) ? 8 : 1;

// What a slice is: the upper or lower half of the column of 32 rows by 256 values at `column`, to be multiplied with block
// `block` of the activation row.
struct Item {
    const u8* column;
    u32 lower;
    u32 type;
    u32 block;
};

__device__ __forceinline__ u32 column_bytes(u32 type) {
    u32 bytes = 0;
    by_type(type, [&](auto t) { bytes = Slice<decltype(t)::value>::COLUMN; });
    return bytes;
}

// Column `block` of band `band` of a matrix whose rows are `blocks` blocks long.
__device__ __forceinline__ Item item_of(const u8* data, u32 type, u32 band, u32 block, u32 blocks) {
    return {data + (u64)(band / 2 * blocks + block) * column_bytes(type), band % 2, type, block};
}

// Starts the copy of a slice to shared memory; the warp's lanes share the pieces.
template <u32 T> __device__ __forceinline__ void copy_slice(const Item& item, u8* to, u32 lane) {
    using S = Slice<T>;
    constexpr u32 PIECES = S::WHOLE / 16;
    // 32 lanes copy two units a step, which is a block of Q8_0.
    constexpr u32 STEP = S::UNITS == 2 ? COLUMN_BYTES<T> : 2 * 512;
    const u8* from = item.column + lane / 16 * 512 + item.lower * 256 + lane % 16 * 16;
#pragma unroll
    for (u32 i = 0; i * 32 < PIECES; i++)
        if (i * 32 + 32 <= PIECES || i * 32 + lane < PIECES) async_copy16(to + (i * 32 + lane) * 16, from + i * STEP);
    if constexpr (S::REST != 0) {
        static_assert(S::REST == 2, "sixteen rows' scales are two pieces");
        if (lane < S::BLOCKS * 2)
            async_copy16(to + S::WHOLE + lane * 16,
                         item.column + lane / 2 * COLUMN_BYTES<T> + S::UNITS * 512 + item.lower * 32 + lane % 2 * 16);
    }
}

// Sums of a lane's products in both planes.
struct Sum {
    i32 h, l;

    __device__ __forceinline__ void add(u32 codes, u32 hi, u32 lo) {
        h = __dp4a((i32)codes, (i32)hi, h);
        if constexpr (PLANES == 2) l = __dp4a((i32)codes, (i32)lo, l);
    }
};

// Adds the products of 16 codes, four to a word, with piece `piece` of the activations.
template <u32 K> __device__ __forceinline__ void add_piece(Sum& sum, const uint4& codes, const Planes<K>& row, u32 piece) {
    const uint4 hi = row.hi[piece];
    uint4 lo = {};
    if constexpr (PLANES == 2) lo = row.lo[piece];
    sum.add(codes.x, hi.x, lo.x);
    sum.add(codes.y, hi.y, lo.y);
    sum.add(codes.z, hi.z, lo.z);
    sum.add(codes.w, hi.w, lo.w);
}

template <class F> __device__ __forceinline__ uint4 each(const uint4& a, F&& f) { return {f(a.x), f(a.y), f(a.z), f(a.w)}; }
template <class F> __device__ __forceinline__ uint4 each(const uint4& a, const uint4& b, F&& f) {
    return {f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w)};
}

__device__ __forceinline__ const uint4& piece_at(const u8* slice, u32 unit, u32 r) { return *(const uint4*)(slice + unit * 256 + r * 16); }

// Both halves of a row.
__device__ __forceinline__ i32 both_halves(i32 v) { return v + __shfl_xor_sync(0xffffffffu, v, 16); }

__device__ __forceinline__ f32 half_at(const u8* p) { return f16_to_f32(*(const u16*)p); }

// F of rule 1: the planes' sums as one float.
__device__ __forceinline__ f32 both_planes(i32 h, i32 l) { return PLANES == 2 ? join(h, l) : __int2float_rn(h); }

// d F - dmin G of a row of Q4_K or Q5_K.
template <u32 T, u32 K> __device__ __forceinline__ f32 value_45(const u8* slice, u32 r, u32 half, const Planes<K>& row, u32 block) {
    const uint4 head = piece_at(slice, 0, r);
    // Four neighbouring numbers; 4 to 7 keep their two high bits above 0 to 3 (quant::block::six_bits).
    const u32 scales = half == 0 ? head.y & 0x3f3f3f3f : (head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030);
    const u32 minima = half == 0 ? head.z & 0x3f3f3f3f : (head.w >> 4 & 0x0f0f0f0f) | (head.z >> 2 & 0x30303030);
    uint4 fifth[2];
    if constexpr (T == T_Q5K) {
        // Bit j of a byte belongs to sub-block j.
#pragma unroll
        for (u32 i = 0; i < 2; i++) fifth[i] = each(piece_at(slice, Layout<T>::QH + i, r), [=](u32 v) { return v >> (half * 4); });
    }
    const i32* sums = row.sum + block * 16 + half * 8;
    i32 h = 0, l = 0, g = 0;
#pragma unroll
    for (u32 p = 0; p < 2; p++) {
        // Sub-blocks 2p and 2p + 1 of the half are the low and the high nibbles of two pieces.
        Sum even = {0, 0}, odd = {0, 0};
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const uint4 w = piece_at(slice, Layout<T>::QS + half * 4 + p * 2 + i, r);
            uint4 low = each(w, [](u32 v) { return v & 0x0f0f0f0f; }), high = each(w, [](u32 v) { return v >> 4 & 0x0f0f0f0f; });
            if constexpr (T == T_Q5K) {
                low = each(low, fifth[i], [=](u32 v, u32 f) { return v | (f >> (p * 2) & 0x01010101) << 4; });
                high = each(high, fifth[i], [=](u32 v, u32 f) { return v | (f >> (p * 2 + 1) & 0x01010101) << 4; });
            }
            const u32 piece = block * 16 + half * 8 + p * 4 + i;
            add_piece(even, low, row, piece);
            add_piece(odd, high, row, piece + 2);
        }
        const i32 s0 = scales >> (p * 16) & 0xff, s1 = scales >> (p * 16 + 8) & 0xff;
        const i32 m0 = minima >> (p * 16) & 0xff, m1 = minima >> (p * 16 + 8) & 0xff;
        h += s0 * even.h + s1 * odd.h;
        l += s0 * even.l + s1 * odd.l;
        g += m0 * joined_sum(sums[p * 4] + sums[p * 4 + 1]) + m1 * joined_sum(sums[p * 4 + 2] + sums[p * 4 + 3]);
    }
    const f32 f = both_planes(both_halves(h), PLANES == 2 ? both_halves(l) : 0);
    const f32 minimum = __fmul_rn(f16_to_f32((u16)(head.x >> 16)), __int2float_rn(both_halves(g)));
    return __fsub_rn(__fmul_rn(f16_to_f32((u16)head.x), f), minimum);
}

// d F of a row of Q6_K. Codes are biased by 32: sums begin at the bias.
template <u32 K> __device__ __forceinline__ f32 value_6(const u8* slice, u32 r, u32 half, const Planes<K>& row, u32 block) {
    using L = Layout<T_Q6K>;
    const uint2 scales = *(const uint2*)(slice + L::SCALES * 256 + r * 16 + half * 8);
    i32 h = 0, l = 0;
    uint4 high[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) high[i] = piece_at(slice, L::QH + half * 2 + i, r);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        // Sub-blocks i and i + 4 of the half: the low and the high nibbles of a piece.
        const uint4 w = piece_at(slice, L::QL + half * 4 + i, r);
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
            const u32 sub = i + n * 4, shift = sub / 2 * 2;  // of its two high bits
            const uint4 codes = each(w, high[i % 2], [=](u32 v, u32 f) {
                return (v >> (n * 4) & 0x0f0f0f0f) | ((shift < 4 ? f << (4 - shift) : f >> (shift - 4)) & 0x30303030);
            });
            const u32 piece = block * 16 + half * 8 + sub;
            Sum sum = {sum_high(row.sum[piece]) * -32, sum_low(row.sum[piece]) * -32};
            add_piece(sum, codes, row, piece);
            const i32 scale = (i32)(i8)((sub < 4 ? scales.x : scales.y) >> (sub % 4 * 8));
            h += scale * sum.h;
            l += scale * sum.l;
        }
    }
    const f32 f = both_planes(both_halves(h), PLANES == 2 ? both_halves(l) : 0);
    return __fmul_rn(half_at(slice + Slice<T_Q6K>::WHOLE + r * 2), f);
}

// Writes the terms of the sixteen rows: terms[term][row].
template <u32 T, u32 K>
__device__ __forceinline__ void slice_terms(const u8* slice, u32 lane, const Planes<K>& row, u32 block, f32* terms) {
    const u32 r = lane % 16, half = lane / 16;
    const f32 scale = row.scale[block];
    if constexpr (T == T_Q8_0) {
        // s * (d * F + 0 * G): the zero changes no bit of a sum that began at +0.
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 b = half * 4 + i;
            Sum sum = {0, 0};
#pragma unroll
            for (u32 u = 0; u < 2; u++) add_piece(sum, piece_at(slice, b * 2 + u, r), row, block * 16 + b * 2 + u);
            const f32 d = half_at(slice + Slice<T>::WHOLE + b * 32 + r * 2);
            terms[b * BAND + r] = __fmul_rn(scale, __fmul_rn(d, both_planes(sum.h, sum.l)));
        }
    } else {
        f32 v;
        if constexpr (T == T_Q6K) v = value_6(slice, r, half, row, block);
        else v = value_45<T>(slice, r, half, row, block);
        if (half == 0) terms[r] = __fmul_rn(scale, v);
    }
}

// A row's product: its terms in block order from +0. `terms` is [blocks][TERMS][BAND], at this row.
__device__ __forceinline__ f32 sum_terms(const f32* terms, u32 blocks, u32 type) {
    const u32 count = TERMS > 1 && type != T_Q8_0 ? blocks : blocks * TERMS;
    const u32 stride = TERMS > 1 && type != T_Q8_0 ? TERMS * BAND : BAND;
    f32 sum = 0.0f;
#pragma unroll 4
    for (u32 i = 0; i < count; i++) sum = __fadd_rn(sum, terms[i * stride]);
    return sum;
}
