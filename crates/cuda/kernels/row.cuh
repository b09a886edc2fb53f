// One activation row in the shared memory of a block: rounded to fixed point (rule 1), normalised before (rule 3).
//
// For batch 1: every block of a kernel makes the row it needs by itself, which costs less than a kernel of its own. Rows
// are multiples of 256 long here.
#pragma once
#include "arith.cuh"

// A row of K values in fixed point. The bytes lie as `load_operand` (dot.cuh) wants them: of every 64 values, word q of the
// 16 values a is word q * 4 + a, so that a lane's four words are together.
template <u32 K> struct Planes {
    static_assert(K % 256 == 0, "fixed-point blocks of 256");
    uint4 hi[K / 16];
    uint4 lo[PLANES == 2 ? K / 16 : 1];
    i32 sum[K / 32];  // of q
    f32 scale[K / 256];
};

// Of 16 values `piece`, word q's place.
__device__ __forceinline__ u32 word_of(u32 piece, u32 q) { return piece / 4 * 16 + q * 4 + piece % 4; }

// 256 hi + lo, or hi (A8).
__device__ __forceinline__ i32 joined_sum(i32 high, i32 low) { return PLANES == 2 ? high * 256 + low : high; }

// Eight neighbouring values: a lane's share of a block of 256.
struct Eight {
    f32 v[8];
};
__device__ __forceinline__ Eight load_eight(const f32* p) {
    const float4 a = load_fresh4(p), b = load_fresh4(p + 4);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// Sums of a piece of 16 in both planes.
__device__ __forceinline__ i32 piece_sum(const uint4& v) {
    return __dp4a((i32)v.x, 0x01010101, __dp4a((i32)v.y, 0x01010101, __dp4a((i32)v.z, 0x01010101, __dp4a((i32)v.w, 0x01010101, 0))));
}

// 16 values of a plane, in their order, to and from where they lie.
__device__ __forceinline__ void put_piece(uint4* plane, u32 piece, const uint4& v) {
    u32* const words = (u32*)plane;
    words[word_of(piece, 0)] = v.x, words[word_of(piece, 1)] = v.y, words[word_of(piece, 2)] = v.z, words[word_of(piece, 3)] = v.w;
}
__device__ __forceinline__ uint4 piece_of(const uint4* plane, u32 piece) {
    const u32* const words = (const u32*)plane;
    return {words[word_of(piece, 0)], words[word_of(piece, 1)], words[word_of(piece, 2)], words[word_of(piece, 3)]};
}

// Rounds block `block`, of which this lane holds values 8 lane to 8 lane + 7 (quant::round_block).
template <u32 K> __device__ __forceinline__ void round_block(Planes<K>& row, u32 block, const Eight& x, u32 lane) {
    u32 amax = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) amax = max(amax, magnitude(x.v[i]));
    const Rounding r = rounding(warp_max(amax), LIMIT);
    u32 hi[2] = {0, 0}, lo[2] = {0, 0};
    i32 sum = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        const i32 q = round_fixed(x.v[i], r);
        hi[i / 4] |= (u32)((PLANES == 2 ? high_plane(q) : q) & 0xff) << (i % 4 * 8);
        if constexpr (PLANES == 2) lo[i / 4] |= (u32)(q & 0xff) << (i % 4 * 8);
        sum += q;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 at = block * 64 + word_of(lane / 2, lane % 2 * 2 + i);
        ((u32*)row.hi)[at] = hi[i];
        if constexpr (PLANES == 2) ((u32*)row.lo)[at] = lo[i];
    }
    if (lane % 4 == 0) row.sum[block * 8 + lane / 4] = sum;
    if (lane == 0) row.scale[block] = r.scale;
}

// Copies a row that is in fixed point already, in two steps, so that other requests can go out between them. A thread moves
// a piece of 16 values.
template <u32 K, u32 COUNT> struct Copied {
    static constexpr u32 OWN = (K / 16 + COUNT - 1) / COUNT;
    uint4 hi[OWN], lo[PLANES == 2 ? OWN : 1], sum[OWN];
    f32 scale[OWN];

    __device__ __forceinline__ void fetch(const Fixed& from) {
#pragma unroll
        for (u32 o = 0; o < OWN; o++) {
            const u32 i = o * COUNT + threadIdx.x;
            if (i < K / 16) hi[o] = load_fresh16(from.hi + i * 16);
            if constexpr (PLANES == 2) if (i < K / 16) lo[o] = load_fresh16(from.lo + i * 16);
            if (i < K / 64) sum[o] = load_fresh16(from.sum + i * 4);
            if (i < K / 256) scale[o] = load_fresh(from.scale + i);
        }
    }

    // Not synchronised.
    __device__ __forceinline__ void store(Planes<K>& row) const {
#pragma unroll
        for (u32 o = 0; o < OWN; o++) {
            const u32 i = o * COUNT + threadIdx.x;
            if (i >= K / 16) continue;
            put_piece(row.hi, i, hi[o]);
            if constexpr (PLANES == 2) put_piece(row.lo, i, lo[o]);
            if (i < K / 64) ((int2*)row.sum)[i] = make_int2((i32)(sum[o].x + sum[o].y), (i32)(sum[o].z + sum[o].w));
            if (i < K / 256) row.scale[i] = scale[o];
        }
    }
};

