// Products of slices with an activation row, and how a slice comes from a tile into shared memory.
//
// A slice is sixteen weight rows ("a band", half a tile) by 256 values; a warp multiplies it in eight `mma.m16n8k32` on
// int8, which are exact: integers in, 32-bit integers out. Left operand: the band's rows, straight from its 16-byte pieces
// by `ldmatrix`. Right operand: the activations, whose eight columns are (sub-block, plane): column 2 i + plane, four
// sub-blocks to an accumulator. The activations of a sub-block stand only in their own columns, zeros elsewhere, so an
// accumulator keeps the sums of four sub-blocks and two planes apart until their scales have been applied. The zeros cost
// nothing that is short: what counts at batch 1 is instructions, and these are half of what dp4a takes.
//
// In what follows r = lane / 4 and q = lane % 4. A lane ends with the sums of rows r and r + 8 with sub-blocks q.
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

// A lane's share of a block of activations: words number q of its column's sub-blocks, where its column is sub-block
// i = lane / 8 of each accumulator, plane lane / 4 % 2. Sub-blocks of 32 (all types but Q6_K): two words of sub-block 2i,
// two of 2i + 1. Sub-blocks of 16: a word each of i, 4 + i, 8 + i, 12 + i.
struct Operand {
    u32 word[4];
    // Of q over sub-blocks 2q and 2q + 1 (of 32); or -32 times both planes' over sub-blocks q, 4 + q, 8 + q, 12 + q.
    i32 sum[8];
};

template <u32 T> constexpr bool SIXTEENS = T == T_Q6K;

template <u32 T, u32 K> __device__ __forceinline__ void load_operand(Operand& x, const Planes<K>& row, u32 block, u32 lane) {
    const u32 i = lane / 8, q = lane % 4;
    const bool low = lane / 4 % 2;
    const u32* plane = (const u32*)(PLANES == 2 && low ? row.lo : row.hi) + block * 64 + q;
    const i32* sums = row.sum + block * 16;
    // One plane: the columns of the other are zero.
    const bool on = PLANES == 2 || !low;
#pragma unroll
    for (u32 a = 0; a < 4; a++) {
        if constexpr (SIXTEENS<T>) {
            x.word[a] = on ? plane[(a * 4 + i) * 4] : 0;
            const i32 sum = sums[a * 4 + q];
            x.sum[a * 2] = sum_high(sum) * -32;
            x.sum[a * 2 + 1] = sum_low(sum) * -32;
        } else {
            x.word[a] = on ? plane[i * 16 + a * 4] : 0;
            // Also for Q8_0, which needs none: the next slice may be of another type.
            if (a < 2) x.sum[a] = joined_sum(sums[q * 4 + a * 2]) + joined_sum(sums[q * 4 + a * 2 + 1]);
        }
    }
}

// Four sums of a lane: row r with both planes, row r + 8 with both planes.
struct Sums {
    i32 v[4];
};

// Words q of two neighbouring units: [unit][row r, row r + 8].
struct Units {
    u32 v[4];
};

__device__ __forceinline__ Units load_units(const u8* slice, u32 unit, u32 lane) {
    Units u;
    load_matrices(u.v, slice + unit * 256 + lane * 16);
    return u;
}

template <class F> __device__ __forceinline__ Units each(const Units& a, F&& f) { return {{f(a.v[0]), f(a.v[1]), f(a.v[2]), f(a.v[3])}}; }
template <class F> __device__ __forceinline__ Units each(const Units& a, const Units& b, F&& f) {
    return {{f(a.v[0], b.v[0]), f(a.v[1], b.v[1]), f(a.v[2], b.v[2]), f(a.v[3], b.v[3])}};
}

