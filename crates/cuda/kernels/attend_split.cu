// Attention of few rows (cpu::attention, rule 5): every span of every row is work of its own, so that one row fills the GPU.
//
// q [T][H][HD], the layer's cache; attn [T][H][HD], and the same in fixed point. An item is a span of a row for the (up to
// 16) query heads of a unit: a KV head, or a slice of one with more. Grid: a block of threads a processor, all of them
// resident, however many items there are: shapes of launches do not depend on positions. Block b takes items b, b + grid,
// ...; four warps take a tile, each 16 of its keys for the scores and a quarter of the dimensions for the values.
// Fragments go from memory to registers, those of the next item while this one is being computed.
//
// A row of one span is finished at once. Of longer ones, partial results go to `scratch`, and 256 values at a time (a job)
// are merged in order of spans by whichever block the job belongs to, once a counter says that all spans are there: that
// waits for other blocks, which is safe because all are resident and none waits before its items are done. The last job
// of a row and unit leaves the counters at zero.
//
// Order of reductions: the sum of p, lane i has p[i] + p[i + 32], then a butterfly 16 ... 1; maxima and products exact;
// tiles, then spans, in order. Bytes: 4 KH HD of cache a key; partials 8 H HD a span, written and read.
#include "attend.cuh"
#include "fixed.cuh"

constexpr u32 THREADS = 512;
constexpr u32 PARTS = 4;  // warps of a tile
constexpr u32 WIDE = GROUP < 16 ? GROUP : 16;  // heads of a unit
constexpr u32 SLICES = (GROUP + 15) / 16, UNITS = KV_HEADS * SLICES;
constexpr u32 OCTETS = (WIDE + 7) / 8;  // of heads: columns of a product
constexpr u32 SLABS = HEAD_DIM / 16, OWN_SLABS = (SLABS + PARTS - 1) / PARTS;  // of 16 dimensions
constexpr u32 PARTIAL = WIDE * HEAD_DIM + 32;  // f32: values [WIDE][HD], exponents [16], sums [16]
constexpr u32 JOB = 256;
// Whether the row's blocks of fixed point lie within a unit; else the host rounds the row when it is complete.
constexpr u32 LEN = block_len(HEADS * HEAD_DIM);
constexpr bool LOCAL = LEN == 32 || GROUP * HEAD_DIM % 256 == 0;
// With more, the fragments of two items do not fit the registers.
constexpr bool PREFETCH = HEAD_DIM <= 128;

// Shared memory. A tile's scores [WIDE][BLOCK + 4] give way to its results [WIDE][HD + 4]: padded against conflicts.
constexpr u32 SCORE_ROW = BLOCK + 4, RESULT_ROW = HEAD_DIM + 4;
constexpr u32 TILE_FLOATS = WIDE * (SCORE_ROW > RESULT_ROW ? SCORE_ROW : RESULT_ROW);
struct Shared {
    uint4 queries[OCTETS][KEY_CHUNKS][32];                        // B operand: high plane's two words, low plane's
    uint4 weights[SPAN_TILES][VALUE_CHUNKS][OCTETS][32];          // probabilities, likewise
    f32 tile[SPAN_TILES][TILE_FLOATS];
    f32 exponent[SPAN_TILES][16], sum[SPAN_TILES][16], scale[SPAN_TILES][16];
    f32 query_scale[16];
};
// The same memory when jobs are done.
constexpr u32 CHUNK = 64;  // spans at a time
constexpr u32 JOB_HEADS = JOB / HEAD_DIM + 2;  // heads that 256 values can touch
struct JobShared {
    Factors factors[JOB_HEADS][CHUNK];
    f32 inverse[JOB_HEADS];
    f32 values[JOB];
};
constexpr u32 SHARED_BYTES = sizeof(Shared) > sizeof(JobShared) ? sizeof(Shared) : sizeof(JobShared);
static_assert(JOB_HEADS <= 16, "a warp to a head");