// Rounds a row of floats, a warp two blocks at a time. All warps; not synchronised.
template <u32 K> __device__ __forceinline__ void round_row(Planes<K>& row, const f32* x, u32 warps) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 first = threadIdx.x / 32; first < K / 256; first += 2 * warps) {
        const u32 second = first + warps;
        const bool both = second < K / 256;
        const Eight a = load_eight(x + first * 256 + lane * 8), b = load_eight(x + (both ? second : first) * 256 + lane * 8);
        // One after the other would take twice as long as both at once: without a second one, the first again.
        round_block(row, first, a, lane);
        round_block(row, both ? second : first, b, lane);
    }
}

// A row that is normalised here.
template <u32 K> struct NormedRow {
    Planes<K> planes;
    f32 x[K];  // as it came; whoever wants the normalised values may leave them here
    f32 partial[256];
};

// The norm of a row of K and its rounding, by 16 warps: eight fetch it and sum the squares, eight round. Every block of a
// kernel does so, and what they fetch together is bound by the second-level cache: once through here, not once for each
// half of the warps (1.8% of a token).
template <u32 K> struct Norm {
    static constexpr u32 BLOCKS = K / 256, SUMMING = 8, ROUNDING = 8;
    // The weights of longer rows are fetched when they are needed.
    static constexpr bool KEEP = BLOCKS <= ROUNDING;
    Eight weight;

    // What does not depend on the step: before the wait.
    __device__ __forceinline__ void prepare(const f32* weights) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if constexpr (KEEP)
            if (warp >= SUMMING && warp - SUMMING < BLOCKS) weight = load_eight(weights + (warp - SUMMING) * 256 + lane * 8);
    }

    // As below, where nothing else is to be done.
    __device__ __forceinline__ void run(NormedRow<K>& row, const f32* x, const f32* weights) {
        run(row, x, weights, [](u32, const Eight&) {}, [] {});
    }

    // Sum of squares: partial p takes k = p (mod 256) ascending; butterfly 128, 64, ... 1. Calls each(k, values) with every
    // eight normalised values, when row.x[k..] has been read, and last() before the barrier at the end.
    template <class Each, class Last>
    __device__ __forceinline__ void run(NormedRow<K>& row, const f32* x, const f32* weights, Each&& each, Last&& last) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (warp < SUMMING) {
            f32 sum = 0.0f;
#pragma unroll 8
            for (u32 i = 0; i < BLOCKS; i++) {
                const f32 v = load_fresh(x + i * 256 + threadIdx.x);
                row.x[i * 256 + threadIdx.x] = v;
                sum = __fmaf_rn(v, v, sum);
            }
            row.partial[threadIdx.x] = sum;
        }
        __syncthreads();
        if (warp >= SUMMING) {
            // The butterfly's first three levels join the values of one lane.
            f32 s[8];
#pragma unroll
            for (u32 i = 0; i < 8; i++) s[i] = row.partial[i * 32 + lane];
#pragma unroll
            for (u32 step = 4; step > 0; step /= 2)
#pragma unroll
                for (u32 i = 0; i < step; i++) s[i] = __fadd_rn(s[i], s[i + step]);
            // A power of two divides as exactly as its inverse multiplies.
            const f32 sum = butterfly(s[0]);
            const f32 mean = (K & (K - 1)) == 0 ? __fmul_rn(sum, 1.0f / K) : __fdiv_rn(sum, (f32)K);
            const f32 r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, __int_as_float(RMS_EPS))));
            for (u32 block = warp - SUMMING; block < BLOCKS; block += ROUNDING) {
                const u32 k = block * 256 + lane * 8;
                const float4 a = *(const float4*)(row.x + k), b = *(const float4*)(row.x + k + 4);
                Eight v = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
                const Eight w = KEEP ? weight : load_eight(weights + k);
#pragma unroll
                for (u32 i = 0; i < 8; i++) v.v[i] = __fmul_rn(__fmul_rn(v.v[i], r), w.v[i]);
                each(k, v);
                round_block(row.planes, block, v, lane);
            }
        }
        last();
        __syncthreads();
    }
};