// The sums of sub-blocks of 32 values: even[..] of 2q, odd[..] of 2q + 1.
template <u32 T> __device__ __forceinline__ void sums_of_32(const u8* slice, u32 lane, const Operand& x, Sums& even, Sums& odd) {
    even = odd = {{0, 0, 0, 0}};
    Units fifth;
    if constexpr (T == T_Q5K) fifth = load_units(slice, Layout<T_Q5K>::QH, lane);
#pragma unroll
    for (u32 p = 0; p < 4; p++) {
        const bool own = lane / 8 == p;
        const u32 b[4] = {own ? x.word[0] : 0, own ? x.word[1] : 0, own ? x.word[2] : 0, own ? x.word[3] : 0};
        if constexpr (T == T_Q8_0) {
            mma_k32<true>(even.v, load_units(slice, p * 4, lane).v, b[0], b[1]);
            mma_k32<true>(odd.v, load_units(slice, p * 4 + 2, lane).v, b[2], b[3]);
        } else {
            // Sub-blocks 2p and 2p + 1 are the low and the high nibbles of two units.
            const Units w = load_units(slice, Layout<T>::QS + p * 2, lane);
            Units low = each(w, [](u32 v) { return v & 0x0f0f0f0fu; });
            if constexpr (T == T_Q4K) {
                // Sixteen times the code, and one instruction less: value_45 divides, exactly.
                mma_k32<true>(even.v, low.v, b[0], b[1]);
                mma_k32<false>(odd.v, each(w, [](u32 v) { return v & 0xf0f0f0f0u; }).v, b[2], b[3]);
            } else {
                // Bit j of a byte of `fifth` belongs to sub-block j.
                Units high = each(w, [](u32 v) { return v >> 4 & 0x0f0f0f0fu; });
                low = each(low, fifth, [=](u32 v, u32 f) { return v | (f >> (p * 2) & 0x01010101u) << 4; });
                high = each(high, fifth, [=](u32 v, u32 f) { return v | (f >> (p * 2 + 1) & 0x01010101u) << 4; });
                mma_k32<true>(even.v, low.v, b[0], b[1]);
                mma_k32<true>(odd.v, high.v, b[2], b[3]);
            }
        }
    }
}

// Q6_K: the sums of sub-blocks of 16 values, 8 half + q and 8 half + 4 + q. Codes are biased by 32: sums begin at the bias.
__device__ __forceinline__ void sums_of_16(const u8* slice, u32 lane, const Operand& x, u32 half, Sums (&sums)[2]) {
    using L = Layout<T_Q6K>;
    const u32 i = lane / 8;
    const Units high = load_units(slice, L::QH + half * 2, lane);
    const Units nibbles[2] = {load_units(slice, L::QL + half * 4, lane), load_units(slice, L::QL + half * 4 + 2, lane)};
#pragma unroll
    for (u32 a = 0; a < 2; a++) {
        const i32 h = x.sum[half * 4 + a * 2], l = x.sum[half * 4 + a * 2 + 1];
        sums[a] = {{h, l, h, l}};
    }
#pragma unroll
    for (u32 s = 0; s < 4; s++) {
        // Sub-blocks 2s and 2s + 1 of the half: low nibbles for s < 2, then high; two units for even s, two for odd.
        const Units codes = each(nibbles[s % 2], high, [=](u32 v, u32 f) {
            return (v >> (s / 2 * 4) & 0x0f0f0f0fu) | ((s < 2 ? f << (4 - 2 * s) : f >> (2 * s - 4)) & 0x30303030u);
        });
        const u32 own = x.word[half * 2 + s / 2];
        mma_k32<true>(sums[s / 2].v, codes.v, i == s % 2 * 2 ? own : 0, i == s % 2 * 2 + 1 ? own : 0);
    }
}

// Adds over q and hands each lane one row's sum: row r to even q, row r + 8 to odd q.
__device__ __forceinline__ i32 gather(i32 upper, i32 lower, bool odd) {
    const i32 own = (odd ? lower : upper) + __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 1);
    return own + __shfl_xor_sync(0xffffffffu, own, 2);
}

__device__ __forceinline__ f32 half_at(const u8* p) { return f16_to_f32(*(const u16*)p); }

// F of rule 1: the planes' sums as one float.
__device__ __forceinline__ f32 both_planes(i32 h, i32 l) { return PLANES == 2 ? join(h, l) : __int2float_rn(h); }

