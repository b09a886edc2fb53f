// Attention of many rows on Hopper (cpu::attention, rule 5): warpgroups in pairs, one of which makes probabilities while the
// other multiplies them with the values.
//
// q [T][H][HD], the layer's cache; attn [T][H][HD]. Columns and orders of reductions: stream.cuh. A block has two pairs of 64
// columns each. Grid: ceil(T / ROWS) KH, the last rows, which see most keys, first. In a pair
// - the scorers multiply their queries, which lie in shared memory, with a tile's keys, and turn scores into probabilities
//   in fixed point; they alone know exponents and sums;
// - the gatherers multiply those with the tile's values and join them, with the factors that the scorers found, to the span
//   in their registers, and the span to what is before it in shared memory.
// What a scorer's thread hands over, the gatherers' thread of the same number takes: two hands' room, so that neither
// waits for the other tile by tile. Keys and values come through a ring each (ring.cuh), filled by the warps that read it
// in turn.
// Bytes: 4 KH HD of cache a key and run of rows; 8 H HD a row. Work: 12 HD multiply-adds in int8 a score, and about 45
// other instructions.
#include "ring.cuh"
#include "stream.cuh"
#include "wgmma.cuh"

constexpr u32 PAIRS = 2, GROUPS_COLUMNS = 64;  // of warpgroups; columns of each
constexpr u32 SIDE = PAIRS * 128, THREADS = 2 * SIDE;  // threads that score, and that gather
constexpr u32 ROWS = PAIRS * GROUPS_COLUMNS / GROUP;
constexpr u32 KEY_STAGES = 3, VALUE_STAGES = 2, HANDS = 2;
constexpr u32 KEY_UNIT = VALUES_AT, VALUE_UNIT = TILE_BYTES - VALUES_AT;
constexpr u32 QUERY_PLANE = GROUPS_COLUMNS * HEAD_DIM;
// Registers of a thread; 128 on average.
constexpr u32 SCORER_REGISTERS = 120, GATHERER_REGISTERS = 136;

// What a tile's scorers hand over.
struct Hand {
    uint4 planes[2 * VALUE_CHUNKS][128];     // of each thread: a step's words of the high plane, ...; of the low plane, ...
    float4 factors[GROUPS_COLUMNS];          // what there was times a, plus values times scale times b: a, b, scale, scale b
    float2 ends[GROUPS_COLUMNS];             // where a span ends: the same for what was before it; in the end 1 / sum
    u32 plain[4];                            // whether a warp's columns have `is_plain` factors
};

// Shared memory, from the first multiple of ATOM on; launch/attend.rs knows its size too.
struct Shared {
    u8 keys[KEY_STAGES][KEY_UNIT];
    u8 values[VALUE_STAGES][VALUE_UNIT];
    u8 queries[PAIRS][2][QUERY_PLANE];       // planes, as atoms of 8 columns
    float4 before[SIDE / 32][HEAD_DIM / 8][32];  // what the spans before add up to
    Hand hands[PAIRS][HANDS];
    u64 key_full[KEY_STAGES], key_empty[KEY_STAGES];
    u64 value_full[VALUE_STAGES], value_empty[VALUE_STAGES];
    u64 hand_full[PAIRS][HANDS], hand_empty[PAIRS][HANDS];
};
constexpr u32 SHARED_BYTES = sizeof(Shared) + ATOM;

// What the host may launch: longer heads do not fit the registers.
constexpr bool FITS = HAS_WGMMA && HEAD_DIM % 64 == 0 && HEAD_DIM <= 128;

#if HAS_WGMMA

// A ring of one side's units.
template <u32 STAGES, u32 BYTES> struct Ring {
    u8 (*stages)[BYTES];
    u64 *full, *empty;

    // One of the side's warps, in turn, copies a unit into its stage, once all have left the one before.
    __device__ __forceinline__ void fill(u32 unit, const u8* from) const {
        if (threadIdx.x % SIDE / 32 != unit % (SIDE / 32)) return;
        if (unit >= STAGES) mbarrier_wait(empty + unit % STAGES, unit / STAGES + 1 & 1);
        copy_stage(stages[unit % STAGES], from, BYTES, full + unit % STAGES);
    }
    __device__ __forceinline__ const u8* wait(u32 unit) const {
        mbarrier_wait(full + unit % STAGES, unit / STAGES & 1);
        return stages[unit % STAGES];
    }
    __device__ __forceinline__ void leave(u32 unit) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + unit % STAGES);
    }
};
typedef Ring<KEY_STAGES, KEY_UNIT> KeyRing;
typedef Ring<VALUE_STAGES, VALUE_UNIT> ValueRing;

// The hands of a pair, of which `count` have been passed on by this side.
struct Hands {
    Hand* hands;
    u64 *full, *empty;
    u32 count;

