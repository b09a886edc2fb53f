// What the kernels of attention of few rows share (cpu::attention, rule 5): every span of every row is work of its own, so
// that one row fills the GPU.
//
// q [T][H][HD], the layer's cache; attn [T][H][HD], and the same in fixed point. An item is a span of a row for the (up to
// 16) query heads of a unit: a KV head, or a slice of one with more. Grid: a block of threads a processor, all of them
// resident, however many items there are: shapes of launches do not depend on positions. Four warps take a tile, each 16 of
// its keys for the scores and a quarter of the dimensions for the values.
//
// A row of one span is finished at once. Of longer ones, partial results go to `scratch`, and 256 values at a time (a job)
// are merged in order of spans by whichever block the job belongs to, once a counter says that all spans are there: that
// waits for other blocks, which is safe because all are resident and none waits before its items are done. The last job
// of a row and unit leaves the counters at zero.
//
// Order of reductions: the sum of p, lane i has p[i] + p[i + 32], then a butterfly 16 ... 1; maxima and products exact;
// tiles, then spans, in order. Bytes: 4 KH HD of cache a key; partials 8 H HD a span, written and read.
#pragma once
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

// A span of a row for the heads of a unit.
struct Item {
    u32 row, unit, span;      // the row counted from the launch's first
    u32 spans;                // of the row
    u32 keys;                 // of the span that the row sees

    __device__ __forceinline__ u32 tiles() const { return (keys + BLOCK - 1) / BLOCK; }
};

// Shared memory. A tile's scores [WIDE][BLOCK + 4] give way to its results [WIDE][HD + 4]: padded against conflicts.
constexpr u32 SCORE_ROW = BLOCK + 4, RESULT_ROW = HEAD_DIM + 4;
constexpr u32 QUERY_FLOATS = OCTETS * KEY_CHUNKS * 128;  // a unit's queries (attend_deep.cuh puts some after the scores)
constexpr u32 TILE_FLOATS = WIDE * RESULT_ROW > WIDE * SCORE_ROW + QUERY_FLOATS ? WIDE * RESULT_ROW : WIDE * SCORE_ROW + QUERY_FLOATS;
constexpr u32 ITEMS = 32;  // known ahead: a lane an item
struct Shared {
    Item items[ITEMS];
    u32 blocks[ITEMS][SPAN_TILES];  // of the items' tiles, where they have them
    uint4 fresh[4][HEAD_DIM / 16];  // a row that the cache has not got yet: high and low plane of its key, then of its value
    uint4 queries[OCTETS][KEY_CHUNKS][32];                        // B operand: high plane's two words, low plane's
    uint4 weights[SPAN_TILES][VALUE_CHUNKS][OCTETS][32];          // probabilities, likewise
    f32 tile[SPAN_TILES][TILE_FLOATS];
    f32 exponent[SPAN_TILES][16], sum[SPAN_TILES][16], scale[SPAN_TILES][16];
    f32 query_scale[SPAN_TILES][16], fresh_scale[4];
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

__device__ __forceinline__ u32 heads_of(u32 unit) { return SLICES == 1 ? WIDE : min(WIDE, GROUP - unit % SLICES * WIDE); }
// First query head of a unit.
__device__ __forceinline__ u32 first_head(u32 unit) { return unit / SLICES * GROUP + unit % SLICES * WIDE; }

// Sixteen rows of the cache as the A operand: rows g and g + 8, a step of 32 values of k each four words. Which values these
// are does not matter as long as the B operand has the same (`step_of`): a thread takes 16 neighbouring bytes of a row.
template <u32 STEPS> struct Operand16 {
    u32 word[STEPS][4];

    // `at`: the first of the rows, in shared memory or not; `row_bytes`: from eight rows to the next.
    template <bool SHARED> __device__ __forceinline__ void load(const u8* at, u32 row_bytes) {
        const u32 row = fragment_row(), quad = fragment_quad();
#pragma unroll
        for (u32 k = 0; k + 1 < STEPS; k += 2) {
            const u8* const from = at + k / 2 * ATOM + piece_at(row, quad);
            const uint4 a = SHARED ? *(const uint4*)from : load_once(from);
            const uint4 b = SHARED ? *(const uint4*)(from + row_bytes) : load_once(from + row_bytes);
            word[k][0] = a.x, word[k][1] = b.x, word[k][2] = a.y, word[k][3] = b.y;
            word[k + 1][0] = a.z, word[k + 1][1] = b.z, word[k + 1][2] = a.w, word[k + 1][3] = b.w;
        }
        if constexpr (STEPS % 2) {
            const u8* const from = at + STEPS / 2 * ATOM + row * 32 + quad * 8;
            const uint2 a = *(const uint2*)from, b = *(const uint2*)(from + row_bytes);
            word[STEPS - 1][0] = a.x, word[STEPS - 1][1] = b.x, word[STEPS - 1][2] = a.y, word[STEPS - 1][3] = b.y;
        }
    }
};

// Where the B operand has the four values from `k` on: step, thread of four, word.
struct Place {
    u32 step, quad, word;
};
template <u32 STEPS> __device__ __forceinline__ Place step_of(u32 k) {
    if (STEPS % 2 && k / 32 == STEPS - 1) return {STEPS - 1, k % 32 / 8, k % 8 / 4};
    return {k / 64 * 2 + k % 16 / 8, k % 64 / 16, k % 8 / 4};
}

// What a warp holds of a tile's keys: 16 of them, two scales a thread (g and g + 8).
struct Keys {
    Operand16<KEY_CHUNKS> hi, lo;
    f32 scale[2];

