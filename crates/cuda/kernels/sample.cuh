// What the kernels of sample.cu share: their structures, the order of tokens, weights as integers, random bits. The rule
// is engine::sampler's; the twins are named at each function.
#pragma once
#include "arith.cuh"

// How the next token of a sequence is chosen, and where it stands.
struct Choice {
    u64 seed;
    u64 position;  // of the token to choose
    f32 inverse;   // 1 / temperature; 0 is greedy
    u32 top_k;     // 0: all
    f32 top_p;     // 1: all
    f32 min_p;     // 0: all
    u32 number;    // of the draw, counted by the host
    u32 ids;       // those below may be chosen, at most VOCAB: a head may have more rows than tokens
};

// What is found out about a row of logits on the way. `draw` puts everything back to how the first kernel wants it.
struct Found {
    u64 best;       // rank of the likeliest token; 0 at first
    u64 threshold;  // rank of the last token kept by top-k and top-p; 0 keeps all
    u32 least;      // key of the smallest logit; ~0 at first
    u32 nan;
    u32 infinite;
    u32 first;      // lowest id of a logit that is not finite; ~0 at first
    u32 listed;     // tokens in bins that hold or may hold a border
    u32 unused;
};

// What the host reads, in its own memory.
struct Drawn {
    u64 tagged;  // (number + 1) << 32 | token; written last
    u32 nan, infinite, first;
    u32 unused;
};

// No token: logits were not finite.
constexpr u32 NO_TOKEN = 0xffffffffu;

// Logits that a block of threads looks at, and such slices to a row.
constexpr u32 SLICE_THREADS = 512;
constexpr u32 SLICE = 8 * SLICE_THREADS;
constexpr u32 SLICES = (VOCAB + SLICE - 1) / SLICE;
// Threads of the kernels that have a block a row.
constexpr u32 ROW_THREADS = 1024;
static_assert(SLICES <= ROW_THREADS, "a row's slices are summed by one thread each");
// Bins of the first histogram.
constexpr u32 BINS = 1024;
// Tokens that the list of a row holds; if more share the bins of a border, all logits are read instead.
constexpr u32 LISTED = 8192;
// Draws that the host may be behind.
constexpr u32 RING = 8;

// What changes a row's logits before a choice (sample_adjust.cuh).
struct Adjustment {
    f32 repeat, presence, frequency;
    u32 window;   // tokens that penalties look at; 0 where nothing leaves their sight
    u32 first;    // its first entry, and its place in `recent`
    u32 entries;  // those that there are
    u32 seen;     // tokens that went into the history since the beginning
    u32 counts;   // whether choices go into it: there are penalties
};

// A token that is biased or was in a row's history.
struct Entry {
    u32 id;
    u32 count;  // how often penalties see it
    f32 bias;
    f32 raw;    // its logit as the model gave it, from `adjust` to `remember`
};

// Device memory of `rows` rows.
struct Sampling {
    f32* logits;             // [R][V]
    Choice* choice;          // [R]
    Found* found;            // [R]
    u32* count;              // [R][BINS], zeros between draws
    u64* weight;             // [R][BINS], zeros between draws
    u64* list;               // [R][LISTED]: ranks
    u64* sums;               // [R][SLICES]: weights kept in a slice
    Drawn* ring;             // [RING][rows], host memory
    Adjustment* adjustment;  // [R]; null where no row has one
    Entry* entries;          // of all rows
    u32* recent;             // of all rows: the window, a ring, where it is shorter than the history
    u32 rows;                // of the ring
};

// The step that the chosen tokens go to; null pointers where they go nowhere.
struct Feed {
    u32* token;         // [T]
    u32* position;      // [T]
    const u32* wanted;  // [R]: which row of the step a row of logits is
};

// --- the order (engine::Candidate::rank): by logit, then by lower id, as one integer: larger is earlier ---

constexpr u32 id_bits() {
    u32 bits = 1;
    while ((1ull << bits) < VOCAB) bits++;
    return bits;
}
constexpr u32 ID_BITS = id_bits();
constexpr u32 ID_MASK = (u32)((1ull << ID_BITS) - 1);

