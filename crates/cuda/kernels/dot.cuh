// Products of slices with an activation row, and how a slice comes from a tile into shared memory.
//
// A slice is eight weight rows ("an octet", a quarter of a tile) by 256 values. A warp takes a slice at a time:
// lane = row + 8 part, and each of the four parts takes 64 of the 256 values, which are the same ones for every slice of
// that block of activations. So a lane's 64 activations stay in registers from slice to slice, and what differs is
// only the weights: three to six loads of 16 bytes a lane. The sums of a super-block are integers, so how its
// values are dealt to parts leaves no trace in the bits.
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
    // In shared memory: [BLOCKS][UNITS][8 rows][16 bytes], then [BLOCKS][8 rows][REST].
    static constexpr u32 WHOLE = BLOCKS * UNITS * 128;
    static constexpr u32 BYTES = WHOLE + BLOCKS * 8 * REST;
    // Bytes of 32 rows by 256 values.
    static constexpr u32 COLUMN = BLOCKS * COLUMN_BYTES<T>;
};

// Octets that hold so many rows.
constexpr __host__ __device__ u32 octets(u32 rows) { return (rows + 7) / 8; }

// Terms that a slice of any type of this model may have.
constexpr u32 TERMS = has(T_Q8_0) ? 8 : 1;

// What a slice is: octet `octet` (0 to 3) of the column of 32 rows by 256 values at `column`, to be multiplied with
// block `block` of the activation row.
struct Item {
    const u8* column;
    u32 octet;
    u32 type;
    u32 block;
};

__device__ __forceinline__ u32 column_bytes(u32 type) {
    u32 bytes = 0;
    by_type(type, [&](auto t) { bytes = Slice<decltype(t)::value>::COLUMN; });
    return bytes;
}

// Column `block` of octet `octet` of the rows of `m`, whose rows are `blocks` blocks long.
__device__ __forceinline__ Item item_of(const u8* data, u32 type, u32 octet, u32 block, u32 blocks) {
    return {data + (u64)(octet / 4 * blocks + block) * column_bytes(type), octet % 4, type, block};
}

// Starts the copy of a slice to shared memory; the warp's lanes share the pieces.
template <u32 T> __device__ __forceinline__ void copy_slice(const Item& item, u8* to, u32 lane) {
    using S = Slice<T>;
    constexpr u32 PIECES = S::WHOLE / 16;
    // 32 lanes copy four units a step; Q8_0 has two to a block.
    constexpr u32 STEP = S::UNITS == 2 ? 2 * COLUMN_BYTES<T> : 4 * 512;
    const u32 unit = lane / 8;
    const u32 start = S::UNITS == 2 ? unit / 2 * COLUMN_BYTES<T> + unit % 2 * 512 : unit * 512;
    const u8* from = item.column + start + item.octet * 128 + lane % 8 * 16;
#pragma unroll
    for (u32 i = 0; i * 32 < PIECES; i++)
        if (i * 32 + 32 <= PIECES || i * 32 + lane < PIECES) async_copy16(to + (i * 32 + lane) * 16, from + i * STEP);
    if constexpr (S::REST != 0) {
        static_assert(S::REST == 2, "eight rows' scales are one piece");
        if (lane < S::BLOCKS)
            async_copy16(to + S::WHOLE + lane * 16, item.column + lane * COLUMN_BYTES<T> + S::UNITS * 512 + item.octet * 16);
    }
}

// A part's 64 activations: four pieces of 16.
struct Operand {
    uint4 hi[4];
    uint4 lo[PLANES == 2 ? 4 : 1];
    i32 sum[2];  // of q over pieces 0, 1 and over 2, 3
};

// Which 16 of a block's values piece j of a part holds. Q6_K keeps weights that lie 32 apart in one byte's neighbourhood.
template <u32 T> __device__ __forceinline__ u32 piece_of(u32 part, u32 j) {
    return T == T_Q6K ? part / 2 * 8 + j * 2 + part % 2 : part * 4 + j;
}