    __device__ __forceinline__ Hand& free() const {
        if (count >= HANDS) mbarrier_wait(empty + count % HANDS, count / HANDS + 1 & 1);
        return hands[count % HANDS];
    }
    __device__ __forceinline__ const Hand& filled() const {
        mbarrier_wait(full + count % HANDS, count / HANDS & 1);
        return hands[count % HANDS];
    }
    __device__ __forceinline__ void pass(u64* barriers) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers + count % HANDS);
        count++;
    }
};

// What both sides know.
struct Work {
    Step step;
    const u8* layer;
    u32 kv_head, first, end;  // rows
    u32 pair, warp;           // of the pair; of its warpgroup

    __device__ __forceinline__ Run run(u32 row) const { return Run(step, first, row, end, pair * GROUPS_COLUMNS, GROUPS_COLUMNS); }
    __device__ __forceinline__ Columns columns() const { return own_columns(step, first, ROWS, pair * GROUPS_COLUMNS + warp * 16); }
    __device__ __forceinline__ const u8* tile(const Run& run, u32 tile) const {
        return tile_at(layer, step.tables[(u64)run.sequence * step.stride + tile], kv_head);
    }
};

// Scores of the pair's columns against a tile: score[j][2 i + c] is column i's with key 8 j + 2 t + c.
__device__ __forceinline__ void scores_of(f32 (&score)[8][4], const u8* queries, const f32 (&scale)[2], const u8* unit) {
    const Panel64 key(unit, KEY_ROWS), query(queries, KEY_ROWS);
    i32 hh[32], hl[32];
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < KEY_CHUNKS; k++) {
        const Panel64 hi = key.at(step_at(k)), lo = key.at(PLANE_BYTES + step_at(k));
        const Panel64 q_hi = query.at(step_at(k)), q_lo = query.at(QUERY_PLANE + step_at(k));
        wgmma_shared(hh, q_hi, hi, k > 0);
        wgmma_shared(hl, q_lo, hi, k > 0);
        wgmma_shared(hl, q_hi, lo, true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(hh);
    wgmma_settle(hl);
    const float2* const scales = (const float2*)(unit + SCALES_AT);
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const float2 key_scale = scales[j * 4 + fragment_quad()];
#pragma unroll
        for (u32 c = 0; c < 4; c++)
            score[j][c] = __fmul_rn(join_exact(hh[j * 4 + c], hl[j * 4 + c]), __fmul_rn(scale[c / 2], c % 2 ? key_scale.y : key_scale.x));
    }
}

// The pair's queries in fixed point, to shared memory; the scales of the thread's two columns.
__device__ __forceinline__ void place_queries(f32 (&scale)[2], u8* queries, const Columns& own, const f32* q, const Work& work, f32 score_scale) {
    Queries rounded;
    round_queries(rounded, q, own, work.first, work.kv_head, score_scale);
#pragma unroll
    for (u32 i = 0; i < 2; i++) scale[i] = rounded.scale[i];
#pragma unroll
    for (u32 k = 0; k < KEY_CHUNKS; k++)
#pragma unroll
        for (u32 w = 0; w < 4; w++) {
            const u32 d = k * 32 + w / 2 * 16 + fragment_quad() * 4;
            u8* const to = queries + (work.warp * 2 + w % 2) * KEY_ROWS + byte_at(fragment_row(), d, HEAD_DIM);
            *(u32*)to = rounded.hi[k][w];
            *(u32*)(to + QUERY_PLANE) = rounded.lo[k][w];
        }
    wgmma_see_shared();
    barrier_sync(1 + work.pair, 128);
}

// Of a column's two values in a thread, the one that two of its four threads hand over.
__device__ __forceinline__ f32 pick(const f32 (&x)[2]) { return fragment_quad() % 2 ? x[1] : x[0]; }

__device__ __forceinline__ void fill_hand(Hand& hand, const Weights& w, const f32 (&a)[2], const f32 (&b)[2], u32 warp) {
    const u32 thread = threadIdx.x % 128, column = warp * 16 + fragment_row() + fragment_quad() % 2 * 8;
#pragma unroll
    for (u32 h = 0; h < VALUE_CHUNKS; h++) {
        const u32(&hi)[4] = w.planes.hi[h], (&lo)[4] = w.planes.lo[h];
        hand.planes[h][thread] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
        hand.planes[VALUE_CHUNKS + h][thread] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
    }
    const f32 scale = pick(w.scale), own_b = pick(b);
    const bool plain = __all_sync(0xffffffffu, is_plain(scale, own_b));
    if (fragment_quad() < 2) hand.factors[column] = make_float4(pick(a), own_b, scale, __fmul_rn(scale, own_b));
    if (threadIdx.x % 32 == 0) hand.plain[warp] = plain;
}

