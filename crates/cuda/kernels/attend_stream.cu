// Attention of many rows (cpu::attention, rule 5): a block of threads streams the cache of one KV head past a run of rows.
//
// q [T][H][HD], the layer's cache; attn [T][H][HD]. A column is a query head of a row; the GROUP heads of a KV head and
// ROWS rows are a block's columns, 16 to a warp. Grid: ceil(T / ROWS) KH, the last rows, which see most keys, first. Keys
// and values come through a ring (ring.cuh) in units: a tile's keys with its scales, then its values.
//
// In a warp, columns are the rows of the tensor-core products: a thread holds two of them (g and g + 8) and of each the 16
// keys of a tile that are 2t and 2t + 1 (mod 8), t = lane % 4. So scores, probabilities and the operand of the value
// product are the same registers of the same thread.
//
// Order of reductions: the sum of p, partial i is p[i] + p[i + 32], then a butterfly 16, 8 (registers), 4, 2 (lanes), 1
// (registers); maxima and products exact; tiles, then spans, in order. Rows of several sequences in one block: their
// sequences are streamed one after the other, and a column takes part in those tiles that its row sees (`seen`).
// Bytes: 4 KH HD of cache a key and run of rows; 8 H HD a row. Work: 12 HD multiply-adds in int8 a score, and about 40
// other operations.
#include "attend.cuh"
#include "ring.cuh"

// Processors with 160 KB of shared memory and more take large blocks; the others have 99 KB.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr bool LARGE = true;
#else
constexpr bool LARGE = false;
#endif
// launch/attend.rs knows these three as well.
constexpr u32 WARPS = HEAD_DIM > 128 ? (LARGE ? 4 : 2) : (LARGE ? 8 : 4);
constexpr u32 STAGES = HEAD_DIM > 128 ? 2 : 4;
constexpr u32 ROWS = 16 * WARPS / GROUP;

constexpr u32 THREADS = WARPS * 32;
constexpr u32 KEY_UNIT = VALUES_AT, VALUE_UNIT = TILE_BYTES - VALUES_AT;
constexpr u32 STAGE_BYTES = KEY_UNIT;
// A unit is copied when the one LAG before it in its stage's life is to be free: two units of slack between warps.
constexpr u32 LAG = STAGES > 2 ? 2 : 1;
constexpr u32 AHEAD = STAGES - LAG;
constexpr u32 SLABS = HEAD_DIM / 16;   // of 16 dimensions
constexpr u32 TOTAL_AT = STAGES * STAGE_BYTES;               // f32 [WARPS][HD / 8][32][4]: what the spans before add up to
constexpr u32 BARRIERS_AT = TOTAL_AT + WARPS * HEAD_DIM * 64;
constexpr u32 SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8;   // launch/attend.rs knows this too

// What a thread keeps of its two columns, g and g + 8 of its warp's 16.
struct Columns {
    i32 position[2];
    u32 sequence[2];  // NONE: no such column
};
constexpr u32 NONE = 0xffffffffu;

// 16 columns in fixed point as the A operand: [HD / 32][4] words a plane, and the scale of each of the thread's two.
struct Queries {
    u32 hi[KEY_CHUNKS][4], lo[KEY_CHUNKS][4];
    f32 scale[2];
};

// What some keys contribute to a thread's two columns.
struct State {
    f32 exponent[2], sum[2];
};

// Column i of the thread among the block's.
__device__ __forceinline__ u32 own_column(u32 i) { return threadIdx.x / 32 * 16 + i * 8 + fragment_row(); }
// Where its head begins in rows of [H][HD]; for a column that is not there, where the first one's does.
__device__ __forceinline__ u64 head_of(u32 column, bool there, u32 first, u32 kv_head) {
    if (!there) column = 0;
    return ((u64)(first + column / GROUP) * HEADS + kv_head * GROUP + column % GROUP) * HEAD_DIM;
}

__device__ __forceinline__ Columns own_columns(const Step& step, u32 first) {
    Columns c;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = first + own_column(i) / GROUP;
        const bool there = own_column(i) < ROWS * GROUP && row < step.rows;
        c.position[i] = there ? (i32)step.position[row] : -1;
        c.sequence[i] = there ? step.sequence[row] : NONE;
    }
    return c;
}