// Finite logits in ascending order; -0 is +0.
__device__ __forceinline__ u32 key_of(f32 logit) {
    const u32 bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ f32 logit_of(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ u64 rank_of(f32 logit, u32 id) { return (u64)key_of(logit) << ID_BITS | (ID_MASK - id); }
__device__ __forceinline__ u32 rank_id(u64 rank) { return ID_MASK - ((u32)rank & ID_MASK); }
__device__ __forceinline__ f32 rank_logit(u64 rank) { return logit_of((u32)(rank >> ID_BITS)); }

// --- weights (engine::sampler::near, weigh_each) ---

// The logit less the largest, divided by the temperature.
__device__ __forceinline__ f32 scaled(f32 logit, f32 max, f32 inverse) { return __fmul_rn(__fsub_rn(logit, max), inverse); }

// At or below, a weight rounds to 0, and top-k does not count the token.
constexpr f32 NO_WEIGHT = -23.0f;

// rint(exp(z) * 2^32): the product is exact, the conversion rounds to nearest, ties to even.
__device__ __forceinline__ u64 weight_of(f32 z) { return __float2ull_rn(__fmul_rn(exp_exact(z), 4294967296.0f)); }

// Bins of [0, -range] from the likeliest down. Any falling function of z would do: the result does not depend on it.
struct Binning {
    f32 max, inverse, scale;

    __device__ __forceinline__ Binning(const Found& found, f32 inverse) : max(rank_logit(found.best)), inverse(inverse) {
        const f32 lowest = scaled(logit_of(found.least), max, inverse);
        const f32 range = lowest < NO_WEIGHT ? -NO_WEIGHT : -lowest;
        scale = range > 1e-30f ? __fdiv_rn((f32)(BINS - 1), range) : 0.0f;
    }
    __device__ __forceinline__ f32 z(f32 logit) const { return scaled(logit, max, inverse); }
    __device__ __forceinline__ u32 bin(f32 z) const { return min(BINS - 1, __float2uint_rz(__fmul_rn(-z, scale))); }
};

// ceil(fraction * whole) without rounding, for a fraction from 0 to 1 (engine::sampler::part).
__device__ inline u64 part(f32 fraction, u64 whole) {
    const u32 bits = __float_as_uint(fraction) & 0x7fffffu, exponent = __float_as_uint(fraction) >> 23;
    const u64 mantissa = exponent == 0 ? bits : bits | 0x800000u;
    const u32 shift = 150 - max(exponent, 1u);
    const u64 low = mantissa * whole, high = __umul64hi(mantissa, whole);
    if (shift >= 128) return (low | high) != 0;
    if (shift >= 64) {
        const u32 rest = shift - 64;
        const u64 below = high & ((1ull << rest) - 1);
        return (high >> rest) + ((below | low) != 0);
    }
    // A fraction of 1 has shift 23; 0 < shift.
    return (high << (64 - shift) | low >> shift) + ((low & ((1ull << shift) - 1)) != 0);
}

// The weight that min-p asks for; the likeliest token has 2^32.
__device__ __forceinline__ u64 least_weight(const Choice& choice) { return choice.min_p > 0.0f ? part(choice.min_p, 1ull << 32) : 0; }

// --- random bits (engine::rng::bits_at): Philox4x32-10, Salmon et al., SC 2011 ---
__device__ inline u64 bits_at(u64 seed, u64 position) {
    u32 c0 = (u32)position, c1 = (u32)(position >> 32), c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const u32 low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
        const u32 low1 = 0xCD9E8D57u * c2, high1 = __umulhi(0xCD9E8D57u, c2);
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (u64)c1 << 32 | c0;
}

// --- which rows a kernel has work for ---

__device__ __forceinline__ bool is_finite(const Found& found) { return (found.nan | found.infinite) == 0; }
__device__ __forceinline__ bool draws(const Choice& choice, const Found& found) { return choice.inverse != 0.0f && is_finite(found); }
__device__ __forceinline__ bool ranks(const Choice& choice, const Found& found) {
    return draws(choice, found) && (choice.top_k > 0 || choice.top_p < 1.0f);
}