__device__ __forceinline__ void score_side(Shared& s, const Work& work, const f32* q, f32 score_scale) {
    const KeyRing ring = {s.keys, s.key_full, s.key_empty};
    Hands hands = {s.hands[work.pair], s.hand_full[work.pair], s.hand_empty[work.pair], 0};
    const Columns own = work.columns();
    const u32 column = work.warp * 16 + fragment_row() + fragment_quad() % 2 * 8;
    u8* const queries = s.queries[work.pair][0];
    f32 scale[2];
    place_queries(scale, queries, own, q, work, score_scale);
    State span, total;
    clear(span);
    clear(total);
    u32 base = 0;  // units of the sequences before
    for (u32 row = work.first; row < work.end;) {
        const Run run = work.run(row);
        const auto fill = [&](u32 tile) {
            if (tile < run.tiles) ring.fill(base + tile, work.tile(run, tile) + KEYS_AT);
        };
        for (u32 tile = 0; tile + 1 < KEY_STAGES; tile++) fill(tile);
        bool in_span[2] = {false, false};
        for (u32 tile = 0; tile < run.tiles; tile++) {
            fill(tile + KEY_STAGES - 1);
            const u8* const unit = ring.wait(base + tile);
            if (tile >= run.seen) {
                ring.leave(base + tile);
                continue;
            }
            i32 limit[2];
            bool seen[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                limit[i] = own.sequence[i] == run.sequence ? own.position[i] - (i32)(tile * BLOCK) : -1;
                seen[i] = limit[i] >= 0;
                in_span[i] |= seen[i];
            }
            f32 p[8][4], a[2], b[2];
            Weights weights;
            scores_of(p, queries, scale, unit);
            if (__all_sync(0xffffffffu, min(limit[0], limit[1]) >= (i32)BLOCK - 1)) {
                weigh<false>(weights, p, unit, limit);
            } else {
                weigh<true>(weights, p, unit, limit);
            }
            ring.leave(base + tile);
            meet_seen(span, weights.state, seen, a, b);
            Hand& hand = hands.free();
            fill_hand(hand, weights, a, b, work.warp);
            if (run.ends_span(tile)) {
                meet_seen(total, span, in_span, a, b);
                if (fragment_quad() < 2) hand.ends[column] = make_float2(pick(a), pick(b));
                clear(span);
                in_span[0] = in_span[1] = false;
            }
            hands.pass(hands.full);
        }
        base += run.tiles;
        row = run.past;
    }
    Hand& hand = hands.free();
    if (fragment_quad() < 2) hand.ends[column] = make_float2(__fdiv_rn(1.0f, pick(total.sum)), 0.0f);
    hands.pass(hands.full);
}

// A thread's results of a span: out[4 s + n][2 i + c] is column i's dimension 32 s + 8 n + 2 t + c.
typedef f32 Results[2 * SLABS][4];

