// Decode of one row, from the projections to the attention's result: rope_store and attend of one row in one launch.
//
// q [H][HD], k and v [KH][HD] as projected; attn [H][HD], and the same in fixed point; the row's key and value go into the
// cache. Items, jobs, orders of reductions and the grid are those of attend_split.cu; with one row, which items a block has
// follows from the number of spans alone. A block norms, rotates and rounds the query heads of its unit by itself, and the
// row's own key and value as well: whoever attends to the last span takes them from shared memory, since what is in the
// cache there may be anything, and stores them. So no block waits for another before the merge.
#include "attend_deep.cuh"
#include "head.cuh"

constexpr u32 KEY_WARP = 14, VALUE_WARP = 15;
constexpr u32 PAIRS = (OWN + 1) / 2;  // of a rotation, in a lane
// What the host may launch: pairs of a rotation within a lane, two warps without a query.
// Loads ahead of their item are for who has no room for rings (attend_deep.cuh), which are to be had where they matter.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr bool AHEAD = false;
#else
constexpr bool AHEAD = PREFETCH;
#endif
constexpr bool FUSABLE = HEAD_DIM % 64 == 0 && GROUP <= KEY_WARP;

// What a warp makes of a unit: a query head, the KV head's key, or its value.
struct Role {
    const f32* from;  // null: nothing
    const f32* norm;  // null: neither norm nor rotation

    __device__ __forceinline__ Role(u32 unit, const f32* q, const f32* k, const f32* v, const f32* q_norm, const f32* k_norm) {
        const u32 warp = threadIdx.x / 32;
        from = warp < WIDE ? q + (first_head(unit) + warp) * HEAD_DIM
               : warp == KEY_WARP ? k + unit * HEAD_DIM
               : warp == VALUE_WARP ? v + unit * HEAD_DIM : nullptr;
        norm = warp < WIDE ? q_norm : warp == KEY_WARP ? k_norm : nullptr;
    }
};

// Norm and rotation of the warp's row.
__device__ __forceinline__ void turn_head(f32 (&x)[OWN], const f32 (&weight)[OWN], const float2 (&turn)[PAIRS]) {
    if (threadIdx.x / 32 >= WIDE && threadIdx.x / 32 != KEY_WARP) return;
    normalise(x, weight);
#pragma unroll
    for (u32 i = 0; i < OWN / 2; i++) rotate(x[i], x[i + OWN / 2], turn[i]);
}

// Fixed point of the warp's row, to where the products look for it.
__device__ __forceinline__ void round_own(const f32 (&x)[OWN], f32 score_scale) {
    Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= WIDE && warp < KEY_WARP) return;
    const Rounding r = round_head(x);
    if (lane == 0) {
        if (warp < WIDE) s.query_scale[0][warp] = __fmul_rn(r.scale, score_scale);
        else s.fresh_scale[warp - KEY_WARP] = r.scale;
    }
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        const u32 d = i * 32 + lane;
        const i32 n = round_fixed(x[i], r);
        u8* to;
        if (warp < WIDE) {
            const Place at = step_of<KEY_CHUNKS>(d);
            to = (u8*)&s.queries[warp / 8][at.step][warp % 8 * 4 + at.quad] + at.word * 4 + d % 4;
        } else {
            to = (u8*)s.fresh[(warp - KEY_WARP) * 2] + d;
        }
        to[0] = (u8)high_plane(n);
        to[warp < WIDE ? 8 : HEAD_DIM] = (u8)n;
    }
}

// Puts the row's own key, at `slot` of the tile, in the place of what came from the cache.
__device__ __forceinline__ void patch(Keys& keys, u32 slot) {
    const Shared& s = shared_items();
    const u32 part = threadIdx.x / 32 % PARTS, quad = fragment_quad(), half = slot % 16 / 8;
    if (slot / 16 != part || slot % 8 != fragment_row()) return;
    keys.scale[0] = half ? keys.scale[0] : s.fresh_scale[0];
    keys.scale[1] = half ? s.fresh_scale[0] : keys.scale[1];
#pragma unroll
    for (u32 k = 0; k < KEY_CHUNKS; k += 2) {
        const uint4 hi = s.fresh[0][k * 2 + quad], lo = s.fresh[1][k * 2 + quad];
        const u32 high[4] = {hi.x, hi.y, hi.z, hi.w}, low[4] = {lo.x, lo.y, lo.z, lo.w};
#pragma unroll
        for (u32 w = 0; w < 4; w++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                u32 &own_high = keys.hi.word[k + w / 2][w % 2 * 2 + r], &own_low = keys.lo.word[k + w / 2][w % 2 * 2 + r];
                own_high = r == half ? high[w] : own_high;
                own_low = r == half ? low[w] : own_low;
            }
    }
}