template <u32 T, u32 K> __device__ __forceinline__ void load_operand(Operand& x, const Planes<K>& row, u32 block, u32 part) {
    i32 sum[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 at = block * 16 + piece_of<T>(part, j);
        x.hi[j] = row.hi[at];
        if constexpr (PLANES == 2) x.lo[j] = row.lo[at];
        if constexpr (T != T_Q6K) sum[j] = joined_sum(row.sum[at]);
    }
    // Also for Q8_0, which needs none: the next slice may be of another type.
    if constexpr (T != T_Q6K) {
        x.sum[0] = sum[0] + sum[1];
        x.sum[1] = sum[2] + sum[3];
    }
}

// Sums over the two planes, and of the minima.
struct Sums {
    i32 h, l, g;
};

__device__ __forceinline__ i32 dot16(const uint4& w, const uint4& x, i32 sum) {
    sum = __dp4a((i32)w.x, (i32)x.x, sum);
    sum = __dp4a((i32)w.y, (i32)x.y, sum);
    sum = __dp4a((i32)w.z, (i32)x.z, sum);
    return __dp4a((i32)w.w, (i32)x.w, sum);
}

template <class F> __device__ __forceinline__ uint4 words(const uint4& w, F&& f) {
    return make_uint4(f(w.x), f(w.y), f(w.z), f(w.w));
}
template <class F> __device__ __forceinline__ uint4 words(const uint4& a, const uint4& b, F&& f) {
    return make_uint4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
}

__device__ __forceinline__ const uint4& piece(const u8* slice, u32 unit, u32 row) {
    return *(const uint4*)(slice + unit * 128 + row * 16);
}

// Adds a piece of 16 codes to sub-block sums.
__device__ __forceinline__ void add_codes(const uint4& codes, const Operand& x, u32 j, i32& h, i32& l) {
    h = dot16(codes, x.hi[j], h);
    if constexpr (PLANES == 2) l = dot16(codes, x.lo[j], l);
}

// Q4_K and Q5_K: part p is sub-blocks 2p and 2p + 1 of 32 values, the low and the high nibbles of 32 bytes.
template <u32 T> __device__ __forceinline__ Sums part_sums_45(const u8* slice, u32 row, u32 part, const Operand& x) {
    const uint4 head = piece(slice, 0, row);
    i32 h[2] = {0, 0}, l[2] = {0, 0};
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const uint4 w = piece(slice, Layout<T>::QS + part * 2 + half, row);
        uint4 low = words(w, [](u32 v) { return v & 0x0f0f0f0fu; });
        uint4 high = words(w, [](u32 v) { return v >> 4 & 0x0f0f0f0fu; });
        if constexpr (T == T_Q5K) {
            // Bit j of a byte belongs to sub-block j: bits 2p and 2p + 1 become the fifth bits.
            const uint4 fifth = piece(slice, Layout<T_Q5K>::QH + half, row);
            const u32 shift = part * 2;
            low = words(low, fifth, [=](u32 v, u32 q) { return v | (q >> shift << 4 & 0x10101010u); });
            high = words(high, fifth, [=](u32 v, u32 q) { return v | (q >> shift << 3 & 0x10101010u); });
        }
        add_codes(low, x, half, h[0], l[0]);
        add_codes(high, x, 2 + half, h[1], l[1]);
    }
    // Numbers 4 to 7 keep their two high bits above numbers 0 to 3 (quant::block::six_bits).
    const bool split = part >= 2;
    const u32 shift = part % 2 * 16;
    const u32 scales = split ? (head.w & 0x0f0f0f0fu) | (head.y >> 2 & 0x30303030u) : head.y & 0x3f3f3f3fu;
    const u32 minima = split ? (head.w >> 4 & 0x0f0f0f0fu) | (head.z >> 2 & 0x30303030u) : head.z & 0x3f3f3f3fu;
    const i32 s0 = scales >> shift & 0xff, s1 = scales >> shift >> 8 & 0xff;
    const i32 m0 = minima >> shift & 0xff, m1 = minima >> shift >> 8 & 0xff;
    return {s0 * h[0] + s1 * h[1], PLANES == 2 ? s0 * l[0] + s1 * l[1] : 0, m0 * x.sum[0] + m1 * x.sum[1]};
}