    // From a tile, or from its keys and scales alone.
    template <bool SHARED = false> __device__ __forceinline__ void load(const u8* tile) {
        if (!tile) return;
        const u32 part = threadIdx.x / 32 % PARTS;
        const u8* const at = tile + KEYS_AT + part * 2 * KEY_ROWS;
        hi.template load<SHARED>(at, KEY_ROWS);
        lo.template load<SHARED>(at + PLANE_BYTES, KEY_ROWS);
        const f32* const scales = (const f32*)(tile + SCALES_AT) + part * 16 + fragment_row();
        scale[0] = scales[0], scale[1] = scales[8];
    }
};

// And of its values: every fourth slab of 16 dimensions, and the scales of keys l and l + 32 for lane l.
struct Values {
    Operand16<VALUE_CHUNKS> hi[OWN_SLABS], lo[OWN_SLABS];
    f32 scale[2];

    __device__ __forceinline__ void load(const u8* tile) {
        if (!tile) return;
        const u32 lane = threadIdx.x % 32;
        load_planes<false>(tile + VALUES_AT);
        const f32* const scales = (const f32*)(tile + SCALES_AT) + BLOCK;
        scale[0] = scales[lane], scale[1] = scales[lane + 32];
    }
    template <bool SHARED> __device__ __forceinline__ void load_planes(const u8* values) {
        const u32 part = threadIdx.x / 32 % PARTS;
#pragma unroll
        for (u32 s = 0; s < OWN_SLABS; s++) {
            if (s * PARTS + part >= SLABS) continue;
            const u8* const at = values + (s * PARTS + part) * 2 * VALUE_ROWS;
            hi[s].template load<SHARED>(at, VALUE_ROWS);
            lo[s].template load<SHARED>(at + PLANE_BYTES, VALUE_ROWS);
        }
    }
};

// Scores of the warp's 16 keys with all heads of the unit, to shared memory.
__device__ __forceinline__ void score(const Keys& keys, const uint4 (*queries)[KEY_CHUNKS][32], const f32* query_scale) {
    Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    f32* const scores = s.tile[warp / PARTS] + warp % PARTS * 16 + fragment_row();
#pragma unroll
    for (u32 n = 0; n < OCTETS; n++) {
        i32 hh[4] = {}, hl[4] = {}, lh[4] = {};
#pragma unroll
        for (u32 k = 0; k < KEY_CHUNKS; k++) {
            const uint4 q = queries[n][k][lane];
            mma_k32<true>(hh, keys.hi.word[k], q.x, q.y);
            mma_k32<true>(hl, keys.hi.word[k], q.z, q.w);
            mma_k32<true>(lh, keys.lo.word[k], q.x, q.y);
        }
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            const u32 head = n * 8 + fragment_quad() * 2 + c % 2;
            if (head >= WIDE) continue;
            const f32 factor = __fmul_rn(query_scale[head], keys.scale[c / 2]);
            scores[head * SCORE_ROW + c / 2 * 8] = __fmul_rn(join_exact(hh[c], hl[c] + lh[c]), factor);
        }
    }
}