// d F - dmin G of a row of Q4_K or Q5_K.
template <u32 T> __device__ __forceinline__ f32 value_45(const u8* slice, u32 lane, const Operand& x) {
    const u32 r = lane / 4, q = lane % 4;
    Sums even, odd;
    sums_of_32<T>(slice, lane, x, even, odd);
    i32 h[2], l[2], g[2];
    u32 d[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const uint4 head = *(const uint4*)(slice + (r + i * 8) * 16);
        // Two neighbouring numbers; 4 to 7 keep their two high bits above 0 to 3 (quant::block::six_bits).
        const u32 shift = q % 2 * 16, first = head.y >> shift, second = head.z >> shift, third = head.w >> shift;
        const u32 scales = q < 2 ? first & 0x3f3f : (third & 0x0f0f) | (first >> 2 & 0x3030);
        const u32 minima = q < 2 ? second & 0x3f3f : (third >> 4 & 0x0f0f) | (second >> 2 & 0x3030);
        constexpr u32 MORE = T == T_Q4K ? 4 : 0;
        const i32 s0 = scales & 0xff, s1 = scales >> 8;
        h[i] = s0 * even.v[i * 2] + s1 * (odd.v[i * 2] >> MORE);
        l[i] = s0 * even.v[i * 2 + 1] + s1 * (odd.v[i * 2 + 1] >> MORE);
        g[i] = (i32)(minima & 0xff) * x.sum[0] + (i32)(minima >> 8) * x.sum[1];
        d[i] = head.x;
    }
    const bool lower = q % 2;
    const f32 f = both_planes(gather(h[0], h[1], lower), PLANES == 2 ? gather(l[0], l[1], lower) : 0);
    const u32 own = lower ? d[1] : d[0];
    const f32 minimum = __fmul_rn(f16_to_f32((u16)(own >> 16)), __int2float_rn(gather(g[0], g[1], lower)));
    return __fsub_rn(__fmul_rn(f16_to_f32((u16)own), f), minimum);
}

// d F of a row of Q6_K.
__device__ __forceinline__ f32 value_6(const u8* slice, u32 lane, const Operand& x) {
    const u32 r = lane / 4, q = lane % 4;
    const bool lower = q % 2;
    // Selects byte q of a word and repeats its sign.
    const u32 select = q | (q | 8) * 0x1110;
    i32 h[2] = {0, 0}, l[2] = {0, 0};
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        Sums sums[2];
        sums_of_16(slice, lane, x, half, sums);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const uint2 scales = *(const uint2*)(slice + Layout<T_Q6K>::SCALES * 256 + (r + i * 8) * 16 + half * 8);
#pragma unroll
            for (u32 a = 0; a < 2; a++) {
                const i32 scale = (i32)permute(a ? scales.y : scales.x, 0, select);
                h[i] += scale * sums[a].v[i * 2];
                l[i] += scale * sums[a].v[i * 2 + 1];
            }
        }
    }
    const f32 f = both_planes(gather(h[0], h[1], lower), PLANES == 2 ? gather(l[0], l[1], lower) : 0);
    return __fmul_rn(half_at(slice + Slice<T_Q6K>::WHOLE + (r + lower * 8) * 2), f);
}

// Writes the terms of the sixteen rows: terms[term][row].
template <u32 T>
__device__ __forceinline__ void slice_terms(const u8* slice, u32 lane, const Operand& x, f32 scale, f32* terms) {
    const u32 r = lane / 4, q = lane % 4;
    if constexpr (T == T_Q8_0) {
        Sums sums[2];
        sums_of_32<T>(slice, lane, x, sums[0], sums[1]);
        // s * (d * F + 0 * G): the zero changes no bit of a sum that began at +0.
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 block = q * 2 + i / 2, row = r + i % 2 * 8;
            const f32 d = half_at(slice + Slice<T>::WHOLE + block * 32 + row * 2);
            const f32 f = both_planes(sums[i / 2].v[i % 2 * 2], sums[i / 2].v[i % 2 * 2 + 1]);
            terms[block * BAND + row] = __fmul_rn(scale, __fmul_rn(d, f));
        }
    } else {
        f32 v;
        if constexpr (T == T_Q6K) v = value_6(slice, lane, x);
        else v = value_45<T>(slice, lane, x);
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
