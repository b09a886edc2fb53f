// Products of slices with an activation row, and how a slice comes from a tile into shared memory.
//
// A slice is a band, sixteen weight rows, by 256 values: a run of bytes (of small blocks, eight), multiplied by int8 tensor cores (exact: integers in,
// 32-bit integers out): the weights' rows are A's, and B's eight columns are the two planes of four parts of the
// activations, each of which the other parts' weights see as zeros. That wastes three quarters of the multiplications and
// no instructions, and those are what counts: by four-way dots (dp4a) the same slice takes twice as long, since every lane
// must read 16 times the activations from shared memory (measured: 1,300 to 1,900 cycles for sixteen warps' slices).
#pragma once
#include "ring.cuh"
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
    // In a band's block, where the scale is: behind its whole 16-byte pieces (Q6_K, Q8_0).
    static constexpr u32 WHOLE = Layout<T>::BYTES / 16 * 256;
    // Bytes of 32 rows by 256 values.
    static constexpr u32 COLUMN = BLOCKS * COLUMN_BYTES<T>;
};

// Bands that hold so many rows.
constexpr __host__ __device__ u32 bands(u32 rows) { return (rows + BAND - 1) / BAND; }

// Terms that a slice of any type of this model may have.
constexpr u32 TERMS = has(T_Q8_0) ? 8 : 1;

// A slice: where it lies, but for the expert that it is of; to be multiplied with block `block` of the activation row.
struct Item {
    const u8* from;
    u32 type;
    u32 block;
    u32 rank;  // of the expert among those chosen
};

// Bytes of 32 rows by 256 values.
__device__ __forceinline__ u32 column_bytes(u32 type) {
    u32 bytes = 0;
    by_type(type, [&](auto t) { bytes = Slice<decltype(t)::value>::COLUMN; });
    return bytes;
}

// Bytes of one expert's tiles.
__device__ __forceinline__ u64 expert_stride(u32 type, u32 k, u32 rows) { return (u64)((rows + 31) / 32) * (k / 256) * column_bytes(type); }

// Column `block` of band `band` of a matrix whose rows are `blocks` blocks long; of its first expert, if it is of several.
__device__ __forceinline__ Item item_of(const u8* data, u32 type, u32 band, u32 block, u32 blocks, u32 rank = 0) {
    // A slice of small blocks is in pieces, each with the other band's beside it.
    u32 other = 0;
    by_type(type, [&](auto t) { other = BAND_BYTES<decltype(t)::value>; });
    return {data + (u64)(band / 2 * blocks + block) * column_bytes(type) + band % 2 * other, type, block, rank};
}

// Bytes of a slice.
__device__ __forceinline__ u32 slice_bytes(u32 type) { return column_bytes(type) / 2; }

// Starts the copy of a slice to shared memory; as copy_once (ring.cuh).
__device__ __forceinline__ void copy_slice(u8* to, const u8* from, u32 type, u64* full) {
    by_type(type, [&](auto t) {
        constexpr u32 T = decltype(t)::value;
#pragma unroll
        for (u32 b = 0; b < Slice<T>::BLOCKS; b++) copy_once(to + b * BAND_BYTES<T>, from + b * COLUMN_BYTES<T>, BAND_BYTES<T>, full);
    });
}

// A lane's share of a block of activations, as B fragments want it: column i = lane / 8 of the tensor cores' pairs of columns
// has the 64 values 64 i.., plane lane / 4 % 2 of them, and the other pairs meet zeros: `word[i][a]` is the lane's word of
// values 64 i + 16 a.. if i is its own, else 0. So one product leaves the sums of sub-blocks apart that have scales of their
// own, both planes side by side.
struct Operand {
    u32 word[4][4];
    u32 own[4];  // of its own part
};

template <u32 K> __device__ __forceinline__ Operand load_operand(const Planes<K>& row, u32 block, u32 lane) {
    const bool low = lane / 4 % 2;
    // One plane: the columns of the other are zero.
    uint4 own = {};
    if (PLANES == 2 || !low) own = (low ? row.lo : row.hi)[block * 16 + lane / 8 * 4 + lane % 4];
    Operand x = {{}, {own.x, own.y, own.z, own.w}};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        // A product, since the units that select are the busiest here.
        const u32 mine = opaque(lane / 8 == i);
#pragma unroll
        for (u32 a = 0; a < 4; a++) x.word[i][a] = x.own[a] * mine;
    }
    return x;
}