__device__ __forceinline__ Shared& shared_items() { return *dynamic_shared<Shared>(); }
__device__ __forceinline__ JobShared& shared_jobs() { return *dynamic_shared<JobShared>(); }

// The rows of this launch, at most 64, and how many spans each has: a lane knows two rows.
struct Rows {
    u32 count;
    u32 position[2];
    u32 sequence;     // of the first row: with one row there is no time to ask for it when it is needed
    u32 spans_to[2];  // spans of all rows up to this one
    u32 spans;        // of all

    __device__ __forceinline__ Rows(const Step& step, u32 first, u32 count) : count(count) {
        const u32 lane = threadIdx.x % 32;
        spans = 0;
        sequence = step.sequence[first];
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
    // The row that the k-th span belongs to.
    __device__ __forceinline__ u32 row_of(u32 k) const {
        return __popc(__ballot_sync(0xffffffffu, spans_to[0] <= k)) + __popc(__ballot_sync(0xffffffffu, spans_to[1] <= k));
    }
};

// A span of a row for the heads of a unit.
struct Item {
    u32 row, unit, span;  // the row counted from the launch's first
    u32 spans;            // of the row
    u32 keys;             // of the span that the row sees
    const u8* tile;       // of this warp, or null where the span has no such tile

    __device__ __forceinline__ u32 tiles() const { return (keys + BLOCK - 1) / BLOCK; }
};

__device__ __forceinline__ u32 heads_of(u32 unit) { return SLICES == 1 ? WIDE : min(WIDE, GROUP - unit % SLICES * WIDE); }
// First query head of a unit.
__device__ __forceinline__ u32 first_head(u32 unit) { return unit / SLICES * GROUP + unit % SLICES * WIDE; }

__device__ __forceinline__ Item item_at(u32 index, const Rows& rows, const Step& step, u32 first, const u8* layer) {
    Item item;
    const u32 k = index / UNITS, tile_of_span = threadIdx.x / 32 / PARTS;
    item.unit = index % UNITS;
    item.row = rows.row_of(k);
    const u32 before = item.row ? rows.of(rows.spans_to, item.row - 1) : 0;
    const u32 keys = rows.of(rows.position, item.row) + 1;
    item.span = k - before;
    item.spans = (keys + SPAN - 1) / SPAN;
    item.keys = min(keys - item.span * SPAN, SPAN);
    item.tile = nullptr;
    if (tile_of_span < item.tiles()) {
        const u32 sequence = item.row ? step.sequence[first + item.row] : rows.sequence;
        const u32* const table = step.tables + (u64)sequence * step.stride;
        item.tile = tile_at(layer, table[item.span * SPAN_TILES + tile_of_span], item.unit / SLICES);
    }
    return item;
}

// A fragment of the cache as the A operand.
struct Rows16 {
    u32 word[4];
    __device__ __forceinline__ Rows16(const uint4& v) : word{v.x, v.z, v.y, v.w} {}
};

// What a warp holds of a tile's keys: 16 of them, two scales a thread (g and g + 8).
struct Keys {
    uint4 hi[KEY_CHUNKS], lo[KEY_CHUNKS];
    f32 scale[2];

    __device__ __forceinline__ void load(const Item& item) {
        if (!item.tile) return;
        const u32 lane = threadIdx.x % 32, part = threadIdx.x / 32 % PARTS;
#pragma unroll
        for (u32 k = 0; k < KEY_CHUNKS; k++) {
            const u8* const at = item.tile + KEYS_AT + fragment_at(part * KEY_CHUNKS + k, lane);
            hi[k] = load_once(at);
            lo[k] = load_once(at + PLANE_BYTES);
        }
        const f32* const scales = (const f32*)(item.tile + SCALES_AT) + part * 16 + fragment_row();
        scale[0] = scales[0], scale[1] = scales[8];
    }
};

// And of its values: every fourth slab of 16 dimensions, and the scales of keys l and l + 32 for lane l.
struct Values {
    uint4 hi[OWN_SLABS][VALUE_CHUNKS], lo[OWN_SLABS][VALUE_CHUNKS];
    f32 scale[2];

