// Attention of few rows, of any sequences: attend_span.cuh says how rows become items and items results. A block takes items
// b, b + grid, ..., loading those of the next while it computes one; or, where there are many spans, its groups of warps take
// theirs from rings (attend_deep.cuh).
#include "attend_deep.cuh"

// The rows of this launch, at most 64, and how many spans each has: a lane knows two rows.
struct Rows {
    u32 count;
    u32 position[2];
    u32 spans_to[2];  // spans of all rows up to this one
    u32 spans;        // of all

    __device__ __forceinline__ Rows(const Step& step, u32 first, u32 count) : count(count) {
        const u32 lane = threadIdx.x % 32;
        spans = 0;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 row = i * 32 + lane;
            position[i] = row < count ? step.position[first + row] : 0;
            u32 n = row < count ? position[i] / SPAN + 1 : 0;
            if (i * 32 + 1 < count) {
#pragma unroll
                for (u32 w = 1; w < 32; w *= 2) {
                    const u32 other = __shfl_up_sync(0xffffffffu, n, w);
                    if (lane >= w) n += other;
                }
            }
            // A single row's spans are the same up to any later one.
            if (i * 32 + 1 == count) n = __shfl_sync(0xffffffffu, n, 0);
            spans_to[i] = spans + n;
            spans = __shfl_sync(0xffffffffu, spans_to[i], 31);
        }
    }
    __device__ __forceinline__ u32 of(const u32 (&values)[2], u32 row) const {
        const u32 low = __shfl_sync(0xffffffffu, values[0], row % 32), high = __shfl_sync(0xffffffffu, values[1], row % 32);
        return row < 32 ? low : high;
    }
    // The row that the lane's k-th span belongs to.
    __device__ __forceinline__ u32 row_of(u32 k) const {
        u32 row = 0;
        if (count == 1) return row;
#pragma unroll
        for (u32 step = 64; step > 0; step /= 2) {
            const u32 next = row + step;
            const u32 before = of(spans_to, (next - 1) % 64);
            if (next <= count && before <= k) row = next;
        }
        return row;
    }
};

// A warp finds items `index`, `index` + grid, ..., one to a lane. With one row, its sequence is asked for together with its
// position.
__device__ __forceinline__ void find_items(u32 index, u32 items, const Rows& rows, u32 sequence, const Step& step, u32 first) {
    const u32 own = index + threadIdx.x % 32 * gridDim.x, k = min(own, items - 1) / UNITS;
    const u32 row = rows.row_of(k), before = rows.of(rows.spans_to, row ? row - 1 : 0);
    const u32 keys = rows.of(rows.position, row) + 1;
    if (own >= items) return;
    Item item;
    item.row = row;
    item.unit = own % UNITS;
    item.span = k - (row ? before : 0);
    item.spans = (keys + SPAN - 1) / SPAN;
    item.keys = min(keys - item.span * SPAN, SPAN);
    const u32* const table = step.tables + (u64)(row ? step.sequence[first + row] : sequence) * step.stride + item.span * SPAN_TILES;
#pragma unroll
    for (u32 t = 0; t < SPAN_TILES; t++)
        if (t < item.tiles()) shared_items().blocks[threadIdx.x % 32][t] = table[t];
    shared_items().items[threadIdx.x % 32] = item;
}

// The tile of this warp in item `i`, or null where the span has no such tile.
__device__ __forceinline__ const u8* own_tile(u32 i, const u8* layer) {
    const Shared& s = shared_items();
    const u32 t = threadIdx.x / 32 / PARTS;
    return t < s.items[i].tiles() ? tile_at(layer, s.blocks[i][t], s.items[i].unit / SLICES) : nullptr;
}

// A query head of the unit: a lane has dimensions 4 l to 4 l + 3 (and 128 on).
struct Query {
    float4 x[(HEAD_DIM + 127) / 128];