// A lane's words of two 16-byte pieces of a row: [piece][row r, row r + 8], r = lane / 4. Also sums: [row][plane].
struct Four {
    u32 v[4];
};
struct Sums {
    i32 v[4] = {0, 0, 0, 0};
};
template <class F> __device__ __forceinline__ Four each(const Four& a, F&& f) { return {{f(a.v[0]), f(a.v[1]), f(a.v[2]), f(a.v[3])}}; }
template <class F> __device__ __forceinline__ Four each(const Four& a, const Four& b, F&& f) {
    return {{f(a.v[0], b.v[0]), f(a.v[1], b.v[1]), f(a.v[2], b.v[2]), f(a.v[3], b.v[3])}};
}

// Pieces `unit` and `unit` + 1.
__device__ __forceinline__ Four load_units(const u8* slice, u32 unit, u32 lane) {
    Four u;
    load_matrices(u.v, slice + unit * 256 + lane * 16);
    return u;
}

// Adds over the lanes of a row and hands each lane one row's sum: row r to even quads, row r + 8 to odd ones.
__device__ __forceinline__ i32 gather(i32 upper, i32 lower) {
    const bool odd = threadIdx.x % 2;
    const i32 own = (odd ? lower : upper) + __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 1);
    return own + __shfl_xor_sync(0xffffffffu, own, 2);
}

__device__ __forceinline__ f32 half_at(const u8* p) { return f16_to_f32(*(const u16*)p); }

// F of rule 1: the planes' sums as one float.
__device__ __forceinline__ f32 both_planes(i32 h, i32 l) { return PLANES == 2 ? join(h, l) : __int2float_rn(h); }

// The sums of sub-blocks 2q (even) and 2q + 1 (odd) of 32 values, q being the lane's place in its quad. Q4_K: the odd ones
// sixteen times, for nibbles stay where they are.
template <u32 T> __device__ __forceinline__ void sums_of_32(const u8* slice, u32 lane, const Operand& x, Sums& even, Sums& odd) {
    Four fifth;
    if constexpr (T == T_Q5K) fifth = load_units(slice, Layout<T_Q5K>::QH, lane);
#pragma unroll
    for (u32 p = 0; p < 4; p++) {
        const u32(&b)[4] = x.word[p];
        if constexpr (T == T_Q8_0) {
            mma_k32<true>(even.v, load_units(slice + 2 * p * BAND_BYTES<T>, 0, lane).v, b[0], b[1]);
            mma_k32<true>(odd.v, load_units(slice + (2 * p + 1) * BAND_BYTES<T>, 0, lane).v, b[2], b[3]);
        } else {
            // Low and high nibbles of two pieces.
            const Four w = load_units(slice, Layout<T>::QS + p * 2, lane);
            Four low = each(w, [](u32 v) { return v & 0x0f0f0f0fu; });
            if constexpr (T == T_Q4K) {
                mma_k32<true>(even.v, low.v, b[0], b[1]);
                mma_k32<false>(odd.v, each(w, [](u32 v) { return v & 0xf0f0f0f0u; }).v, b[2], b[3]);
            } else {
                // Bit j of a byte of `fifth` belongs to sub-block j.
                Four high = each(w, [](u32 v) { return v >> 4 & 0x0f0f0f0fu; });
                low = each(low, fifth, [=](u32 v, u32 f) { return v | (f >> (p * 2) & 0x01010101u) << 4; });
                high = each(high, fifth, [=](u32 v, u32 f) { return v | (f >> (p * 2 + 1) & 0x01010101u) << 4; });
                mma_k32<true>(even.v, low.v, b[0], b[1]);
                mma_k32<true>(odd.v, high.v, b[2], b[3]);
            }
        }
    }
}

// d F - dmin G of a row of Q4_K or Q5_K.
template <u32 T, u32 K> __device__ __forceinline__ f32 value_45(const u8* slice, u32 lane, const Planes<K>& row, u32 block) {
    const u32 r = lane / 4, q = lane % 4;
    // Where the two scales of a lane lie (quant::block::six_bits): those of sub-blocks 4 to 7 keep their two high bits above
    // those of 0 to 3.
    const u32 at = q % 2 * 16, high_at = at + q / 2 * 2, high_bits = q < 2 ? 0x3f3f : 0x3030, low_bits = q < 2 ? 0 : 0x0f0f;
    const int2 sums = *(const int2*)&row.sum[block * 8 + q * 2];
    Sums even, odd;
    sums_of_32<T>(slice, lane, load_operand(row, block, lane), even, odd);
    i32 h[2], l[2], g[2];
    u32 d[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const uint4 head = *(const uint4*)(slice + (r + i * 8) * 16);
        const u32 scales = (head.y >> high_at & high_bits) | (head.w >> at & low_bits);
        const u32 minima = (head.z >> high_at & high_bits) | (head.w >> (at + 4) & low_bits);
        const i32 s0 = scales & 0xff, s1 = scales >> 8;
        constexpr i32 LESS = T == T_Q4K ? 16 : 1;
        h[i] = s0 * even.v[i * 2] * LESS + s1 * odd.v[i * 2];
        l[i] = s0 * even.v[i * 2 + 1] * LESS + s1 * odd.v[i * 2 + 1];
        g[i] = (i32)(minima & 0xff) * sums.x + (i32)(minima >> 8) * sums.y;
        d[i] = head.x;
    }
    // Sixteen times Q4_K's largest sum is 4.9e8.
    constexpr u32 SHIFT = T == T_Q4K ? 4 : 0;
    const f32 f = both_planes(gather(h[0], h[1]) >> SHIFT, PLANES == 2 ? gather(l[0], l[1]) >> SHIFT : 0);
    const u32 own = q % 2 ? d[1] : d[0];
    const f32 minimum = __fmul_rn(f16_to_f32((u16)(own >> 16)), __int2float_rn(gather(g[0], g[1])));
    return __fsub_rn(__fmul_rn(f16_to_f32((u16)own), f), minimum);
}

