// Penalties and biases of a row's logits before a choice, and the history that they look at, which every choice goes into:
// engine::SamplerParams::adjust, operation for operation. A row's entries are its distinct tokens, so what it costs grows
// with the history and not with the vocabulary: 24 bytes an entry before the choice, and as many after it.
#pragma once
#include "sample.cuh"

// Most and least that an adjusted logit may be.
__device__ __forceinline__ f32 finite(f32 x) { return clamp_range(x, -3.40282347e38f, 3.40282347e38f); }

__device__ __forceinline__ f32 adjusted(f32 logit, const Adjustment& a, const Entry& e) {
    if (e.count > 0) {
        const f32 repeated = logit > 0.0f ? __fdiv_rn(logit, a.repeat) : __fmul_rn(logit, a.repeat);
        logit = finite(__fsub_rn(finite(repeated), finite(__fmul_rn((f32)e.count, a.frequency))));
        logit = finite(__fsub_rn(logit, a.presence));
    }
    // Of a token without a bias it is 0, which changes no number but the sign of a zero: that has no meaning here.
    return finite(__fadd_rn(logit, e.bias));
}

// Adjusts the logits of `row` where they lie, and keeps what they were.
__device__ inline void adjust(const Sampling& s, u32 row) {
    const Adjustment a = s.adjustment[row];
    f32* logits = s.logits + (u64)row * VOCAB;
    for (u32 i = threadIdx.x; i < a.entries; i += ROW_THREADS) {
        Entry& e = s.entries[a.first + i];
        e.raw = logits[e.id];
        // What is no number is left so, for `measure` to find.
        if (magnitude(e.raw) < 0x7f800000u) logits[e.id] = adjusted(e.raw, a, e);
    }
}

// Puts the logits of `row` back to what the model gave, and `token` into the row's history. All threads of a block call it,
// when nobody reads these logits any more; `known` is shared and 0.
__device__ inline void remember(const Sampling& s, u32 row, u32 token, u32& known) {
    Adjustment& state = s.adjustment[row];
    const Adjustment a = state;
    f32* logits = s.logits + (u64)row * VOCAB;
    const bool counts = a.counts && token != NO_TOKEN;
    // Where it goes, and whose place it takes: the window's oldest.
    u32* slot = counts && a.window > 0 ? s.recent + a.first + a.seen % a.window : nullptr;
    const u32 entering = counts ? token : NO_TOKEN;
    const u32 leaving = slot && a.seen >= a.window ? *slot : NO_TOKEN;
    for (u32 i = threadIdx.x; i < a.entries; i += ROW_THREADS) {
        Entry& e = s.entries[a.first + i];
        logits[e.id] = e.raw;
        if (e.id == entering) e.count += 1, known = 1;
        if (e.id == leaving) e.count -= 1;
    }
    __syncthreads();
    if (threadIdx.x > 0 || !counts) return;
    if (!known) {
        s.entries[a.first + a.entries] = {token, 1, 0.0f, 0.0f};
        state.entries = a.entries + 1;
    }
    if (slot) *slot = token;
    state.seen = a.seen + 1;
}
