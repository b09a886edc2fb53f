// Attention of many rows (cpu::attention, rule 5): a block of threads streams the cache of one KV head past a run of rows.
// The general kernel; attend_groups.cu is Hopper's.
//
// q [T][H][HD], the layer's cache; attn [T][H][HD]. Columns and orders of reductions: stream.cuh. ROWS rows to a block.
// Grid: ceil(T / ROWS) KH, the last rows, which see most keys, first. Keys and values come through a ring (ring.cuh) in
// units: a tile's keys with its scales, then its values.
// Bytes: 4 KH HD of cache a key and run of rows; 8 H HD a row. Work: 12 HD multiply-adds in int8 a score, and about 40
// other operations.
#include "ring.cuh"
#include "stream.cuh"

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
constexpr u32 TOTAL_AT = STAGES * STAGE_BYTES;               // f32 [WARPS][HD / 8][32][4]: what the spans before add up to
constexpr u32 BARRIERS_AT = TOTAL_AT + WARPS * HEAD_DIM * 64;
constexpr u32 SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8;   // launch/attend.rs knows this too

// B operands of two steps for the eight rows of an atom, or of one where its rows are short.
__device__ __forceinline__ void load_rows(u32 (&r)[4], const u8* atom) {
    const u32 lane = threadIdx.x % 32;
    load_matrices(r, atom + piece_at(lane % 8, lane / 8));
}
__device__ __forceinline__ void load_rows(u32 (&r)[2], const u8* atom) {
    const u32 lane = threadIdx.x % 16;
    load_matrices(r, atom + lane % 8 * 32 + lane / 8 * 16);
}

// Steps `k` to `k + N / 2 - 1` for 32 rows of `unit` from `first` on.
template <u32 N, u32 CHUNKS>
__device__ __forceinline__ void multiply_steps(i32 (&hh)[16], i32 (&hl)[16], const u32 (&a_hi)[CHUNKS][4], const u32 (&a_lo)[CHUNKS][4],
                                               u32 k, const u8* at, u32 row_bytes) {
#pragma unroll
    for (u32 n = 0; n < 4; n++) {
        u32 hi[N], lo[N];
        load_rows(hi, at + n * row_bytes + step_at(k));
        load_rows(lo, at + n * row_bytes + step_at(k) + PLANE_BYTES);
        i32(&high)[4] = *(i32(*)[4])(hh + n * 4), (&low)[4] = *(i32(*)[4])(hl + n * 4);
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) {
            mma_k32<true>(high, a_hi[k + i], hi[2 * i], hi[2 * i + 1]);
            mma_k32<true>(low, a_lo[k + i], hi[2 * i], hi[2 * i + 1]);
            mma_k32<true>(low, a_hi[k + i], lo[2 * i], lo[2 * i + 1]);
        }
    }
}

// All steps for `parts` times 32 rows of a unit.
template <u32 CHUNKS, class Sink>
__device__ __forceinline__ void multiply_warp(const u32 (&a_hi)[CHUNKS][4], const u32 (&a_lo)[CHUNKS][4], const u8* unit, u32 row_bytes,
                                              u32 parts, const Sink& sink) {
#pragma unroll
    for (u32 part = 0; part < parts; part++) {
        const u8* const at = unit + part * 4 * row_bytes;
        i32 hh[16] = {}, hl[16] = {};
#pragma unroll
        for (u32 k = 0; k + 1 < CHUNKS; k += 2) multiply_steps<4>(hh, hl, a_hi, a_lo, k, at, row_bytes);
        if constexpr (CHUNKS % 2) multiply_steps<2>(hh, hl, a_hi, a_lo, CHUNKS - 1, at, row_bytes);
        i32 v[4][4];
        join_planes(v, hh, hl);
        sink(part, v);
    }
}