// Q6_K: part p = 2 half + i is bytes 16 i to 16 i + 15 of each run of 32 in one half of the block: four sub-blocks.
// Codes are biased by 32: the sums start from -32 times the activations' sums.
template <u32 K> __device__ __forceinline__ Sums part_sums_6(const u8* slice, u32 row, u32 part, const Operand& x, const Planes<K>& planes, u32 block) {
    const u32 half = part / 2, i = part % 2;
    const uint4 a = piece(slice, half * 4 + i, row), b = piece(slice, half * 4 + 2 + i, row);
    const uint4 q = piece(slice, Layout<T_Q6K>::QH + half * 2 + i, row);
    const u8* scales = slice + Layout<T_Q6K>::SCALES * 128 + row * 16 + half * 8 + i;
    Sums s = {0, 0, 0};
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const uint4 codes = words(j % 2 ? b : a, q, [=](u32 v, u32 f) {
            return (j < 2 ? v & 0x0f0f0f0fu : v >> 4 & 0x0f0f0f0fu) |
                   ((j == 0 ? f << 4 : j == 1 ? f << 2 : j == 2 ? f : f >> 2) & 0x30303030u);
        });
        const u32 sums = planes.sum[block * 16 + piece_of<T_Q6K>(part, j)];
        i32 h = sum_high(sums) * -32, l = sum_low(sums) * -32;
        add_codes(codes, x, j, h, l);
        const i32 scale = (i8)scales[j * 2];
        s.h += scale * h;
        if constexpr (PLANES == 2) s.l += scale * l;
    }
    return s;
}

__device__ __forceinline__ f32 half_at(const u8* p) { return f16_to_f32(*(const u16*)p); }

// F of rule 1: the planes' sums as one float.
__device__ __forceinline__ f32 both_planes(i32 h, i32 l) { return PLANES == 2 ? join(h, l) : __int2float_rn(h); }

// Writes the terms of the eight rows: terms[term][row].
template <u32 T, u32 K>
__device__ __forceinline__ void slice_terms(const u8* slice, u32 lane, const Operand& x, const Planes<K>& planes, u32 block, f32* terms) {
    const u32 row = lane % 8, part = lane / 8;
    const f32 scale = planes.scale[block];
    if constexpr (T == T_Q8_0) {
        // Part p is blocks 2p and 2p + 1. s * (d * F + 0 * G): the zero changes no bit of a sum that began at +0.
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const u32 at = part * 2 + j;
            i32 h = 0, l = 0;
            add_codes(piece(slice, at * 2, row), x, j * 2, h, l);
            add_codes(piece(slice, at * 2 + 1, row), x, j * 2 + 1, h, l);
            const f32 d = half_at(slice + Slice<T>::WHOLE + at * 16 + row * 2);
            terms[at * 8 + row] = __fmul_rn(scale, __fmul_rn(d, both_planes(h, l)));
        }
    } else {
        Sums s;
        f32 d, dmin = 0.0f;
        if constexpr (T == T_Q6K) {
            s = part_sums_6(slice, row, part, x, planes, block);
            d = half_at(slice + Slice<T>::WHOLE + row * 2);
        } else {
            s = part_sums_45<T>(slice, row, part, x);
            d = half_at(slice + row * 16);
            dmin = half_at(slice + row * 16 + 2);
        }
#pragma unroll
        for (u32 w = 8; w <= 16; w *= 2) {
            s.h += __shfl_xor_sync(0xffffffffu, s.h, w);
            if constexpr (PLANES == 2) s.l += __shfl_xor_sync(0xffffffffu, s.l, w);
            if constexpr (T != T_Q6K) s.g += __shfl_xor_sync(0xffffffffu, s.g, w);
        }
        f32 f = __fmul_rn(d, both_planes(s.h, s.l));
        if constexpr (T != T_Q6K) f = __fsub_rn(f, __fmul_rn(dmin, __int2float_rn(s.g)));
        if (part == 0) terms[row] = __fmul_rn(scale, f);
    }
}

// A row's product: its terms in block order from +0. `terms` is [blocks][TERMS][8 rows], at this row.
__device__ __forceinline__ f32 sum_terms(const f32* terms, u32 blocks, u32 type) {
    f32 sum = 0.0f;
    if (TERMS > 1 && type == T_Q8_0) {
        for (u32 i = 0; i < blocks * TERMS; i++) sum = __fadd_rn(sum, terms[i * 8]);
    } else {
#pragma unroll 8
        for (u32 i = 0; i < blocks; i++) sum = __fadd_rn(sum, terms[i * TERMS * 8]);
    }
    return sum;
}