    __device__ __forceinline__ void load(const Item& item) {
        if (!item.tile) return;
        const u32 lane = threadIdx.x % 32, part = threadIdx.x / 32 % PARTS;
#pragma unroll
        for (u32 s = 0; s < OWN_SLABS; s++) {
            if (s * PARTS + part >= SLABS) continue;
#pragma unroll
            for (u32 h = 0; h < VALUE_CHUNKS; h++) {
                const u8* const at = item.tile + VALUES_AT + fragment_at((s * PARTS + part) * VALUE_CHUNKS + h, lane);
                hi[s][h] = load_once(at);
                lo[s][h] = load_once(at + PLANE_BYTES);
            }
        }
        const f32* const scales = (const f32*)(item.tile + SCALES_AT) + BLOCK;
        scale[0] = scales[lane], scale[1] = scales[lane + 32];
    }
};

// A query head: warp w has head w of the unit, a lane dimensions 4 l to 4 l + 3 (and 128 on).
struct Query {
    float4 x[(HEAD_DIM + 127) / 128];

    __device__ __forceinline__ void load(const f32* q, const Item& item, u32 first) {
        const u32 lane = threadIdx.x % 32, head = threadIdx.x / 32;
        if (head >= heads_of(item.unit)) return;
        const f32* const from = q + ((u64)(first + item.row) * HEADS + first_head(item.unit) + head) * HEAD_DIM;
#pragma unroll
        for (u32 i = 0; i < (HEAD_DIM + 127) / 128; i++) {
            const u32 d = i * 128 + lane * 4;
            x[i] = d < HEAD_DIM ? *(const float4*)(from + d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    // Rounds it (a head is one block of fixed point) into the B operand of the scores.
    __device__ __forceinline__ void round(const Item& item, f32 score_scale) const {
        Shared& s = shared_items();
        const u32 lane = threadIdx.x % 32, head = threadIdx.x / 32;
        if (head >= heads_of(item.unit)) return;
        u32 amax = 0;
#pragma unroll
        for (u32 i = 0; i < (HEAD_DIM + 127) / 128; i++)
            amax = max(amax, max(max(magnitude(x[i].x), magnitude(x[i].y)), max(magnitude(x[i].z), magnitude(x[i].w))));
        const Rounding r = rounding(warp_max(amax), LIMIT_A16);
        if (lane == 0) s.query_scale[head] = __fmul_rn(r.scale, score_scale);
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
            u32* const to = (u32*)&s.queries[head / 8][d / 32][head % 8 * 4 + d % 16 / 4] + d % 32 / 16;
            to[0] = hi;
            to[2] = lo;
        }
    }
};

// Scores of the warp's 16 keys with all heads of the unit, to shared memory.
__device__ __forceinline__ void score(const Keys& keys) {
    Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    f32* const scores = s.tile[warp / PARTS] + warp % PARTS * 16 + fragment_row();
#pragma unroll
    for (u32 n = 0; n < OCTETS; n++) {
        i32 hh[4] = {}, hl[4] = {}, lh[4] = {};
#pragma unroll
        for (u32 k = 0; k < KEY_CHUNKS; k++) {
            const Rows16 hi(keys.hi[k]), lo(keys.lo[k]);
            const uint4 q = s.queries[n][k][lane];
            mma_k32<true>(hh, hi.word, q.x, q.y);
            mma_k32<true>(hl, hi.word, q.z, q.w);
            mma_k32<true>(lh, lo.word, q.x, q.y);
        }
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            const u32 head = n * 8 + fragment_quad() * 2 + c % 2;
            if (head >= WIDE) continue;
            const f32 factor = __fmul_rn(s.query_scale[head], keys.scale[c / 2]);
            scores[head * SCORE_ROW + c / 2 * 8] = __fmul_rn(join_exact(hh[c], hl[c] + lh[c]), factor);
        }
    }
}

// Order of floats as integers, and back: NaN above all.
__device__ __forceinline__ i32 ordered(i32 bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Every fourth head's scores become probabilities in fixed point. `keys`: those of the tile that the row sees.
__device__ __forceinline__ void weigh(const Values& values, u32 heads, u32 keys) {
    Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = warp / PARTS;
    const f32 none = __uint_as_float(0xff800000u);
    const u32 place = place_of_key(lane);
#pragma unroll
    for (u32 i = 0; i < (WIDE + PARTS - 1) / PARTS; i++) {
        const u32 head = i * PARTS + warp % PARTS;
        if (head >= heads) continue;
        const f32* const scores = s.tile[tile] + head * SCORE_ROW;
        f32 x[2], u[2];
#pragma unroll
        for (u32 h = 0; h < 2; h++) x[h] = lane + h * 32 < keys ? scores[lane + h * 32] : none;
        const f32 local = max_nan(max_nan(x[0], x[1]), FLOOR);
        const f32 top = __int_as_float(ordered(__reduce_max_sync(0xffffffffu, ordered(__float_as_int(local)))));
        const bool bad = !(top < __uint_as_float(0x7f800000u));
        const f32 exponent = bad ? 0.0f : ceilf(top);
        u32 amax = 0;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            x[h] = exp2_below(__fsub_rn(x[h], exponent));
            u[h] = lane + h * 32 < keys ? __fmul_rn(x[h], values.scale[h]) : 0.0f;
            amax = max(amax, magnitude(u[h]));
        }
        const f32 sum = butterfly(__fadd_rn(x[0], x[1]));
        const Rounding r = rounding(warp_max(amax), LIMIT_A16);
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            const u32 n = round_split(u[h], r.zero ? 0.0f : r.inverse);
            u8* const to = (u8*)&s.weights[tile][h][head / 8][head % 8 * 4 + place % 16 / 4] + place / 16 * 4 + place % 4;
            to[0] = (u8)(n >> 8);
            to[8] = (u8)(n ^ 0x80);
        }
        if (lane == 0) {
            const f32 poison = __uint_as_float(0x7fc00000u);
            s.exponent[tile][head] = exponent;
            s.sum[tile][head] = bad ? poison : sum;
            s.scale[tile][head] = bad ? poison : __fmul_rn(r.scale, 256.0f);
        }
    }
}

// The warp's dimensions of the weighted values of the tile, to shared memory.
__device__ __forceinline__ void gather(const Values& values) {
    Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = warp / PARTS, part = warp % PARTS;
#pragma unroll
    for (u32 n = 0; n < OCTETS; n++) {
        uint4 w[VALUE_CHUNKS];
#pragma unroll
        for (u32 h = 0; h < VALUE_CHUNKS; h++) w[h] = s.weights[tile][h][n][lane];
#pragma unroll
        for (u32 i = 0; i < OWN_SLABS; i++) {
            if (i * PARTS + part >= SLABS) continue;
            i32 hh[4] = {}, hl[4] = {}, lh[4] = {};
#pragma unroll
            for (u32 h = 0; h < VALUE_CHUNKS; h++) {
                const Rows16 hi(values.hi[i][h]), lo(values.lo[i][h]);
                mma_k32<true>(hh, hi.word, w[h].x, w[h].y);
                mma_k32<true>(hl, hi.word, w[h].z, w[h].w);
                mma_k32<true>(lh, lo.word, w[h].x, w[h].y);
            }
            f32* const to = s.tile[tile] + (i * PARTS + part) * 16 + fragment_row();
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                const u32 head = n * 8 + fragment_quad() * 2 + c % 2;
                if (head >= WIDE) continue;
                to[head * RESULT_ROW + c / 2 * 8] = __fmul_rn(join_exact(hh[c], hl[c] + lh[c]), s.scale[tile][head]);
            }
        }
    }
}