// Order of floats as integers, and back: NaN above all.
__device__ __forceinline__ i32 ordered(i32 bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Every fourth head's scores become probabilities in fixed point, all heads of the warp step by step: each step waits for
// shuffles, whose latency they share. `keys`: those of the tile that the row sees.
__device__ __forceinline__ void weigh(const f32 (&value_scale)[2], u32 heads, u32 keys) {
    constexpr u32 OWN_HEADS = (WIDE + PARTS - 1) / PARTS;
    Shared& s = shared_items();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = warp / PARTS, part = warp % PARTS;
    const f32 none = __uint_as_float(0xff800000u);
    f32 x[OWN_HEADS][2], u[OWN_HEADS][2], exponent[OWN_HEADS], sum[OWN_HEADS];
    u32 amax[OWN_HEADS];
    bool bad[OWN_HEADS];
#pragma unroll
    for (u32 i = 0; i < OWN_HEADS; i++) {
        const f32* const scores = s.tile[tile] + min(i * PARTS + part, WIDE - 1) * SCORE_ROW;
#pragma unroll
        for (u32 h = 0; h < 2; h++) x[i][h] = lane + h * 32 < keys ? scores[lane + h * 32] : none;
    }
#pragma unroll
    for (u32 i = 0; i < OWN_HEADS; i++) {
        const f32 local = max_nan(max_nan(x[i][0], x[i][1]), FLOOR);
        const f32 top = __int_as_float(ordered(__reduce_max_sync(0xffffffffu, ordered(__float_as_int(local)))));
        bad[i] = !(top < __uint_as_float(0x7f800000u));
        exponent[i] = bad[i] ? 0.0f : ceilf(top);
    }
#pragma unroll
    for (u32 i = 0; i < OWN_HEADS; i++) {
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            x[i][h] = exp2_below(__fsub_rn(x[i][h], exponent[i]));
            u[i][h] = lane + h * 32 < keys ? __fmul_rn(x[i][h], value_scale[h]) : 0.0f;
        }
        amax[i] = warp_max(max(magnitude(u[i][0]), magnitude(u[i][1])));
        sum[i] = __fadd_rn(x[i][0], x[i][1]);
    }
#pragma unroll
    for (u32 w = 16; w > 0; w /= 2)
#pragma unroll
        for (u32 i = 0; i < OWN_HEADS; i++) sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(0xffffffffu, sum[i], w));
    // One division a lane: lane 2 i finds the scale of head i, the next one the inverse (`rounding`).
    u32 own = amax[0];
#pragma unroll
    for (u32 i = 1; i < OWN_HEADS; i++) own = lane / 2 == i ? amax[i] : own;
    const f32 largest = __uint_as_float(own);
    const f32 ratio = __fdiv_rn(lane % 2 ? LIMIT_A16 : largest, lane % 2 ? largest : LIMIT_A16);
#pragma unroll
    for (u32 i = 0; i < OWN_HEADS; i++) {
        const u32 head = i * PARTS + part;
        f32 scale = __shfl_sync(0xffffffffu, ratio, 2 * i), inverse = __shfl_sync(0xffffffffu, ratio, 2 * i + 1);
        const bool poisoned = bad[i] || amax[i] >= 0x7f800000u;
        if (poisoned || scale < 1.17549435e-38f) scale = inverse = 0.0f;
        if (head >= heads) continue;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            const u32 n = round_split(u[i][h], inverse), place = place_of_key(lane + h * 32);
            const Place at = step_of<VALUE_CHUNKS>(place);
            u8* const to = (u8*)&s.weights[tile][at.step][head / 8][head % 8 * 4 + at.quad] + at.word * 4 + place % 4;
            to[0] = (u8)(n >> 8);
            to[8] = (u8)(n ^ 0x80);
        }
        if (lane == 0) {
            const f32 poison = __uint_as_float(0x7fc00000u);
            s.exponent[tile][head] = exponent[i];
            s.sum[tile][head] = bad[i] ? poison : sum[i];
            s.scale[tile][head] = poisoned ? poison : __fmul_rn(scale, 256.0f);
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
                mma_k32<true>(hh, values.hi[i].word[h], w[h].x, w[h].y);
                mma_k32<true>(hl, values.hi[i].word[h], w[h].z, w[h].w);
                mma_k32<true>(lh, values.lo[i].word[h], w[h].x, w[h].y);
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
        // All loads before the first use: values, then the exponents that give their factors.
        f32 y[CHUNK];
        if (is_value || is_sum) {
#pragma unroll
            for (u32 i = 0; i < CHUNK; i++) {
                if (i % 8 == 0 && i >= n) break;
                if (i < n) y[i] = __ldcg(from + (u64)(start + i) * PARTIAL);
            }
        }
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
#pragma unroll
            for (u32 i = 0; i < CHUNK; i++) {
                if (i % 8 == 0 && i >= n) break;
                if (i < n) x = merge(x, y[i], s.factors[head][i]);
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

