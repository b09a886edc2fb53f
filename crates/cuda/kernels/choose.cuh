// The choice of a row's experts from its router logits: cpu::ops::softmax and cpu::ops::choose, by one warp.
//
// Lane p holds experts e = p (mod 32), so its sum is partial p of rule 2, and a butterfly 16 ... 1 adds the partials. The
// best K by value, then by lower index, a NaN below every number; weights are summed in rank order.
#pragma once
#include "arith.cuh"

// A dense model has no experts, and nobody calls this: it only has to compile.
constexpr u32 E = EXPERTS > 0 ? EXPERTS : 1, K = USED > 0 ? USED : 1;
// Experts of a lane.
constexpr u32 OWN = (E + 31) / 32;
// Up to here probabilities stay in registers; many more experts spill to local memory, slower and as right.
constexpr u32 UNROLL = OWN <= 16 ? OWN : 1;
constexpr u32 ROUNDS = K <= 16 ? K : 1;

// Order of probabilities as integers: they are no less than +0, or NaN. 0 is left for what was taken.
__device__ __forceinline__ u32 rank_key(f32 p) { return p != p ? 1 : __float_as_uint(p) + 2; }

// `logits` [E] to `experts` [K] and `weights` [K]; without weights (null), only the first `most` experts.
__device__ __forceinline__ void choose_row(const f32* logits, u32* experts, f32* weights, u32 most = K) {
    const u32 lane = threadIdx.x % 32;
    f32 p[OWN];
    const f32 none = __int_as_float(0xff800000);
    f32 max = none;
#pragma unroll UNROLL
    for (u32 i = 0; i < OWN; i++) {
        const u32 e = i * 32 + lane;
        p[i] = e < E ? load_fresh(logits + e) : none;
        max = p[i] > max ? p[i] : max;
    }
    // A maximum of numbers, NaN passed over: exact in any order (of two zeros either, which no exponential tells apart).
#pragma unroll
    for (int w = 16; w > 0; w /= 2) {
        const f32 other = __shfl_xor_sync(0xffffffffu, max, w);
        max = other > max ? other : max;
    }
    f32 sum = 0.0f;
#pragma unroll UNROLL
    for (u32 i = 0; i < OWN; i++) {
        if (i * 32 + lane < E) {
            p[i] = exp_exact(__fsub_rn(p[i], max));
            sum = __fadd_rn(sum, p[i]);
        }
    }
    const f32 total = butterfly(sum);
    // The total lies between 1 and E, or is NaN.
    bool tame = is_tame(magnitude(total));
#pragma unroll UNROLL
    for (u32 i = 0; i < OWN; i++) tame = tame && (i * 32 + lane >= E || p[i] == 0.0f || is_tame(magnitude(p[i])));
    u32 key[OWN], id[OWN];
#pragma unroll UNROLL
    for (u32 i = 0; i < OWN; i++) {
        id[i] = i * 32 + lane;
        key[i] = 0;
        if (id[i] < E) key[i] = rank_key(tame ? divide_tame(p[i], total) : __fdiv_rn(p[i], total));
    }
    // A lane's experts, the best first; only neighbours change places, so equals stay in order.
#pragma unroll UNROLL
    for (u32 end = OWN - 1; end > 0; end--)
#pragma unroll UNROLL
        for (u32 i = 0; i < end; i++) {
            const bool swap = key[i + 1] > key[i];
            const u32 k = key[i], n = id[i];
            key[i] = swap ? key[i + 1] : k, key[i + 1] = swap ? k : key[i + 1];
            id[i] = swap ? id[i + 1] : n, id[i + 1] = swap ? n : id[i + 1];
        }

    // Rank r is lane r's (mod 32). Every lane knows the winner's key, and from it the weight.
    f32 mine[(K + 31) / 32];
    f32 chosen_sum = 0.0f;
#pragma unroll ROUNDS
    for (u32 r = 0; r < K; r++) {
        if (r >= most) return;
        const u32 top = __reduce_max_sync(0xffffffffu, key[0]);
        // Of equals, the one with the lowest id.
        bool won = key[0] == top;
        const u32 equals = __ballot_sync(0xffffffffu, won);
        if (equals & (equals - 1)) {
            const u32 lowest = __reduce_min_sync(0xffffffffu, won ? id[0] : 0xffffffffu);
            won = won && id[0] == lowest;
        }
        const f32 weight = top == 1 ? __int_as_float(0x7fc00000) : __uint_as_float(top - 2);
        chosen_sum = __fadd_rn(chosen_sum, weight);
        if (won) {
            experts[r] = id[0];
#pragma unroll UNROLL
            for (u32 i = 0; i + 1 < OWN; i++) key[i] = key[i + 1], id[i] = id[i + 1];
            key[OWN - 1] = 0;
        }
        if (r % 32 == lane) mine[r / 32] = weight;
    }
    if (!weights) return;
    // 2^-14: cpu::ops::RENORMALISE_FLOOR. A NaN sum meets the floor too.
    const f32 floor = 6.103515625e-5f;
    const f32 divisor = chosen_sum > floor ? chosen_sum : floor;
#pragma unroll
    for (u32 i = 0; i < (K + 31) / 32; i++) {
        const u32 r = i * 32 + lane;
        if (r >= K) continue;
        f32 weight = mine[i];
        if constexpr (RENORMALISE) weight = __fdiv_rn(weight, divisor);
        weights[r] = __fmul_rn(weight, __int_as_float(EXPERT_SCALE));
    }
}