// Scores of the warp's columns against a tile: score[j][2 i + c] is column i's with key 8 j + 2 t + c.
__device__ __forceinline__ void scores_of(f32 (&score)[8][4], const Queries& q, const u8* unit) {
    const float2* const scales = (const float2*)(unit + SCALES_AT);
    multiply_warp(q.hi, q.lo, unit, KEY_ROWS, BLOCK / 32, [&](u32 half, const i32 (&v)[4][4]) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            const u32 j = half * 4 + n;
            const float2 key = scales[j * 4 + fragment_quad()];
#pragma unroll
            for (u32 c = 0; c < 4; c++)
                score[j][c] = __fmul_rn(__int2float_rn(v[n][c]), __fmul_rn(q.scale[c / 2], c % 2 ? key.y : key.x));
        }
    });
}

// Joins a tile's values to the span: out[4 s + n][2 i + c] is column i's dimension 32 s + 8 n + 2 t + c.
__device__ __forceinline__ void gather(f32 (&out)[2 * SLABS][4], const Weights& w, const u8* unit, const f32 (&a)[2], const f32 (&b)[2]) {
    const bool plain = __all_sync(0xffffffffu, is_plain(w.scale[0], b[0]) && is_plain(w.scale[1], b[1]));
    const f32 both[2] = {__fmul_rn(w.scale[0], b[0]), __fmul_rn(w.scale[1], b[1])};
    multiply_warp(w.planes.hi, w.planes.lo, unit, VALUE_ROWS, HEAD_DIM / 32, [&](u32 part, const i32 (&v)[4][4]) {
        if (plain) {
            join_values<true>(out + part * 4, v, both, a, b);
        } else {
            join_values<false>(out + part * 4, v, w.scale, a, b);
        }
    });
}

// The columns' running results: the span under way in registers, the spans before it in shared memory, where a thread
// meets only what it wrote itself.
struct Running {
    State span, total;
    f32 out[2 * SLABS][4];
    float4* before;  // [HD / 8], 32 apart
};

__device__ __forceinline__ void clear(Running& r) {
    clear(r.span);
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
    const Columns own = own_columns(step, first, ROWS, warp * 16);
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
        const Run run(step, first, row, end, warp * 16, 16);
        const u32* const table = step.tables + (u64)run.sequence * step.stride;
        const auto fill = [&](u32 unit) {
            if (unit >= 2 * run.tiles || !ring.mine(base + unit)) return;
            const u8* const tile = tile_at(layer, table[unit / 2], kv_head);
            ring.fill(base + unit, tile + (unit % 2 ? VALUES_AT : KEYS_AT), unit % 2 ? VALUE_UNIT : KEY_UNIT);
        };
        for (u32 unit = 0; unit < AHEAD; unit++) fill(unit);

        const bool here[2] = {own.sequence[0] == run.sequence, own.sequence[1] == run.sequence};
        bool in_span[2] = {false, false};
        for (u32 tile = 0; tile < run.tiles; tile++) {
            const u32 keys = base + 2 * tile, values = keys + 1;
            const i32 start = (i32)(tile * BLOCK);
            const i32 limit[2] = {here[0] ? own.position[0] - start : -1, here[1] ? own.position[1] - start : -1};
            const bool seen[2] = {limit[0] >= 0, limit[1] >= 0};
            const bool any = tile < run.seen;
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
                gather(r.out, weights, unit, a, b);
            }
            ring.leave(values);
            if (any && run.ends_span(tile)) {
                end_span(r, in_span);
                in_span[0] = in_span[1] = false;
            }
        }
        base += 2 * run.tiles;
        row = run.past;
    }

#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (own.sequence[i] == NONE) continue;
        const f32 inverse = __fdiv_rn(1.0f, r.total.sum[i]);
        f32* const to = attn + head_of(own.column[i], true, first, kv_head) + fragment_quad() * 2;
#pragma unroll
        for (u32 n = 0; n < 2 * SLABS; n++) {
            const float4 v = r.before[n * 32];
            const float2 pair = i ? make_float2(v.z, v.w) : make_float2(v.x, v.y);
            *(float2*)(to + n * 8) = make_float2(__fmul_rn(pair.x, inverse), __fmul_rn(pair.y, inverse));
        }
    }
}