// Rounds the warp's columns (a head is one block of fixed point); the four threads of a column hold it together.
__device__ __forceinline__ void round_queries(Queries& out, const f32* q, const Columns& own, u32 first, u32 kv_head, f32 score_scale) {
    const u32 quad = fragment_quad();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const f32* const from = q + head_of(own_column(i), own.sequence[i] != NONE, first, kv_head) + quad * 4;
        float4 x[KEY_CHUNKS][2];
        u32 amax = 0;
#pragma unroll
        for (u32 k = 0; k < KEY_CHUNKS; k++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const float4 v = *(const float4*)(from + k * 32 + half * 16);
                x[k][half] = v;
                amax = max(max(amax, max(magnitude(v.x), magnitude(v.y))), max(magnitude(v.z), magnitude(v.w)));
            }
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
        const Rounding r = rounding(amax, LIMIT_A16);
        out.scale[i] = __fmul_rn(r.scale, score_scale);
#pragma unroll
        for (u32 k = 0; k < KEY_CHUNKS; k++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const float4 v = x[k][half];
                const i32 n[4] = {round_fixed(v.x, r), round_fixed(v.y, r), round_fixed(v.z, r), round_fixed(v.w, r)};
                u32 hi = 0, lo = 0;
#pragma unroll
                for (u32 b = 0; b < 4; b++) {
                    hi |= (u32)(high_plane(n[b]) & 0xff) << (b * 8);
                    lo |= (u32)(n[b] & 0xff) << (b * 8);
                }
                out.hi[k][half * 2 + i] = hi;
                out.lo[k][half * 2 + i] = lo;
            }
    }
}

// Scores of the warp's columns against a tile: score[j][2 i + c] is column i's with key 8 j + 2 t + c.
__device__ __forceinline__ void scores_of(f32 (&score)[8][4], const Queries& q, const u8* unit) {
    const u32 lane = threadIdx.x % 32;
    const float2* const scales = (const float2*)(unit + SCALES_AT);
    // 32 keys at a time: two accumulators to a score would else take twice the registers.
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        i32 hh[4][4] = {}, hl[4][4] = {};
#pragma unroll
        for (u32 k = 0; k < KEY_CHUNKS; k++)
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                const u8* const at = unit + fragment_at((half * 2 + m) * KEY_CHUNKS + k, lane);
                const uint4 hi = *(const uint4*)at, lo = *(const uint4*)(at + PLANE_BYTES);
                mma_k32<true>(hh[2 * m], q.hi[k], hi.x, hi.y);
                mma_k32<true>(hh[2 * m + 1], q.hi[k], hi.z, hi.w);
                mma_k32<true>(hl[2 * m], q.lo[k], hi.x, hi.y);
                mma_k32<true>(hl[2 * m + 1], q.lo[k], hi.z, hi.w);
                mma_k32<true>(hl[2 * m], q.hi[k], lo.x, lo.y);
                mma_k32<true>(hl[2 * m + 1], q.hi[k], lo.z, lo.w);
            }
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            const u32 j = half * 4 + n;
            const float2 key = scales[j * 4 + fragment_quad()];
#pragma unroll
            for (u32 c = 0; c < 4; c++)
                score[j][c] = __fmul_rn(join_exact(hh[n][c], hl[n][c]), __fmul_rn(q.scale[c / 2], c % 2 ? key.y : key.x));
        }
    }
}