// Merges the tiles of an item in order, a thread eight neighbouring values; finishes the row if this span is all of it,
// else leaves the span in `partial`.
__device__ __forceinline__ void end_item(const Item& item, u32 first, f32* attn, const Fixed& fixed, f32* partial) {
    Shared& s = shared_items();
    const u32 values = heads_of(item.unit) * HEAD_DIM, at = threadIdx.x * 8;
    if (threadIdx.x / 32 * 256 >= values) return;
    const bool active = at < values;
    const u32 head = active ? at / HEAD_DIM : 0, d = at % HEAD_DIM;
    f32 exponent = FLOOR, sum = 0.0f;
    Eight x = {};
    for (u32 t = 0; t < item.tiles(); t++) {
        const Factors f = meet(exponent, s.exponent[t][head]);
        sum = merge(sum, s.sum[t][head], f);
        const float4* const y = (const float4*)(s.tile[t] + head * RESULT_ROW + d);
        const float4 a = y[0], b = y[1];
        const f32 next[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (u32 i = 0; i < 8; i++) x.v[i] = merge(x.v[i], next[i], f);
    }
    f32* to = partial + at;
    if (item.spans == 1) {
        // Merging into nothing turns -0 to +0.
        const f32 inverse = __fdiv_rn(1.0f, __fadd_rn(sum, 0.0f));
#pragma unroll
        for (u32 i = 0; i < 8; i++) x.v[i] = __fmul_rn(__fadd_rn(x.v[i], 0.0f), inverse);
        const u64 place = ((u64)(first + item.row) * HEADS + first_head(item.unit)) * HEAD_DIM + at;
        to = attn + place;
        if constexpr (LOCAL) round_eight<LEN>(x, place, active, fixed);
    } else if (active && d == 0) {
        partial[WIDE * HEAD_DIM + head] = exponent;
        partial[WIDE * HEAD_DIM + 16 + head] = sum;
    }
    if (!active) return;
    ((float4*)to)[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    ((float4*)to)[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

// Merges 256 values of a row and unit over its spans in order: a thread a value, and one for the sum of each head.
__device__ __forceinline__ void do_job(u32 row, u32 unit, u32 job, u32 spans, const f32* partials, f32* attn, const Fixed& fixed) {
    JobShared& s = shared_jobs();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = threadIdx.x;
    const u32 values = heads_of(unit) * HEAD_DIM, at = job * JOB + t, first = job * JOB / HEAD_DIM;
    const u32 last = (min(values, (job + 1) * JOB) - 1) / HEAD_DIM, heads = last - first + 1;
    const bool is_value = t < JOB && at < values, is_sum = t >= JOB && t - JOB < heads;
    const u32 head = is_value ? at / HEAD_DIM - first : is_sum ? t - JOB : 0;
    const f32* const from = partials + (is_sum ? WIDE * HEAD_DIM + 16 + first + head : is_value ? at : 0);
    f32 x = 0.0f, top = FLOOR;
    for (u32 start = 0; start < spans; start += CHUNK) {
        const u32 n = min(spans - start, CHUNK);
        if (warp < heads) {
            // The running maximum of exponents, 32 spans at a time, gives every span its factors.
            for (u32 half = 0; half < n; half += 32) {
                const bool there = half + lane < n;
                const f32 own = there ? __ldcg(partials + (u64)(start + half + lane) * PARTIAL + WIDE * HEAD_DIM + first + warp) : FLOOR;
                f32 reach = own;
#pragma unroll
                for (u32 w = 1; w < 32; w *= 2) {
                    const f32 other = __shfl_up_sync(0xffffffffu, reach, w);
                    if (lane >= w) reach = fmaxf(reach, other);
                }
                const f32 before = __shfl_up_sync(0xffffffffu, reach, 1);
                f32 exponent = lane ? fmaxf(before, top) : top;
                const Factors f = meet(exponent, own);
                if (there) s.factors[warp][half + lane] = f;
                top = fmaxf(top, __shfl_sync(0xffffffffu, reach, 31));
            }
        }
        __syncthreads();
        if (is_value || is_sum) {
            constexpr u32 FLIGHT = 32;  // loads before the first use
            for (u32 i = 0; i < n; i += FLIGHT) {
                f32 y[FLIGHT];
#pragma unroll
                for (u32 j = 0; j < FLIGHT; j++) y[j] = i + j < n ? __ldcg(from + (u64)(start + i + j) * PARTIAL) : 0.0f;
#pragma unroll
                for (u32 j = 0; j < FLIGHT; j++)
                    if (i + j < n) x = merge(x, y[j], s.factors[head][i + j]);
            }
        }
        __syncthreads();
    }
    if (is_sum) s.inverse[head] = __fdiv_rn(1.0f, x);
    __syncthreads();
    const u64 place = ((u64)row * HEADS + first_head(unit)) * HEAD_DIM + job * JOB;
    if (is_value) {
        x = __fmul_rn(x, s.inverse[head]);
        attn[place + t] = x;
    }
    if constexpr (LOCAL) {
        if (t < JOB) s.values[t] = is_value ? x : 0.0f;
        __syncthreads();
        if (warp == 0) {
            Eight e;
#pragma unroll
            for (u32 i = 0; i < 8; i++) e.v[i] = s.values[lane * 8 + i];
            round_eight<LEN>(e, place + lane * 8, job * JOB + lane * 8 < values, fixed);
        }
    }
}

// Rows `first` to `first + count - 1` of the step. `scratch`: [count][UNITS][spans of the longest table][PARTIAL] f32.
// `counters`: [count][UNITS] spans that are there, then [count][UNITS] jobs that are done; zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend_split(const f32* q, const u8* layer, Step step, u32 first, u32 count, f32 score_scale, f32* attn, Fixed fixed, f32* scratch,
             u32* counters) {
    launch_dependents();
    require_shared(SHARED_BYTES);
    wait_dependencies();
    const Rows rows(step, first, count);
    const u32 items = rows.spans * UNITS, stride = (step.stride + SPAN_TILES - 1) / SPAN_TILES;
    const u32 tile_of_span = threadIdx.x / 32 / PARTS;
    const auto partial = [&](u32 row, u32 unit, u32 span) { return scratch + (((u64)row * UNITS + unit) * stride + span) * PARTIAL; };

    Item item, next;
    Keys keys;
    Values values;
    Query query;
    u32 index = blockIdx.x;
    if (index < items) {
        next = item_at(index, rows, step, first, layer);
        query.load(q, next, first);
        keys.load(next);
        values.load(next);
    }
    for (; index < items; index += gridDim.x) {
        item = next;
        const bool more = index + gridDim.x < items;
        query.round(item, score_scale);
        __syncthreads();
        if (more) {
            next = item_at(index + gridDim.x, rows, step, first, layer);
            query.load(q, next, first);
        }
        if (item.tile) score(keys);
        if (PREFETCH && more) keys.load(next);
        if (item.tile) {
            barrier_sync(1 + tile_of_span, PARTS * 32);
            weigh(values, heads_of(item.unit), item.keys - tile_of_span * BLOCK);
            barrier_sync(1 + tile_of_span, PARTS * 32);
            gather(values);
        }
        if (more) {
            if (!PREFETCH) keys.load(next);
            values.load(next);
        }
        __syncthreads();
        end_item(item, first, attn, fixed, partial(item.row, item.unit, item.span));
        if (item.spans > 1) {
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                atomicAdd(counters + item.row * UNITS + item.unit, 1u);
            }
        }
    }

    constexpr u32 JOBS = (WIDE * HEAD_DIM + JOB - 1) / JOB;
    if (rows.spans == count) return;  // each row had one span
    u32* const done = counters + count * UNITS;
    // The blocks with the fewest items first.
    for (u32 i = gridDim.x - 1 - blockIdx.x; i < count * UNITS * JOBS; i += gridDim.x) {
        const u32 job = i % JOBS, unit = i / JOBS % UNITS, row = i / JOBS / UNITS;
        const u32 jobs = (heads_of(unit) * HEAD_DIM + JOB - 1) / JOB;
        const u32 spans = rows.of(rows.position, row) / SPAN + 1;
        if (spans == 1 || job >= jobs) continue;
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