// Ids alone, of the first `most` of a row's experts, in half the time of choose_row; by one warp. False where that is not
// to be told from the logits: two whose probabilities may round to the same or the other way round, or no numbers.
//
// The choice is by probability, so that equals go by id. Logits within 64 of the greatest that are apart by 2^-12 have
// probabilities in the same order, and far from each other: the error of l - max is at most 2^-19, the relative errors of the
// exponential and the quotient 2^-22 each. A key has the upper bits of a logit, less than 2^-12 below it (up to 32), and the
// expert's number.
__device__ __forceinline__ bool choose_apart(const f32* logits, u32* experts, u32 most) {
    if constexpr (E > 128) return false;
    constexpr u32 ID = 127;
    const f32 APART = 4.8828125e-4f, LARGEST = 32.0f;  // 2^-11
    const u32 lane = threadIdx.x % 32;
    u32 key[OWN];
    bool clear = true;
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        const u32 e = i * 32 + lane;
        const f32 l = e < E ? load_fresh(logits + e) : 0.0f;
        clear = clear && l == l;
        const u32 bits = __float_as_uint(l);
        key[i] = e < E ? (((i32)bits < 0 ? ~bits : bits | 0x80000000u) & ~ID) | e : 0;
    }
    clear = __all_sync(0xffffffffu, clear);
#pragma unroll
    for (u32 end = OWN - 1; end > 0; end--)
#pragma unroll
        for (u32 i = 0; i < end; i++) {
            const u32 a = key[i], b = key[i + 1];
            key[i] = max(a, b), key[i + 1] = min(a, b);
        }
    f32 before = LARGEST;
#pragma unroll ROUNDS + 1
    for (u32 r = 0; r <= K; r++) {
        if (r == E || r > most) break;
        const u32 top = __reduce_max_sync(0xffffffffu, key[0]), value = top & ~ID;
        const f32 l = __uint_as_float((i32)value < 0 ? value & 0x7fffffffu : ~value);
        clear = clear && l > -LARGEST && __fsub_rn(before, l) >= APART;
        before = l;
        if (key[0] == top) {
            if (r < most) experts[r] = top & ID;
#pragma unroll
            for (u32 i = 0; i + 1 < OWN; i++) key[i] = key[i + 1];
            key[OWN - 1] = 0;
        }
    }
    return clear;
}