// Largest of the four threads of a column.
__device__ __forceinline__ f32 quad_max(f32 v) {
    v = max_nan(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return max_nan(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// A tile's probabilities in fixed point, the A operand of the value product, and what goes with them.
struct Weights {
    u32 hi[VALUE_CHUNKS][4], lo[VALUE_CHUNKS][4];
    f32 scale[2];  // of a column's integer products
    State state;
};

// From scores to probabilities. `limit`: the last key of the tile that each column sees, 63 or more for all of them.
template <bool MASKED>
__device__ __forceinline__ void weigh(Weights& out, f32 (&p)[8][4], const u8* unit, const i32 (&limit)[2]) {
    const u32 quad = fragment_quad();
    const f32 none = __uint_as_float(0xff800000u);
    f32 top[2] = {FLOOR, FLOOR};
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            if (MASKED && (i32)(j * 8 + quad * 2 + c % 2) > limit[c / 2]) p[j][c] = none;
            top[c / 2] = max_nan(top[c / 2], p[j][c]);
        }
    bool bad[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        top[i] = quad_max(top[i]);
        bad[i] = !(top[i] < __uint_as_float(0x7f800000u));
        out.state.exponent[i] = bad[i] ? 0.0f : ceilf(top[i]);
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) p[j][c] = exp2_below(__fsub_rn(p[j][c], out.state.exponent[c / 2]));
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        f32 s[2];
#pragma unroll
        for (u32 c = 0; c < 2; c++) {
            f32 t[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) t[j] = __fadd_rn(p[j][2 * i + c], p[j + 4][2 * i + c]);
            s[c] = __fadd_rn(__fadd_rn(t[0], t[2]), __fadd_rn(t[1], t[3]));
            s[c] = __fadd_rn(s[c], __shfl_xor_sync(0xffffffffu, s[c], 2));
            s[c] = __fadd_rn(s[c], __shfl_xor_sync(0xffffffffu, s[c], 1));
        }
        out.state.sum[i] = bad[i] ? __uint_as_float(0x7fc00000u) : __fadd_rn(s[0], s[1]);
    }
    // From here on p is u = p * s_v, never negative: its bits order as it does, NaN above all.
    const float2* const scales = (const float2*)(unit + SCALES_AT) + BLOCK / 2;
    u32 amax[2] = {0, 0};
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const float2 value = scales[j * 4 + quad];
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            f32 u = __fmul_rn(p[j][c], c % 2 ? value.y : value.x);
            if (MASKED && (i32)(j * 8 + quad * 2 + c % 2) > limit[c / 2]) u = 0.0f;
            p[j][c] = u;
            amax[c / 2] = max(amax[c / 2], __float_as_uint(u));
        }
    }
    // One division a thread: of the four of a column, two find the scales of both columns and two the inverses.
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        amax[i] = max(amax[i], __shfl_xor_sync(0xffffffffu, amax[i], 1));
        amax[i] = max(amax[i], __shfl_xor_sync(0xffffffffu, amax[i], 2)) & 0x7fffffffu;
    }
    const f32 own = __uint_as_float(quad % 2 ? amax[1] : amax[0]);
    const f32 ratio = quad < 2 ? __fdiv_rn(own, LIMIT_A16) : __fdiv_rn(LIMIT_A16, own);
    f32 inverse[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 from = threadIdx.x % 32 & ~3u;
        f32 scale = __shfl_sync(0xffffffffu, ratio, from + i);
        inverse[i] = __shfl_sync(0xffffffffu, ratio, from + 2 + i);
        const bool poisoned = bad[i] || amax[i] >= 0x7f800000u;
        if (scale < 1.17549435e-38f) scale = inverse[i] = 0.0f;
        out.scale[i] = poisoned ? __uint_as_float(0x7fc00000u) : __fmul_rn(scale, 256.0f);
    }
#pragma unroll
    for (u32 h = 0; h < VALUE_CHUNKS; h++)
#pragma unroll
        for (u32 w = 0; w < 4; w++) {
            // Word w: column w % 2, the 16 keys w / 2 of the chunk; its bytes are keys 2t, 2t + 1, 8 + 2t, 9 + 2t.
            const u32 j = h * 4 + w / 2 * 2, i = w % 2;
            const u32 n0 = round_split(p[j][2 * i], inverse[i]), n1 = round_split(p[j][2 * i + 1], inverse[i]);
            const u32 n2 = round_split(p[j + 1][2 * i], inverse[i]), n3 = round_split(p[j + 1][2 * i + 1], inverse[i]);
            const u32 n01 = __byte_perm(n0, n1, 0x5140), n23 = __byte_perm(n2, n3, 0x5140);
            out.lo[h][w] = __byte_perm(n01, n23, 0x5410) ^ 0x80808080u;
            out.hi[h][w] = __byte_perm(n01, n23, 0x7632);
        }
}

// Whether v * scale * b and v * (scale * b) have the same bits, b being a power of two or zero: they do where no product
// leaves the range of normal numbers (|v| is 0, or between 1 and 2^29).
__device__ __forceinline__ bool is_plain(f32 scale, f32 b) {
    return scale != scale || scale == 0.0f || (scale < 1e27f && (b == 0.0f || fabsf(__fmul_rn(scale, b)) >= 1.17549435e-38f));
}

