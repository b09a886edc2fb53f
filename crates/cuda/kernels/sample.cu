// A token of each row of logits: engine::Sampler::sample, the same token for the same bits.
//
// Weights are integers, so every sum is exact in any order, and atomic adds are safe; maxima are. Kernels, in order:
//   adjust      grid R            penalties and biases, in place                        24 an entry, if any row has such
//   measure     grid (SLICES, R)  largest logit, smallest, what is not finite           4 V bytes a row
//   histogram   grid (SLICES, R)  tokens and weights by bins of the scaled logit        4 V, top-k or top-p only
//   collect     grid (SLICES, R)  lists the tokens of the bins that hold a border       4 V, likewise
//   threshold   grid R            the borders of top-k and top-p, exactly               the list, likewise
//   sum         grid (SLICES, R)  weight kept in each slice                             4 V, unless greedy
//   draw        grid R            the token; advances the sequence; logits are put back 4 SLICE
// Greedy needs measure and draw alone. Each leaves rows that do not need it at once, so any rows may share a launch.
#include "sample_adjust.cuh"
#include "sample_scan.cuh"

extern "C" __global__ void __launch_bounds__(ROW_THREADS) sample_adjust(Sampling s) {
    launch_dependents();
    wait_dependencies();
    adjust(s, blockIdx.x);
}

// Calls f(id, logit) for a thread's tokens of slice blockIdx.x, ids ascending.
template <typename F> __device__ __forceinline__ void each_of_slice(const f32* logits, F&& f) {
    f32 v[SLICE / SLICE_THREADS];
    const u32 first = blockIdx.x * SLICE + threadIdx.x;
#pragma unroll
    for (u32 i = 0; i < SLICE / SLICE_THREADS; i++) {
        const u32 id = first + i * SLICE_THREADS;
        if (id < VOCAB) v[i] = logits[id];
    }
#pragma unroll
    for (u32 i = 0; i < SLICE / SLICE_THREADS; i++) {
        const u32 id = first + i * SLICE_THREADS;
        if (id < VOCAB) f(id, v[i]);
    }
}