// The same for its value: one byte of every dimension.
__device__ __forceinline__ void patch(Values& values, u32 slot) {
    const Shared& s = shared_items();
    const u32 lane = threadIdx.x % 32, part = threadIdx.x / 32 % PARTS, place = place_of_key(slot);
    if (slot % 32 == lane) {
        values.scale[0] = slot < 32 ? s.fresh_scale[1] : values.scale[0];
        values.scale[1] = slot < 32 ? values.scale[1] : s.fresh_scale[1];
    }
    if (place / 16 != fragment_quad()) return;
    const u32 select = (0x3210u & ~(0xfu << place % 4 * 4)) | 4u << place % 4 * 4;
#pragma unroll
    for (u32 i = 0; i < OWN_SLABS; i++) {
        if (i * PARTS + part >= SLABS) continue;
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u32 d = (i * PARTS + part) * 16 + r * 8 + fragment_row();
            const u32 hi = ((const u8*)s.fresh[2])[d], lo = ((const u8*)s.fresh[3])[d];
#pragma unroll
            for (u32 w = 0; w < 4; w++) {
                u32 &high = values.hi[i].word[w / 2][w % 2 * 2 + r], &low = values.lo[i].word[w / 2][w % 2 * 2 + r];
                high = __byte_perm(high, hi, place % 16 / 4 == w ? select : 0x3210u);
                low = __byte_perm(low, lo, place % 16 / 4 == w ? select : 0x3210u);
            }
        }
    }
}

// Stores the row's own key and value, by one warp each.
__device__ __forceinline__ void store(u8* tile, u32 slot) {
    const Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < KEY_WARP) return;
    if (lane == 0) ((f32*)(tile + SCALES_AT))[(warp - KEY_WARP) * BLOCK + slot] = s.fresh_scale[warp - KEY_WARP];
    const u8* const from = (const u8*)s.fresh[(warp - KEY_WARP) * 2];
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        const u32 d = i * 32 + lane;
        u8* const to = tile + (warp == KEY_WARP ? key_at(slot, d) : value_at(slot, d));
        to[0] = from[d];
        to[PLANE_BYTES] = from[HEAD_DIM + d];
    }
}

// The items of a group of warps when the context is deep; all of the block's have one unit.
struct OneItems {
    const u32* own_table;
    u32 position, items;

    __device__ __forceinline__ bool item(u32 n, Item& item) const {
        const u32 index = group_index(n);
        item.row = 0;
        item.unit = index % UNITS;
        item.span = index / UNITS;
        item.spans = position / SPAN + 1;
        item.keys = min(position + 1 - item.span * SPAN, SPAN);
        return index < items;
    }
    __device__ __forceinline__ const u32* table(const Item&) const { return own_table; }
    __device__ __forceinline__ void ask(const Item&) {}
    __device__ __forceinline__ void prepare(const Item&) const {}
    __device__ __forceinline__ uint4 (*queries() const)[KEY_CHUNKS][32] { return shared_items().queries; }
    __device__ __forceinline__ const f32* query_scale() const { return shared_items().query_scale[0]; }
    // Whether the row's own key is in this tile.
    __device__ __forceinline__ bool own(const Item& item, u32 tile) const { return item.span * SPAN_TILES + tile == position / BLOCK; }
    // Puts the row's own key, or value, and both scales, into a tile's, by a warp.
    __device__ __forceinline__ void put_key(u8* keys) const {
        const Shared& s = shared_items();
        const u32 lane = threadIdx.x % 32, slot = position % BLOCK;
        if (lane < 2) ((f32*)(keys + SCALES_AT))[lane * BLOCK + slot] = s.fresh_scale[lane];
#pragma unroll
        for (u32 i = 0; i < OWN; i++) put(keys + key_at(slot, i * 32 + lane), s.fresh[0], i * 32 + lane);
        mbarrier_fence();  // the next copy to this place shall come after
    }
    __device__ __forceinline__ void put_value(u8* values) const {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 i = 0; i < OWN; i++) put(values + value_at(position % BLOCK, i * 32 + lane) - VALUES_AT, shared_items().fresh[2], i * 32 + lane);
        mbarrier_fence();
    }
    __device__ __forceinline__ static void put(u8* to, const uint4* planes, u32 d) {
        to[0] = ((const u8*)planes)[d];
        to[PLANE_BYTES] = ((const u8*)planes)[HEAD_DIM + d];
    }
};