// Joins a tile's values, weighted, to the span: out[2 s + n][2 i + c] is column i's dimension 16 s + 8 n + 2 t + c.
template <bool PLAIN>
__device__ __forceinline__ void gather(f32 (&out)[2 * SLABS][4], const Weights& w, const u8* unit, const f32 (&a)[2], const f32 (&b)[2]) {
    const u32 lane = threadIdx.x % 32;
    const f32 factor[2] = {__fmul_rn(w.scale[0], b[0]), __fmul_rn(w.scale[1], b[1])};
#pragma unroll
    for (u32 s = 0; s < SLABS; s++) {
        i32 hh[2][4] = {}, hl[2][4] = {};
#pragma unroll
        for (u32 h = 0; h < VALUE_CHUNKS; h++) {
            const u8* const at = unit + fragment_at(s * VALUE_CHUNKS + h, lane);
            const uint4 hi = *(const uint4*)at, lo = *(const uint4*)(at + PLANE_BYTES);
            mma_k32<true>(hh[0], w.hi[h], hi.x, hi.y);
            mma_k32<true>(hh[1], w.hi[h], hi.z, hi.w);
            mma_k32<true>(hl[0], w.lo[h], hi.x, hi.y);
            mma_k32<true>(hl[1], w.lo[h], hi.z, hi.w);
            mma_k32<true>(hl[0], w.hi[h], lo.x, lo.y);
            mma_k32<true>(hl[1], w.hi[h], lo.z, lo.w);
        }
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                const f32 v = join_exact(hh[n][c], hl[n][c]);
                const f32 y = PLAIN ? __fmul_rn(v, factor[c / 2]) : __fmul_rn(__fmul_rn(v, w.scale[c / 2]), b[c / 2]);
                out[2 * s + n][c] = __fmaf_rn(out[2 * s + n][c], a[c / 2], y);
            }
    }
}

// Joins `next` to `state` for the columns that are `seen`; for the others a = 1 and b = -0, which leave every bit of what a
// product a x + b y is made of as it was (y being +0 or finite).
__device__ __forceinline__ void meet_seen(State& state, const State& next, const bool (&seen)[2], f32 (&a)[2], f32 (&b)[2]) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        f32 exponent = state.exponent[i];
        const Factors f = meet(exponent, next.exponent[i]);
        a[i] = seen[i] ? f.a : 1.0f;
        b[i] = seen[i] ? f.b : -0.0f;
        if (seen[i]) {
            state.sum[i] = merge(state.sum[i], next.sum[i], f);
            state.exponent[i] = exponent;
        }
    }
}

// The columns' running results: the span under way in registers, the spans before it in shared memory, where a thread
// meets only what it wrote itself.
struct Running {
    State span, total;
    f32 out[2 * SLABS][4];
    float4* before;  // [HD / 8], 32 apart
};

__device__ __forceinline__ void clear(Running& r) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) r.span.exponent[i] = FLOOR, r.span.sum[i] = 0.0f;
#pragma unroll
    for (u32 n = 0; n < 2 * SLABS; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) r.out[n][c] = 0.0f;
}

// The span joins the ones before it, and the next starts from nothing.
__device__ __forceinline__ void end_span(Running& r, const bool (&seen)[2]) {
    f32 a[2], b[2];
    meet_seen(r.total, r.span, seen, a, b);
#pragma unroll
    for (u32 n = 0; n < 2 * SLABS; n++) {
        float4 v = r.before[n * 32];
        v.x = __fmaf_rn(v.x, a[0], __fmul_rn(r.out[n][0], b[0]));
        v.y = __fmaf_rn(v.y, a[0], __fmul_rn(r.out[n][1], b[0]));
        v.z = __fmaf_rn(v.z, a[1], __fmul_rn(r.out[n][2], b[1]));
        v.w = __fmaf_rn(v.w, a[1], __fmul_rn(r.out[n][3], b[1]));
        r.before[n * 32] = v;
    }
    clear(r);
}

// The ring and where the stream stands in it. `next` counts units over all sequences of the block.
struct Ring {
    u8* stages;
    u64 *full, *empty;

    __device__ __forceinline__ u8* stage(u32 unit) const { return stages + unit % STAGES * STAGE_BYTES; }
    // Whose turn it is to copy a unit.
    __device__ __forceinline__ bool mine(u32 unit) const { return threadIdx.x / 32 == unit % WARPS; }
    // A warp copies a unit into its stage once all warps have left the one before.
    __device__ __forceinline__ void fill(u32 unit, const u8* from, u32 bytes) const {
        if (unit >= STAGES) mbarrier_wait(empty + unit % STAGES, unit / STAGES + 1 & 1);
        copy_stage(stage(unit), from, bytes, full + unit % STAGES);
    }
    __device__ __forceinline__ const u8* wait(u32 unit) const {
        mbarrier_wait(full + unit % STAGES, unit / STAGES & 1);
        return stage(unit);
    }
    __device__ __forceinline__ void leave(u32 unit) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + unit % STAGES);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend_stream(const f32* q, const u8* layer, Step step, f32 score_scale, f32* attn) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u8* const shared = dynamic_shared<u8>();
    Ring ring = {shared, (u64*)(shared + BARRIERS_AT), (u64*)(shared + BARRIERS_AT) + STAGES};
    launch_dependents();
    require_shared(SHARED_BYTES);
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) mbarrier_init(ring.full + s, FULL_ARRIVALS), mbarrier_init(ring.empty + s, WARPS);
        mbarrier_fence();
    }
    __syncthreads();
    wait_dependencies();

    const u32 unit_of_work = gridDim.x - 1 - blockIdx.x;
    const u32 kv_head = unit_of_work % KV_HEADS, first = unit_of_work / KV_HEADS * ROWS;
    const Columns own = own_columns(step, first);
    Queries queries;
    round_queries(queries, q, own, first, kv_head, score_scale);

    Running r;
    r.before = (float4*)(shared + TOTAL_AT) + warp * (HEAD_DIM / 8) * 32 + lane;
    clear(r);
    r.total = r.span;