extern "C" __global__ void __launch_bounds__(SLICE_THREADS) sample_measure(Sampling s) {
    __shared__ u64 bests[SLICE_THREADS / 32];
    __shared__ u32 leasts[SLICE_THREADS / 32];
    const u32 row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    launch_dependents();
    wait_dependencies();
    Found& found = s.found[row];
    const u32 ids = s.choice[row].ids;
    u32 most = 0, id_of_most = NO_TOKEN, least = 0xffffffffu;
    each_of_slice(s.logits + (u64)row * VOCAB, [&](u32 id, f32 logit) {
        const u32 size = magnitude(logit);
        if (size >= 0x7f800000u) {
            atomicAdd(size == 0x7f800000u ? &found.infinite : &found.nan, 1u);
            atomicMin(&found.first, id);
        }
        if (id >= ids) return;
        const u32 key = key_of(logit);
        // Ids ascend: the first of equals stays.
        if (key > most) most = key, id_of_most = id;
        least = min(least, key);
    });
    const u32 warp_most = __reduce_max_sync(0xffffffffu, most);
    const u32 id = __reduce_min_sync(0xffffffffu, most == warp_most ? id_of_most : NO_TOKEN);
    const u32 warp_least = __reduce_min_sync(0xffffffffu, least);
    if (lane == 0) {
        // A warp without tokens has no id; a key is never 0 for a number.
        bests[warp] = warp_most == 0 ? 0 : (u64)warp_most << ID_BITS | (ID_MASK - id);
        leasts[warp] = warp_least;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    u64 best = bests[0];
    least = leasts[0];
    for (u32 w = 1; w < SLICE_THREADS / 32; w++) {
        best = max(best, bests[w]);
        least = min(least, leasts[w]);
    }
    atomicMax(&found.best, best);
    atomicMin(&found.least, least);
}

extern "C" __global__ void __launch_bounds__(SLICE_THREADS) sample_histogram(Sampling s) {
    // A weight in two halves: 4,096 of at most 2^16 each stay below 2^32.
    __shared__ u32 count[BINS], high[BINS], low[BINS];
    const u32 row = blockIdx.y;
    for (u32 b = threadIdx.x; b < BINS; b += SLICE_THREADS) count[b] = high[b] = low[b] = 0;
    __syncthreads();
    launch_dependents();
    wait_dependencies();
    const Choice choice = s.choice[row];
    const Found found = s.found[row];
    if (!ranks(choice, found)) return;
    const Binning binning(found, choice.inverse);
    each_of_slice(s.logits + (u64)row * VOCAB, [&](u32 id, f32 logit) {
        const f32 z = binning.z(logit);
        if (id >= choice.ids || !(z > NO_WEIGHT)) return;
        const u32 b = binning.bin(z);
        if (choice.top_k > 0) atomicAdd(&count[b], 1u);
        if (choice.top_p < 1.0f) {
            const u64 w = weight_of(z);
            atomicAdd(&high[b], (u32)(w >> 16));
            atomicAdd(&low[b], (u32)w & 0xffff);
        }
    });
    __syncthreads();
    for (u32 b = threadIdx.x; b < BINS; b += SLICE_THREADS) {
        const u64 weight = ((u64)high[b] << 16) + low[b];
        if (count[b] > 0) atomicAdd(&s.count[(u64)row * BINS + b], count[b]);
        if (weight > 0) atomicAdd(&s.weight[(u64)row * BINS + b], weight);
    }
}

// Which bins hold a border: top-k's is known. Top-p asks for a part of the weight that top-k keeps, which is known but
// for the tokens of one bin: its border lies in one of few bins, mostly in one. Top-p alone: in one.
extern "C" __global__ void __launch_bounds__(SLICE_THREADS) sample_collect(Sampling s) {
    __shared__ Scratch scratch;
    __shared__ u32 found_here, at;
    const u32 row = blockIdx.y;
    if (threadIdx.x == 0) found_here = 0;
    launch_dependents();
    wait_dependencies();
    const Choice choice = s.choice[row];
    const Found found = s.found[row];
    if (!ranks(choice, found)) return;
    const Histogram<SLICE_THREADS> histogram(s, row, scratch);
    u32 k = BINS, first = BINS, last = 0;
    if (histogram.limits(choice)) {
        k = histogram.by_count(choice.top_k, scratch).at;
        if (choice.top_p < 1.0f) {
            const Share share = histogram.weight_of_bin(k, scratch);
            first = histogram.by_weight(max(part(choice.top_p, share.before), 1ull), scratch).at;
            last = histogram.by_weight(part(choice.top_p, share.before + share.own), scratch).at;
        }
    } else if (choice.top_p < 1.0f) {
        first = last = histogram.by_weight(part(choice.top_p, histogram.weights), scratch).at;
    } else {
        return;
    }
    const Binning binning(found, choice.inverse);
    u64 hits[SLICE / SLICE_THREADS];
    u32 n = 0;
    each_of_slice(s.logits + (u64)row * VOCAB, [&](u32 id, f32 logit) {
        const f32 z = binning.z(logit);
        const u32 b = binning.bin(z);
        if (id < choice.ids && z > NO_WEIGHT && (b == k || (first <= b && b <= last))) {
            // Written so that every index is known when this is unrolled.
#pragma unroll
            for (u32 i = 0; i < SLICE / SLICE_THREADS; i++)
                if (i == n) hits[i] = rank_of(logit, id);
            n++;
        }
    });
    // The order in the list is left to chance; nothing depends on it.
    const u32 offset = n > 0 ? atomicAdd(&found_here, n) : 0;
    __syncthreads();
    if (threadIdx.x == 0 && found_here > 0) at = atomicAdd(&s.found[row].listed, found_here);
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < SLICE / SLICE_THREADS; i++) {
        const u32 to = at + offset + i;
        if (i < n && to < LISTED) s.list[(u64)row * LISTED + to] = hits[i];
    }
}

// The tokens among which borders are sought: the list, or all logits where it is too short.
struct Source {
    const Sampling& s;
    u32 row, listed, ids;

    template <typename F> __device__ __forceinline__ void each(F&& f) const {
        if (listed <= LISTED) {
            for (u32 i = threadIdx.x; i < listed; i += ROW_THREADS) f(s.list[(u64)row * LISTED + i]);
        } else {
            // Several loads on their way at a time: one block reads the row alone.
            constexpr u32 AHEAD = 8;
            const f32* logits = s.logits + (u64)row * VOCAB;
            for (u32 first = threadIdx.x; first < VOCAB; first += AHEAD * ROW_THREADS) {
                f32 v[AHEAD];
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) {
                    const u32 id = first + i * ROW_THREADS;
                    if (id < ids) v[i] = logits[id];
                }
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) {
                    const u32 id = first + i * ROW_THREADS;
                    if (id < ids) f(rank_of(v[i], id));
                }
            }
        }
    }
};