// `scratch` and `counters` as in attend_split.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend_one(const f32* q, const f32* k, const f32* v, const f32* q_norm, const f32* k_norm, const f32* rope, u8* layer, Step step,
           f32 score_scale, f32* attn, Fixed fixed, f32* scratch, u32* counters) {
    require_shared(SHARED_BYTES);
    if constexpr (!FUSABLE) {
        wait_dependencies();
        __trap();
    } else {
        Shared& s = shared_items();
        const u32 lane = threadIdx.x % 32, tile_of_span = threadIdx.x / 32 / PARTS;
        u32 index = blockIdx.x, unit = index % UNITS;
        Role role(unit, q, k, v, q_norm, k_norm);
        f32 x[OWN], weight[OWN];
#pragma unroll
        for (u32 i = 0; i < OWN; i++) weight[i] = role.norm ? role.norm[i * 32 + lane] : 0.0f;
        const bool can_go_deep = begin_deep();
        wait_dependencies();
        launch_dependents();
        // A warp knows the blocks of its tile of the next 32 items, a lane an item. The first ones are asked for at once, as if
        // the row's table was the first.
        const auto tile_of = [&](u32 index) { return (index + lane * gridDim.x) / UNITS * SPAN_TILES + tile_of_span; };
        u32 known = tile_of(index) < step.stride ? step.tables[tile_of(index)] : 0;
        const u32 position = step.position[0], sequence = step.sequence[0];
        const u32* const table = step.tables + (u64)sequence * step.stride;
        const u32 spans = position / SPAN + 1, items = spans * UNITS, slot = position % BLOCK;
        const auto partial = [&](u32 unit, u32 span) { return scratch + ((u64)unit * ((step.stride + SPAN_TILES - 1) / SPAN_TILES) + span) * PARTIAL; };
        const auto know = [&](u32 index) {
            if (tile_of(index) <= position / BLOCK) known = table[tile_of(index)];
        };
        const auto own_tile = [&](u32 index, u32 k) {
            const u32 block = __shfl_sync(0xffffffffu, known, k % 32);
            return index / UNITS * SPAN_TILES + tile_of_span <= position / BLOCK ? (u8*)tile_at(layer, block, index % UNITS) : nullptr;
        };

        Keys keys;
        Values values;
        float2 turn[PAIRS];
        u8* tile = nullptr;
        // Before tiles are asked for: who waits for one load may have to wait for all that were asked for with it.
        const auto ask = [&] {
#pragma unroll
            for (u32 i = 0; i < OWN; i++) x[i] = role.from ? role.from[i * 32 + lane] : 0.0f;
#pragma unroll
            for (u32 i = 0; i < PAIRS; i++) turn[i] = ((const float2*)(rope + (u64)position * HEAD_DIM))[i * 32 + lane];
        };
        if (can_go_deep && items > gridDim.x) {
            ask();
            turn_head(x, weight, turn);
            round_own(x, score_scale);
            __syncthreads();
            OneItems own = {table, position, items};
            attend_deep(own, layer, [&](u32, u32 unit, u32 span) { return partial(unit, span); }, [&](const Item& item) { return counters + item.unit; });
            if (((spans - 1) * UNITS + unit) % deep_grid() == blockIdx.x) store((u8*)tile_at(layer, table[position / BLOCK], unit), slot);
            __syncthreads();
            index = items;
        } else if (index < items) {
            ask();
            if (sequence) know(index);
            turn_head(x, weight, turn);
            tile = own_tile(index, 0);
            keys.load(tile);
            values.load(tile);
            round_own(x, score_scale);
        }
        for (u32 n = 0; index < items; index += gridDim.x, n++) {
            if (index % UNITS != unit) {
                unit = index % UNITS;
                role = Role(unit, q, k, v, q_norm, k_norm);
#pragma unroll
                for (u32 i = 0; i < OWN; i++) x[i] = role.from ? role.from[i * 32 + lane] : 0.0f;
                turn_head(x, weight, turn);
                round_own(x, score_scale);
            }
            const u32 span = index / UNITS;
            const Item item = {0, unit, span, spans, min(position + 1 - span * SPAN, SPAN)};
            const bool more = index + gridDim.x < items;
            const bool here = tile != nullptr, fresh = here && span * SPAN_TILES + tile_of_span == position / BLOCK;
            __syncthreads();
            if (fresh) patch(keys, slot);
            if (here) score(keys, s.queries, s.query_scale[0]);
            const auto go_on = [&] {
                if (more && (n + 1) % 32 == 0) know(index + gridDim.x);
                tile = more ? own_tile(index + gridDim.x, n + 1) : nullptr;
            };
            if (AHEAD) go_on();
            if (AHEAD) keys.load(tile);
            if (here) {
                barrier_sync(1 + tile_of_span, PARTS * 32);
                if (fresh) patch(values, slot);
                weigh(values.scale, WIDE, item.keys - tile_of_span * BLOCK);
                barrier_sync(1 + tile_of_span, PARTS * 32);
                gather(values);
            }
            if (AHEAD) values.load(tile);
            if (span + 1 == spans) store((u8*)tile_at(layer, table[position / BLOCK], unit), slot);
            __syncthreads();
            end_item(item, 0, attn, fixed, partial(unit, span));
            if (spans > 1) {
                __syncthreads();
                if (threadIdx.x == 0) count_release(counters + unit);
            }
            if (!AHEAD) {
                go_on();
                keys.load(tile);
                values.load(tile);
            }
        }
        if (spans == 1) return;
        constexpr u32 JOBS = (WIDE * HEAD_DIM + JOB - 1) / JOB;
        u32* const done = counters + UNITS;
        for (u32 i = gridDim.x - 1 - blockIdx.x; i < UNITS * JOBS; i += gridDim.x) {
            const u32 unit = i / JOBS;
            if (threadIdx.x == 0)
                while (load_acquire(counters + unit) != spans) {}
            __syncthreads();
            do_job(0, unit, i % JOBS, spans, partial(unit, 0), attn, fixed);
            if (threadIdx.x == 0 && atomicAdd(done + unit, 1u) == JOBS - 1) counters[unit] = done[unit] = 0;
            __syncthreads();
        }
    }
}