// Joins a tile's values to the span, 32 dimensions at a time.
__device__ __forceinline__ void gather(Results& out, const Planes& w, const float4 (&factors)[2], bool plain, const u8* unit) {
    const Panel64 values(unit, VALUE_ROWS);
    const f32 a[2] = {factors[0].x, factors[1].x}, b[2] = {factors[0].y, factors[1].y};
    const f32 scale[2] = {factors[0].z, factors[1].z}, both[2] = {factors[0].w, factors[1].w};
#pragma unroll
    for (u32 part = 0; part < HEAD_DIM / 32; part++) {
        i32 hh[16], hl[16], v[4][4];
        wgmma_fence();
#pragma unroll
        for (u32 h = 0; h < VALUE_CHUNKS; h++) {
            const Panel64 hi = values.at(part * 4 * VALUE_ROWS + step_at(h)), lo = values.at(part * 4 * VALUE_ROWS + step_at(h) + PLANE_BYTES);
            wgmma<32, true>(hh, w.hi[h], hi, h > 0);
            wgmma<32, true>(hl, w.lo[h], hi, h > 0);
            wgmma<32, true>(hl, w.hi[h], lo, true);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(hh);
        wgmma_settle(hl);
        join_planes(v, hh, hl);
        if (plain) {
            join_values<true>(out + part * 4, v, both, a, b);
        } else {
            join_values<false>(out + part * 4, v, scale, a, b);
        }
    }
}

__device__ __forceinline__ void gather_side(Shared& s, const Work& work, f32* attn) {
    const ValueRing ring = {s.values, s.value_full, s.value_empty};
    Hands hands = {s.hands[work.pair], s.hand_full[work.pair], s.hand_empty[work.pair], 0};
    const u32 thread = threadIdx.x % 128, lane = threadIdx.x % 32, column = work.warp * 16 + fragment_row();
    float4(*const before)[32] = s.before[work.pair * 4 + work.warp];
    Results out;
#pragma unroll
    for (u32 n = 0; n < 2 * SLABS; n++) {
        before[n][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (u32 c = 0; c < 4; c++) out[n][c] = 0.0f;
    }
    u32 base = 0;
    for (u32 row = work.first; row < work.end;) {
        const Run run = work.run(row);
        const auto fill = [&](u32 tile) {
            if (tile < run.tiles) ring.fill(base + tile, work.tile(run, tile) + VALUES_AT);
        };
        for (u32 tile = 0; tile + 1 < VALUE_STAGES; tile++) fill(tile);
        for (u32 tile = 0; tile < run.tiles; tile++) {
            fill(tile + VALUE_STAGES - 1);
            const u8* const unit = ring.wait(base + tile);
            if (tile < run.seen) {
                const bool ends = run.ends_span(tile);
                const Hand& hand = hands.filled();
                Planes w;
#pragma unroll
                for (u32 h = 0; h < VALUE_CHUNKS; h++) {
                    const uint4 hi = hand.planes[h][thread], lo = hand.planes[VALUE_CHUNKS + h][thread];
                    w.hi[h][0] = hi.x, w.hi[h][1] = hi.y, w.hi[h][2] = hi.z, w.hi[h][3] = hi.w;
                    w.lo[h][0] = lo.x, w.lo[h][1] = lo.y, w.lo[h][2] = lo.z, w.lo[h][3] = lo.w;
                }
                const float4 factors[2] = {hand.factors[column], hand.factors[column + 8]};
                const float2 end[2] = {hand.ends[column], hand.ends[column + 8]};
                const bool plain = hand.plain[work.warp];
                hands.pass(hands.empty);
                gather(out, w, factors, plain, unit);
                if (ends) {
#pragma unroll
                    for (u32 n = 0; n < 2 * SLABS; n++) {
                        float4 v = before[n][lane];
                        v.x = __fmaf_rn(v.x, end[0].x, __fmul_rn(out[n][0], end[0].y));
                        v.y = __fmaf_rn(v.y, end[0].x, __fmul_rn(out[n][1], end[0].y));
                        v.z = __fmaf_rn(v.z, end[1].x, __fmul_rn(out[n][2], end[1].y));
                        v.w = __fmaf_rn(v.w, end[1].x, __fmul_rn(out[n][3], end[1].y));
                        before[n][lane] = v;
#pragma unroll
                        for (u32 c = 0; c < 4; c++) out[n][c] = 0.0f;
                    }
                }
            }
            ring.leave(base + tile);
        }
        base += run.tiles;
        row = run.past;
    }

    const Hand& hand = hands.filled();
    const Columns own = work.columns();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (own.sequence[i] == NONE) continue;
        const f32 inverse = hand.ends[column + i * 8].x;
        f32* const to = attn + head_of(own.column[i], true, work.first, work.kv_head) + fragment_quad() * 2;
#pragma unroll
        for (u32 n = 0; n < 2 * SLABS; n++) {
            const float4 v = before[n][lane];
            const float2 two = i ? make_float2(v.z, v.w) : make_float2(v.x, v.y);
            *(float2*)(to + n * 8) = make_float2(__fmul_rn(two.x, inverse), __fmul_rn(two.y, inverse));
        }
    }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend_groups(const f32* q, const u8* layer, Step step, f32 score_scale, f32* attn) {
    launch_dependents();
    require_shared(SHARED_BYTES);
    if constexpr (!FITS) {
        wait_dependencies();
        __trap();
    }
#if HAS_WGMMA
    else {
        u8* const start = dynamic_shared<u8>();
        Shared& s = *(Shared*)(start + shared_padding(start, ATOM));
        if (threadIdx.x == 0) {
            for (u32 i = 0; i < KEY_STAGES; i++) mbarrier_init(s.key_full + i, FULL_ARRIVALS), mbarrier_init(s.key_empty + i, SIDE / 32);
            for (u32 i = 0; i < VALUE_STAGES; i++) mbarrier_init(s.value_full + i, FULL_ARRIVALS), mbarrier_init(s.value_empty + i, SIDE / 32);
            for (u32 i = 0; i < PAIRS * HANDS; i++) mbarrier_init(s.hand_full[0] + i, 4), mbarrier_init(s.hand_empty[0] + i, 4);
            mbarrier_fence();
        }
        __syncthreads();
        wait_dependencies();
        const u32 unit = gridDim.x - 1 - blockIdx.x, first = unit / KV_HEADS * ROWS;
        const Work work = {step, layer, unit % KV_HEADS, first, min(first + ROWS, step.rows), threadIdx.x / 128 % PAIRS, threadIdx.x / 32 % 4};
        if (threadIdx.x < SIDE) {
            registers_less<SCORER_REGISTERS>();
            score_side(s, work, q, score_scale);
        } else {
            registers_more<GATHERER_REGISTERS>();
            gather_side(s, work, attn);
        }
    }
#endif
}