#pragma unroll
    for (u32 n = 0; n < 2 * SLABS; n++) r.before[n * 32] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    const u32 end = min(first + ROWS, step.rows);
    u32 base = 0;  // units of the sequences before
    for (u32 row = first; row < end;) {
        const u32 sequence = step.sequence[row];
        u32 past = row + 1;
        while (past < end && step.sequence[past] == sequence) past++;
        const u32 tiles = step.position[past - 1] / BLOCK + 1;
        const u32* const table = step.tables + (u64)sequence * step.stride;
        const auto fill = [&](u32 unit) {
            if (unit >= 2 * tiles || !ring.mine(base + unit)) return;
            const u8* const tile = tile_at(layer, table[unit / 2], kv_head);
            ring.fill(base + unit, tile + (unit % 2 ? VALUES_AT : KEYS_AT), unit % 2 ? VALUE_UNIT : KEY_UNIT);
        };
        for (u32 unit = 0; unit < AHEAD; unit++) fill(unit);

        const bool here[2] = {own.sequence[0] == sequence, own.sequence[1] == sequence};
        bool in_span[2] = {false, false};
        for (u32 tile = 0; tile < tiles; tile++) {
            const u32 keys = base + 2 * tile, values = keys + 1;
            const i32 start = (i32)(tile * BLOCK);
            const i32 limit[2] = {here[0] ? own.position[0] - start : -1, here[1] ? own.position[1] - start : -1};
            const bool seen[2] = {limit[0] >= 0, limit[1] >= 0};
            const bool any = __any_sync(0xffffffffu, seen[0] || seen[1]);
            Weights weights;
            f32 a[2], b[2];
            fill(2 * tile + AHEAD);
            const u8* unit = ring.wait(keys);
            if (any) {
                f32 p[8][4];
                scores_of(p, queries, unit);
                if (__all_sync(0xffffffffu, min(limit[0], limit[1]) >= (i32)BLOCK - 1)) {
                    weigh<false>(weights, p, unit, limit);
                } else {
                    weigh<true>(weights, p, unit, limit);
                }
                meet_seen(r.span, weights.state, seen, a, b);
                in_span[0] |= seen[0], in_span[1] |= seen[1];
            }
            ring.leave(keys);
            fill(2 * tile + 1 + AHEAD);
            unit = ring.wait(values);
            if (any) {
                const bool plain = is_plain(weights.scale[0], b[0]) && is_plain(weights.scale[1], b[1]);
                if (__all_sync(0xffffffffu, plain)) {
                    gather<true>(r.out, weights, unit, a, b);
                } else {
                    gather<false>(r.out, weights, unit, a, b);
                }
            }
            ring.leave(values);
            if (tile % SPAN_TILES == SPAN_TILES - 1 || tile + 1 == tiles) {
                if (__any_sync(0xffffffffu, in_span[0] || in_span[1])) end_span(r, in_span);
                in_span[0] = in_span[1] = false;
            }
        }
        base += 2 * tiles;
        row = past;
    }

#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (own.sequence[i] == NONE) continue;
        const f32 inverse = __fdiv_rn(1.0f, r.total.sum[i]);
        f32* const to = attn + head_of(own_column(i), true, first, kv_head) + fragment_quad() * 2;
#pragma unroll
        for (u32 n = 0; n < 2 * SLABS; n++) {
            const float4 v = r.before[n * 32];
            const float2 pair = i ? make_float2(v.z, v.w) : make_float2(v.x, v.y);
            *(float2*)(to + n * 8) = make_float2(__fmul_rn(pair.x, inverse), __fmul_rn(pair.y, inverse));
        }
    }
}