// Digits of one descent.
constexpr u32 DIGITS = ROW_THREADS;
struct Descent {
    u32 sums[3][DIGITS];  // 11 bits of a weight each: VOCAB of them stay below 2^32
    u64 low, high;
};
static_assert((u64)VOCAB << 11 < 1ull << 32, "sums of thirds of weights fit 32 bits");

// The rank, of those in bin `bin` and no lower than `floor`, at which the running sum of tokens or of weights, from the
// highest rank down, reaches `target`. The range of ranks is cut into DIGITS parts, and the part that has the border
// again, until it is one rank.
template <bool BY_WEIGHT>
__device__ u64 select(const Source& source, const Binning& binning, u32 bin, u64 floor, u64 target, Descent& d, Scratch& scratch) {
    u64 low = ~0ull, high = 0;
    const auto belongs = [&](u64 rank, f32& z) {
        z = binning.z(rank_logit(rank));
        return z > NO_WEIGHT && binning.bin(z) == bin && rank >= floor;
    };
    if (threadIdx.x == 0) d.low = ~0ull, d.high = 0;
    __syncthreads();
    source.each([&](u64 rank) {
        f32 z;
        if (belongs(rank, z)) low = min(low, rank), high = max(high, rank);
    });
#pragma unroll
    for (int w = 16; w > 0; w /= 2) {
        low = min(low, __shfl_xor_sync(0xffffffffu, low, w));
        high = max(high, __shfl_xor_sync(0xffffffffu, high, w));
    }
    if (threadIdx.x % 32 == 0 && high > 0) {
        atomicMin(&d.low, low);
        atomicMax(&d.high, high);
    }
    __syncthreads();
    low = d.low, high = d.high;
    for (;;) {
        const u64 width = high - low;
        const u32 bits = 64 - __clzll((i64)width), shift = bits > 10 ? bits - 10 : 0;
        for (u32 i = 0; i < 3; i++) d.sums[i][threadIdx.x] = 0;
        __syncthreads();
        source.each([&](u64 rank) {
            f32 z;
            if (rank < low || rank > high || !belongs(rank, z)) return;
            const u32 digit = (u32)((high - rank) >> shift);
            if constexpr (BY_WEIGHT) {
                const u64 w = weight_of(z);
                atomicAdd(&d.sums[0][digit], (u32)w & 0x7ff);
                atomicAdd(&d.sums[1][digit], (u32)(w >> 11) & 0x7ff);
                atomicAdd(&d.sums[2][digit], (u32)(w >> 22));
            } else {
                atomicAdd(&d.sums[0][digit], 1u);
            }
        });
        __syncthreads();
        u64 total, own[1] = {d.sums[0][threadIdx.x]};
        if constexpr (BY_WEIGHT) own[0] += ((u64)d.sums[1][threadIdx.x] << 11) + ((u64)d.sums[2][threadIdx.x] << 22);
        const u64 before = block_prefix<ROW_THREADS>(own[0], total, scratch);
        const Crossing border = cross(own, before, target, scratch);
        high -= (u64)border.at << shift;
        if (shift == 0) return high;
        const u64 end = high - ((1ull << shift) - 1);
        low = end > low && end <= high ? end : low;
        target -= border.before;
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS) sample_threshold(Sampling s) {
    __shared__ Scratch scratch;
    __shared__ Descent descent;
    const u32 row = blockIdx.x;
    launch_dependents();
    wait_dependencies();
    const Choice choice = s.choice[row];
    const Found found = s.found[row];
    if (!ranks(choice, found)) return;
    const Histogram<ROW_THREADS> histogram(s, row, scratch);
    // Nobody reads the bins after this: they are left as the next draw wants them.
    for (u32 b = threadIdx.x; b < BINS; b += ROW_THREADS) {
        s.count[(u64)row * BINS + b] = 0;
        s.weight[(u64)row * BINS + b] = 0;
    }
    const Binning binning(found, choice.inverse);
    const Source source = {s, row, found.listed, choice.ids};
    const bool limited = histogram.limits(choice);
    u64 threshold = 0, total = histogram.weights;
    if (limited) {
        const Crossing k = histogram.by_count(choice.top_k, scratch);
        threshold = select<false>(source, binning, k.at, 0, choice.top_k - k.before, descent, scratch);
        u64 kept = 0;
        source.each([&](u64 rank) {
            const f32 z = binning.z(rank_logit(rank));
            if (rank >= threshold && binning.bin(z) == k.at) kept += weight_of(z);
        });
        const u64 before = histogram.weight_of_bin(k.at, scratch).before;
        total = before + block_sum<ROW_THREADS>(kept, scratch);
    }
    if (choice.top_p < 1.0f) {
        const u64 needed = part(choice.top_p, total);
        const Crossing p = histogram.by_weight(needed, scratch);
        threshold = select<true>(source, binning, p.at, threshold, needed - p.before, descent, scratch);
    }
    if (threadIdx.x == 0) s.found[row].threshold = threshold;
}

// The weight of a token, 0 unless it is kept.
__device__ __forceinline__ u64 kept_weight(const Choice& choice, const Found& found, u64 least, f32 logit, u32 id) {
    if (id >= choice.ids || rank_of(logit, id) < found.threshold) return 0;
    const u64 w = weight_of(scaled(logit, rank_logit(found.best), choice.inverse));
    return w >= least ? w : 0;
}

extern "C" __global__ void __launch_bounds__(SLICE_THREADS) sample_sum(Sampling s) {
    __shared__ Scratch scratch;
    const u32 row = blockIdx.y;
    launch_dependents();
    wait_dependencies();
    const Choice choice = s.choice[row];
    const Found found = s.found[row];
    if (!draws(choice, found)) return;
    const u64 least = least_weight(choice);
    u64 sum = 0;
    each_of_slice(s.logits + (u64)row * VOCAB, [&](u32 id, f32 logit) { sum += kept_weight(choice, found, least, logit, id); });
    sum = block_sum<SLICE_THREADS>(sum, scratch);
    if (threadIdx.x == 0) s.sums[(u64)row * SLICES + blockIdx.x] = sum;
}

// The first id at which the running sum of weights exceeds floor(bits * total / 2^64): slice by slice, then inside one.
__device__ u32 draw_token(const Sampling& s, u32 row, const Choice& choice, const Found& found, Scratch& scratch) {
    u64 total, own[1] = {threadIdx.x < SLICES ? s.sums[(u64)row * SLICES + threadIdx.x] : 0};
    const u64 before = block_prefix<ROW_THREADS>(own[0], total, scratch);
    const u64 target = __umul64hi(bits_at(choice.seed, choice.position), total) + 1;
    const Crossing slice = cross(own, before, target, scratch);

    constexpr u32 PER = SLICE / ROW_THREADS;
    const u32 first = slice.at * SLICE + threadIdx.x * PER;
    const u64 least = least_weight(choice);
    u64 weights[PER], sum = 0, of_slice;
#pragma unroll
    for (u32 i = 0; i < PER; i++) {
        const u32 id = first + i;
        weights[i] = id < VOCAB ? kept_weight(choice, found, least, s.logits[(u64)row * VOCAB + id], id) : 0;
        sum += weights[i];
    }
    const u64 upto = block_prefix<ROW_THREADS>(sum, of_slice, scratch);
    return slice.at * SLICE + cross(weights, upto, target - slice.before, scratch).at;
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS) sample_draw(Sampling s, Feed feed) {
    __shared__ Scratch scratch;
    __shared__ u32 known;
    if (threadIdx.x == 0) known = 0;
    const u32 row = blockIdx.x;
    launch_dependents();
    wait_dependencies();
    const Choice choice = s.choice[row];
    const Found found = s.found[row];
    u32 token = is_finite(found) ? rank_id(found.best) : NO_TOKEN;
    if (draws(choice, found)) token = draw_token(s, row, choice, found, scratch);
    // Every thread has read the row's choice, what was found and the logits, which now change.
    __syncthreads();
    if (s.adjustment) remember(s, row, token, known);
    if (threadIdx.x > 0) return;

    Drawn* drawn = &s.ring[(u64)(choice.number % RING) * s.rows + row];
    drawn->nan = found.nan;
    drawn->infinite = found.infinite;
    drawn->first = found.first;
    __threadfence_system();
    *(volatile u64*)&drawn->tagged = (u64)(choice.number + 1) << 32 | token;

    if (feed.token) {
        const u32 t = feed.wanted[row];
        // The host learns of a row without a token a step late; until then its step needs some valid one.
        feed.token[t] = token == NO_TOKEN ? 0 : token;
        feed.position[t] = (u32)choice.position;
    }
    s.choice[row].position = choice.position + 1;
    s.choice[row].number = choice.number + 1;
    Found next = {};
    next.least = next.first = 0xffffffffu;
    s.found[row] = next;
}
