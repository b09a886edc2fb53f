// Attention of few rows over deep contexts: a span to a group of four warps, which takes its tiles one after the other from
// a ring of its own, so that as much is under way as shared memory holds, and no group waits for another.
//
// Within a group, as in attend_span.cuh: a warp has 16 of a tile's keys for the scores and a quarter of the dimensions for
// the values. The span's results stay in registers; order of reductions is the same. Units of a ring: a tile's keys with its
// scales, then its values. The group's two barriers of a tile tell which units everyone has left.
#pragma once
#include "attend_span.cuh"
#include "ring.cuh"

constexpr u32 GROUPS = THREADS / 32 / PARTS;
constexpr u32 DEEP_STAGES = 3, DEEP_STAGE = VALUES_AT;
// After `Shared`: rings, then their barriers. The host says by the size of shared memory whether there is room.
constexpr u32 RINGS_AT = (sizeof(Shared) + 127) / 128 * 128, FULL_AT = RINGS_AT + GROUPS * DEEP_STAGES * DEEP_STAGE;
constexpr u32 DEEP_BYTES = FULL_AT + GROUPS * DEEP_STAGES * 8;

// Blocks that take part: so many that all items of a block are of one unit.
__device__ __forceinline__ u32 deep_grid() { return gridDim.x / UNITS * UNITS; }

// The n-th item of the thread's group, over all blocks.
__device__ __forceinline__ u32 group_index(u32 n) {
    return blockIdx.x < deep_grid() ? blockIdx.x + (threadIdx.x / 32 / PARTS + n * GROUPS) * deep_grid() : 0xffffffffu;
}

// Queries of a group, where each has its own.
__device__ __forceinline__ uint4 (*group_queries())[KEY_CHUNKS][32] {
    return (uint4(*)[KEY_CHUNKS][32])(shared_items().tile[threadIdx.x / 32 / PARTS] + WIDE * SCORE_ROW);
}

// Makes the barriers, if there is room for rings; before anything else.
__device__ __forceinline__ bool begin_deep() {
    if (dynamic_shared_bytes() < DEEP_BYTES || gridDim.x < UNITS) return false;
    u64* const full = (u64*)(dynamic_shared<u8>() + FULL_AT);
    if (threadIdx.x < GROUPS * DEEP_STAGES) mbarrier_init(full + threadIdx.x, FULL_ARRIVALS);
    mbarrier_fence();
    __syncthreads();
    return true;
}

// A group's ring, and where the copies into it stand; one warp's.
template <class Items> struct Stream {
    const Items& items;
    const u8* layer;
    u8* ring;
    u64* full;
    u32 n, issued, unit;  // item, units over all items, of this item
    Item item;
    u32 block;            // lane t: of tile t
    bool live;

    __device__ __forceinline__ void begin(u32 which) {
        n = which, unit = 0;
        live = items.item(n, item);
        if (live && threadIdx.x % 32 < item.tiles()) block = items.table(item)[item.span * SPAN_TILES + threadIdx.x % 32];
    }
    // Copies units as long as fewer than `end` were.
    __device__ __forceinline__ void issue(u32 end) {
        while (live && issued < end) {
            const u8* const tile = tile_at(layer, __shfl_sync(0xffffffffu, block, unit / 2), item.unit / SLICES);
            const u32 stage = issued % DEEP_STAGES;
            const bool values = unit % 2;
            copy_stage<true>(ring + stage * DEEP_STAGE, tile + (values ? VALUES_AT : KEYS_AT), values ? TILE_BYTES - VALUES_AT : VALUES_AT, full + stage);
            issued++;
            if (++unit == 2 * item.tiles()) begin(n + 1);
        }
    }
};

// What a group's span adds up to: a thread's two heads of each octet, and four values of each of its slabs.
struct Sum {
    f32 exponent[OCTETS][2], sum[OCTETS][2];
    f32 out[OCTETS][OWN_SLABS][4];
};