// d F of a row of Q6_K. Its codes are biased by 32; here they are four times themselves, for their six bits join at the top
// of a byte with the fewest instructions, and sums begin at -128 times the activations. The largest is 5.6e8.
template <u32 K> __device__ __forceinline__ f32 value_6(const u8* slice, u32 lane, const Planes<K>& row, u32 block) {
    using L = Layout<T_Q6K>;
    const u32 r = lane / 4, q = lane % 4;
    const Operand x = load_operand(row, block, lane);
    Sums sums[4];  // of sub-blocks 4 q + a
    constexpr u32 BIAS[4] = {0x80808080u, 0x80808080u, 0, 0};
#pragma unroll
    for (u32 a = 0; a < 4; a++) mma_k32<true>(sums[a].v, BIAS, x.own[a], 0);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const Four high = load_units(slice, L::QH + half * 2, lane);
        const Four nibbles[2] = {load_units(slice, L::QL + half * 4, lane), load_units(slice, L::QL + half * 4 + 2, lane)};
        const auto codes = [&](u32 sub, u32 i) {
            const u32 w = nibbles[sub % 4 / 2].v[sub % 2 * 2 + i], f = high.v[sub % 2 * 2 + i], shift = sub / 2 * 2;
            return ((sub < 4 ? w << 2 : w >> 2) & 0x3c3c3c3cu) | (f << (6 - shift) & 0xc0c0c0c0u);
        };
#pragma unroll
        for (u32 a = 0; a < 4; a++) {
            // The low and the high nibbles of a piece: sub-blocks a and 4 + a of the half.
            const u32 both[4] = {codes(a, 0), codes(a, 1), codes(a + 4, 0), codes(a + 4, 1)};
            mma_k32<false>(sums[a].v, both, x.word[half * 2][a], x.word[half * 2 + 1][a]);
        }
    }
    i32 h[2] = {0, 0}, l[2] = {0, 0};
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 scales = *(const u32*)(slice + L::SCALES * 256 + (r + i * 8) * 16 + q * 4);
#pragma unroll
        for (u32 a = 0; a < 4; a++) {
            const i32 scale = (i32)permute(scales, 0, a | (a | 8) * 0x1110);  // byte a, and its sign three times
            h[i] += scale * sums[a].v[i * 2];
            l[i] += scale * sums[a].v[i * 2 + 1];
        }
    }
    const f32 f = both_planes(gather(h[0], h[1]) >> 2, PLANES == 2 ? gather(l[0], l[1]) >> 2 : 0);
    return __fmul_rn(half_at(slice + Slice<T_Q6K>::WHOLE + (r + q % 2 * 8) * 2), f);
}

// Writes the terms of the sixteen rows: terms[term][row].
template <u32 T, u32 K>
__device__ __forceinline__ void slice_terms(const u8* slice, u32 lane, const Planes<K>& row, u32 block, f32* terms) {
    const u32 r = lane / 4, q = lane % 4;
    const f32 scale = row.scale[block];
    if constexpr (T == T_Q8_0) {
        Sums sums[2];
        sums_of_32<T>(slice, lane, load_operand(row, block, lane), sums[0], sums[1]);
        // s * (d * F + 0 * G): the zero changes no bit of a sum that began at +0.
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 b = q * 2 + i / 2, at = r + i % 2 * 8;
            const f32 d = half_at(slice + b * BAND_BYTES<T> + Slice<T>::WHOLE + at * 2);
            terms[b * BAND + at] = __fmul_rn(scale, __fmul_rn(d, both_planes(sums[i / 2].v[i % 2 * 2], sums[i / 2].v[i % 2 * 2 + 1])));
        }
    } else {
        f32 v;
        if constexpr (T == T_Q6K) v = value_6(slice, lane, row, block);
        else v = value_45<T>(slice, lane, row, block);
        if (q < 2) terms[r + q * 8] = __fmul_rn(scale, v);
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