    __device__ __forceinline__ void load(const f32* q, const Item& item, u32 first, u32 head) {
        const u32 lane = threadIdx.x % 32;
        if (head >= heads_of(item.unit)) return;
        const f32* const from = q + ((u64)(first + item.row) * HEADS + first_head(item.unit) + head) * HEAD_DIM;
#pragma unroll
        for (u32 i = 0; i < (HEAD_DIM + 127) / 128; i++) {
            const u32 d = i * 128 + lane * 4;
            x[i] = d < HEAD_DIM ? *(const float4*)(from + d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    // Rounds it (a head is one block of fixed point) into the B operand of the scores.
    __device__ __forceinline__ void round(const Item& item, f32 score_scale, u32 head, uint4 (*queries)[KEY_CHUNKS][32], f32* scale) const {
        const u32 lane = threadIdx.x % 32;
        if (head >= heads_of(item.unit)) return;
        u32 amax = 0;
#pragma unroll
        for (u32 i = 0; i < (HEAD_DIM + 127) / 128; i++)
            amax = max(amax, max(max(magnitude(x[i].x), magnitude(x[i].y)), max(magnitude(x[i].z), magnitude(x[i].w))));
        const Rounding r = rounding(warp_max(amax), LIMIT_A16);
        if (lane == 0) scale[head] = __fmul_rn(r.scale, score_scale);
#pragma unroll
        for (u32 i = 0; i < (HEAD_DIM + 127) / 128; i++) {
            const u32 d = i * 128 + lane * 4;
            if (d >= HEAD_DIM) continue;
            const i32 n[4] = {round_fixed(x[i].x, r), round_fixed(x[i].y, r), round_fixed(x[i].z, r), round_fixed(x[i].w, r)};
            u32 hi = 0, lo = 0;
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                hi |= (u32)(high_plane(n[b]) & 0xff) << (b * 8);
                lo |= (u32)(n[b] & 0xff) << (b * 8);
            }
            const Place at = step_of<KEY_CHUNKS>(d);
            u32* const to = (u32*)&queries[head / 8][at.step][head % 8 * 4 + at.quad] + at.word;
            to[0] = hi;
            to[2] = lo;
        }
    }
};

// The items of a group of warps when contexts are deep.
struct RowItems {
    const Rows& rows;
    const Step& step;
    const f32* q;
    u32 first, items;
    f32 score_scale;

    __device__ __forceinline__ bool item(u32 n, Item& item) const {
        const u32 index = group_index(n), k = min(index, items - 1) / UNITS;
        item.row = rows.row_of(k);
        const u32 before = item.row ? rows.of(rows.spans_to, item.row - 1) : 0, keys = rows.of(rows.position, item.row) + 1;
        item.unit = index % UNITS;
        item.span = k - before;
        item.spans = (keys + SPAN - 1) / SPAN;
        item.keys = min(keys - item.span * SPAN, SPAN);
        return index < items;
    }
    __device__ __forceinline__ const u32* table(const Item& item) const { return step.tables + (u64)step.sequence[first + item.row] * step.stride; }
    // Every fourth head by each of the group's warps.
    Query asked[(WIDE + PARTS - 1) / PARTS];
    __device__ __forceinline__ void ask(const Item& item) {
#pragma unroll
        for (u32 i = 0; i < (WIDE + PARTS - 1) / PARTS; i++) asked[i].load(q, item, first, i * PARTS + threadIdx.x / 32 % PARTS);
    }
    __device__ __forceinline__ void prepare(const Item& item) const {
        const u32 group = threadIdx.x / 32 / PARTS;
#pragma unroll
        for (u32 i = 0; i < (WIDE + PARTS - 1) / PARTS; i++)
            asked[i].round(item, score_scale, i * PARTS + threadIdx.x / 32 % PARTS, group_queries(), shared_items().query_scale[group]);
        barrier_sync(1 + group, PARTS * 32);
    }
    __device__ __forceinline__ uint4 (*queries() const)[KEY_CHUNKS][32] { return group_queries(); }
    __device__ __forceinline__ const f32* query_scale() const { return shared_items().query_scale[threadIdx.x / 32 / PARTS]; }
    __device__ __forceinline__ bool own(const Item&, u32) const { return false; }
    __device__ __forceinline__ void put_key(u8*) const {}
    __device__ __forceinline__ void put_value(u8*) const {}
};

// Rows `first` to `first + count - 1` of the step. `scratch`: [count][UNITS][spans of the longest table][PARTIAL] f32.
// `counters`: [count][UNITS] spans that are there, then [count][UNITS] jobs that are done; zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend_split(const f32* q, const u8* layer, Step step, u32 first, u32 count, f32 score_scale, f32* attn, Fixed fixed, f32* scratch,
             u32* counters) {
    require_shared(SHARED_BYTES);
    const bool can_go_deep = begin_deep();
    wait_dependencies();
    launch_dependents();
    Shared& s = shared_items();
    const u32 sequence = step.sequence[first];
    const Rows rows(step, first, count);
    const u32 items = rows.spans * UNITS, stride = (step.stride + SPAN_TILES - 1) / SPAN_TILES;
    const u32 tile_of_span = threadIdx.x / 32 / PARTS;
    const auto partial = [&](u32 row, u32 unit, u32 span) { return scratch + (((u64)row * UNITS + unit) * stride + span) * PARTIAL; };

    // Where there are spans enough for every group of warps, blocks do not wait for themselves at every item.
    const bool deep = can_go_deep && items > gridDim.x && rows.spans >= 2 * count;
    if (deep) {
        RowItems own = {rows, step, q, first, items, score_scale, {}};
        attend_deep(own, layer, partial, [&](const Item& item) { return counters + item.row * UNITS + item.unit; });
    }
    Keys keys;
    Values values;
    Query query;
    for (u32 index = deep ? items : blockIdx.x, k = 0; index < items; index += gridDim.x, k++) {
        if (k % ITEMS == 0) {
            if (threadIdx.x < 32) find_items(index, items, rows, sequence, step, first);
            __syncthreads();
            query.load(q, s.items[0], first, threadIdx.x / 32);
            const u8* const tile = own_tile(0, layer);
            keys.load(tile);
            values.load(tile);
        }
        const Item& item = s.items[k % ITEMS];
        const bool more = index + gridDim.x < items && k % ITEMS + 1 < ITEMS;
        const bool here = tile_of_span < item.tiles();
        query.round(item, score_scale, threadIdx.x / 32, s.queries, s.query_scale[0]);
        __syncthreads();
        if (more) query.load(q, s.items[k % ITEMS + 1], first, threadIdx.x / 32);
        if (here) score(keys, s.queries, s.query_scale[0]);
        if (PREFETCH && more) keys.load(own_tile(k % ITEMS + 1, layer));
        if (here) {
            barrier_sync(1 + tile_of_span, PARTS * 32);
            weigh(values.scale, heads_of(item.unit), item.keys - tile_of_span * BLOCK);
            barrier_sync(1 + tile_of_span, PARTS * 32);
            gather(values);
        }
        if (more) {
            const u8* const tile = own_tile(k % ITEMS + 1, layer);
            if (!PREFETCH) keys.load(tile);
            values.load(tile);
        }
        __syncthreads();
        end_item(item, first, attn, fixed, partial(item.row, item.unit, item.span));
        if (item.spans > 1) {
            __syncthreads();
            if (threadIdx.x == 0) count_release(counters + item.row * UNITS + item.unit);
        }
        if (k % ITEMS + 1 == ITEMS) __syncthreads();
    }

    constexpr u32 JOBS = (WIDE * HEAD_DIM + JOB - 1) / JOB;
    if (rows.spans == count) return;  // each row had one span
    __syncthreads();
    u32* const done = counters + count * UNITS;
    // The blocks with the fewest items first.
    for (u32 i = gridDim.x - 1 - blockIdx.x; i < count * UNITS * JOBS; i += gridDim.x) {
        const u32 job = i % JOBS, unit = i / JOBS % UNITS, row = i / JOBS / UNITS;
        const u32 jobs = (heads_of(unit) * HEAD_DIM + JOB - 1) / JOB;
        const u32 spans = rows.of(rows.position, row) / SPAN + 1;
        if (spans == 1 && !deep || job >= jobs) continue;
        if (threadIdx.x == 0)
            while (load_acquire(counters + row * UNITS + unit) != spans) {}
        __syncthreads();
        do_job(first + row, unit, job, spans, partial(row, unit, 0), attn, fixed);
        if (threadIdx.x == 0 && atomicAdd(done + row * UNITS + unit, 1u) == jobs - 1) {
            counters[row * UNITS + unit] = 0;
            done[row * UNITS + unit] = 0;
        }
        __syncthreads();
    }
}