// The warp's dimensions of the weighted values of a tile join the span.
__device__ __forceinline__ void join_tile(Sum& sum, const Values& values) {
    const Shared& s = shared_items();
    const u32 lane = threadIdx.x % 32, group = threadIdx.x / 32 / PARTS, part = threadIdx.x / 32 % PARTS;
#pragma unroll
    for (u32 n = 0; n < OCTETS; n++) {
        Factors f[2];
        f32 scale[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 head = n * 8 + fragment_quad() * 2 + i;
            f[i] = meet(sum.exponent[n][i], s.exponent[group][head]);
            sum.sum[n][i] = merge(sum.sum[n][i], s.sum[group][head], f[i]);
            scale[i] = s.scale[group][head];
        }
        uint4 w[VALUE_CHUNKS];
#pragma unroll
        for (u32 h = 0; h < VALUE_CHUNKS; h++) w[h] = s.weights[group][h][n][lane];
#pragma unroll
        for (u32 i = 0; i < OWN_SLABS; i++) {
            if (i * PARTS + part >= SLABS) continue;
            i32 hh[4] = {}, hl[4] = {}, lh[4] = {};
#pragma unroll
            for (u32 h = 0; h < VALUE_CHUNKS; h++) {
                mma_k32<true>(hh, values.hi[i].word[h], w[h].x, w[h].y);
                mma_k32<true>(hl, values.hi[i].word[h], w[h].z, w[h].w);
                mma_k32<true>(lh, values.lo[i].word[h], w[h].x, w[h].y);
            }
#pragma unroll
            for (u32 c = 0; c < 4; c++)
                sum.out[n][i][c] = merge(sum.out[n][i][c], __fmul_rn(join_exact(hh[c], hl[c] + lh[c]), scale[c % 2]), f[c % 2]);
        }
    }
}

// Leaves a span in `partial`.
__device__ __forceinline__ void store_sum(const Sum& sum, u32 heads, f32* partial) {
    const u32 part = threadIdx.x / 32 % PARTS;
#pragma unroll
    for (u32 n = 0; n < OCTETS; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            const u32 head = n * 8 + fragment_quad() * 2 + c % 2;
            if (head >= heads) continue;
#pragma unroll
            for (u32 i = 0; i < OWN_SLABS; i++)
                if (i * PARTS + part < SLABS) partial[head * HEAD_DIM + (i * PARTS + part) * 16 + c / 2 * 8 + fragment_row()] = sum.out[n][i][c];
            if (c < 2 && part == 0 && fragment_row() == 0) {
                partial[WIDE * HEAD_DIM + head] = sum.exponent[n][c];
                partial[WIDE * HEAD_DIM + 16 + head] = sum.sum[n][c];
            }
        }
}

// All items of the group. `items` says which there are, what the queries are, and which tile lacks the row's own key;
// `partial` where a span goes, `counter` where it is counted.
template <class Items, class Partial, class Counter>
__device__ __forceinline__ void attend_deep(Items& items, const u8* layer, const Partial& partial, const Counter& counter) {
    const Shared& s = shared_items();
    const u32 lane = threadIdx.x % 32, group = threadIdx.x / 32 / PARTS, part = threadIdx.x / 32 % PARTS;
    u8* const ring = dynamic_shared<u8>() + RINGS_AT + group * DEEP_STAGES * DEEP_STAGE;
    u64* const full = (u64*)(dynamic_shared<u8>() + FULL_AT) + group * DEEP_STAGES;
    const auto meet_group = [&] { barrier_sync(1 + group, PARTS * 32); };
    Stream<Items> stream = {items, layer, ring, full, 0, 0, 0, {}, 0, false};
    if (part == 0) {
        stream.begin(0);
        stream.issue(DEEP_STAGES);
    }
    u32 taken = 0;
    const auto wait = [&](u32 unit) {
        mbarrier_wait(full + unit % DEEP_STAGES, unit / DEEP_STAGES & 1);
        return ring + unit % DEEP_STAGES * DEEP_STAGE;
    };
    Item item;
    if (items.item(0, item)) items.ask(item);
    for (u32 n = 0; items.item(n, item); n++) {
        items.prepare(item);
        Item next;
        if (items.item(n + 1, next)) items.ask(next);
        Sum sum = {};
#pragma unroll
        for (u32 i = 0; i < 2 * OCTETS; i++) sum.exponent[i / 2][i % 2] = FLOOR;
        for (u32 tile = 0; tile < item.tiles(); tile++) {
            const bool own = items.own(item, tile);
            u8* unit = wait(taken);
            if (own) {
                if (part == 0) items.put_key(unit);
                meet_group();
            }
            Keys keys;
            Values values;
            keys.template load<true>(unit);
            const f32* const scales = (const f32*)(unit + SCALES_AT) + BLOCK;
            const f32 value_scale[2] = {scales[lane], scales[lane + 32]};
            score(keys, items.queries(), items.query_scale());
            meet_group();
            if (part == 0) stream.issue(taken + 1 + DEEP_STAGES);
            weigh(value_scale, heads_of(item.unit), item.keys - tile * BLOCK);
            unit = wait(taken + 1);
            if (own && part == 0) items.put_value(unit);
            meet_group();
            values.template load_planes<true>(unit);
            join_tile(sum, values);
            taken += 2;
        }
        store_sum(sum, heads_of(item.unit), partial(item.row, item.unit, item.span));
        meet_group();
        if (part == 0 && lane == 0) count_release(counter(item));
    }
}
