// What both kernels of attention of many rows share (cpu::attention, rule 5): the floats between the two integer products.
//
// A column is a query head of a row; the GROUP heads of a KV head and some rows are a block's columns, 16 to a warp. In a
// warp, columns are the rows of the tensor-core products: a thread holds two of them (g and g + 8) and of each the 16 keys
// of a tile that are 2t and 2t + 1 (mod 8), t = lane % 4. So scores, probabilities and the operand of the value product are
// the same registers of the same thread.
//
// Order of reductions: the sum of p, partial i is p[i] + p[i + 32], then a butterfly 16, 8 (registers), 4, 2 (lanes), 1
// (registers); maxima and products exact; tiles, then spans, in order. Rows of several sequences in one block: their
// sequences are streamed one after the other, and a column takes part in those tiles that its row sees (`seen`).
#pragma once
#include "attend.cuh"

constexpr u32 SLABS = HEAD_DIM / 16;  // of 16 dimensions

// What a thread keeps of its two columns.
struct Columns {
    u32 column[2];    // among the block's
    i32 position[2];
    u32 sequence[2];  // NONE: no such column
};
constexpr u32 NONE = 0xffffffffu;

// 16 columns of a warp as the A operand: a word of each plane for every step of 32, and the scale of each of the thread's two.
struct Queries {
    u32 hi[KEY_CHUNKS][4], lo[KEY_CHUNKS][4];
    f32 scale[2];
};

// A tile's probabilities in fixed point, likewise.
struct Planes {
    u32 hi[VALUE_CHUNKS][4], lo[VALUE_CHUNKS][4];
};

// What some keys contribute to a thread's two columns.
struct State {
    f32 exponent[2], sum[2];
};

__device__ __forceinline__ void clear(State& s) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) s.exponent[i] = FLOOR, s.sum[i] = 0.0f;
}

// Where step k of 32 values begins in eight rows.
__device__ __forceinline__ constexpr u32 step_at(u32 k) { return k / 2 * ATOM + k % 2 * 32; }

// 256 HH + HL of 32 elements: accumulators of the next ones are [16] here and [4][4] there.
__device__ __forceinline__ void join_planes(i32 (&v)[4][4], const i32* hh, const i32* hl) {
#pragma unroll
    for (u32 n = 0; n < 4; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) v[n][c] = hh[n * 4 + c] * 256 + hl[n * 4 + c];
}

// Where a column's head begins in rows of [H][HD]; for a column that is not there, where the first one's does.
__device__ __forceinline__ u64 head_of(u32 column, bool there, u32 first, u32 kv_head) {
    if (!there) column = 0;
    return ((u64)(first + column / GROUP) * HEADS + kv_head * GROUP + column % GROUP) * HEAD_DIM;
}

// The thread's columns of a warp whose columns begin at `warp_column`, in a block of `rows` rows.
__device__ __forceinline__ Columns own_columns(const Step& step, u32 first, u32 rows, u32 warp_column) {
    Columns c;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        c.column[i] = warp_column + i * 8 + fragment_row();
        const u32 row = first + c.column[i] / GROUP;
        const bool there = c.column[i] < rows * GROUP && row < step.rows;
        c.position[i] = there ? (i32)step.position[row] : -1;
        c.sequence[i] = there ? step.sequence[row] : NONE;
    }
    return c;
}

// Rows of one sequence, one after the other, of those of a block; and how far a team of warps sees in it.
struct Run {
    u32 sequence;
    u32 past;   // the row after the last
    u32 tiles;  // that its last row sees
    u32 seen;   // that the team's last row in it sees

    // From row `row` on, of a block's rows `first` to `end - 1`; the team's columns are `columns` from `column` on.
    __device__ __forceinline__ Run(const Step& step, u32 first, u32 row, u32 end, u32 column, u32 columns) {
        sequence = step.sequence[row];
        past = row + 1;
        while (past < end && step.sequence[past] == sequence) past++;
        tiles = step.position[past - 1] / BLOCK + 1;
        const u32 from = max(row, first + column / GROUP), to = min(past, first + (column + columns - 1) / GROUP + 1);
        seen = from < to ? step.position[to - 1] / BLOCK + 1 : 0;
    }
    // Whether a span ends with this tile, for the team.
    __device__ __forceinline__ bool ends_span(u32 tile) const { return tile % SPAN_TILES == SPAN_TILES - 1 || tile + 1 == seen; }
};

// Rounds the warp's columns (a head is one block of fixed point); the four threads of a column hold it together.
__device__ __forceinline__ void round_queries(Queries& out, const f32* q, const Columns& own, u32 first, u32 kv_head, f32 score_scale) {
    const u32 quad = fragment_quad();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const f32* const from = q + head_of(own.column[i], own.sequence[i] != NONE, first, kv_head) + quad * 4;
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

// A tile's probabilities in fixed point, the A operand of the value product, and what goes with them.
struct Weights {
    Planes planes;
    f32 scale[2];  // of a column's integer products
    State state;
};

// From scores to probabilities. `limit`: the last key of the tile that each column sees, 63 or more for all of them.
template <bool MASKED>
__device__ __forceinline__ void weigh(Weights& out, f32 (&p)[8][4], const u8* unit, const i32 (&limit)[2]) {
    const u32 quad = fragment_quad();
    const f32 none = __uint_as_float(0xff800000u);
    // Floats that are not negative order as integers do, NaN above all: three at a time, which floats cannot.
    i32 most[2] = {(i32)0x80000000, (i32)0x80000000};
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            if (MASKED && (i32)(j * 8 + quad * 2) > limit[i]) p[j][2 * i] = none;
            if (MASKED && (i32)(j * 8 + quad * 2 + 1) > limit[i]) p[j][2 * i + 1] = none;
            most[i] = max(max(most[i], __float_as_int(p[j][2 * i])), __float_as_int(p[j][2 * i + 1]));
        }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        most[i] = max(most[i], __shfl_xor_sync(0xffffffffu, most[i], 1));
        most[i] = max(most[i], __shfl_xor_sync(0xffffffffu, most[i], 2));
    }
    // Negative ones order the other way round.
    if (__any_sync(0xffffffffu, most[0] < 0 || most[1] < 0)) {
        i32 least[2] = {0x7fffffff, 0x7fffffff};
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 i = 0; i < 2; i++)
                least[i] = min(min(least[i], __float_as_int(p[j][2 * i])), __float_as_int(p[j][2 * i + 1]));
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            least[i] = min(least[i], __shfl_xor_sync(0xffffffffu, least[i], 1));
            least[i] = min(least[i], __shfl_xor_sync(0xffffffffu, least[i], 2));
            if (most[i] < 0) most[i] = least[i];
        }
    }
    bool bad[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const f32 top = max_nan(__int_as_float(most[i]), FLOOR);
        bad[i] = !(top < __uint_as_float(0x7f800000u));
        out.state.exponent[i] = bad[i] ? 0.0f : ceilf(top);
    }
    // Unless a tile has a probability below 2^-125, powers of two take two operations less.
    u32 deepest = 0;
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            p[j][2 * i] = __fsub_rn(p[j][2 * i], out.state.exponent[i]);
            p[j][2 * i + 1] = __fsub_rn(p[j][2 * i + 1], out.state.exponent[i]);
            deepest = max(max(deepest, __float_as_uint(p[j][2 * i])), __float_as_uint(p[j][2 * i + 1]));
        }
    if (!MASKED && __all_sync(0xffffffffu, deepest <= 0xc2fa0000u)) {
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) p[j][c] = exp2_below<false>(p[j][c]);
    } else {
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) p[j][c] = exp2_below(p[j][c]);
    }
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
            out.planes.lo[h][w] = __byte_perm(n01, n23, 0x5410) ^ 0x80808080u;
            out.planes.hi[h][w] = __byte_perm(n01, n23, 0x7632);
        }
}

// Whether v * scale * b and v * (scale * b) have the same bits, b being a power of two or zero: they do where no product
// leaves the range of normal numbers (|v| is 0, or between 1 and 2^29).
__device__ __forceinline__ bool is_plain(f32 scale, f32 b) {
    return scale != scale || scale == 0.0f || (scale < 1e27f && (b == 0.0f || fabsf(__fmul_rn(scale, b)) >= 1.17549435e-38f));
}

// Joins 32 dimensions of a tile's values to the span: times `scale` and `b`, or, if PLAIN, times `scale`, their product.
template <bool PLAIN>
__device__ __forceinline__ void join_values(f32 (*out)[4], const i32 (&v)[4][4], const f32 (&scale)[2], const f32 (&a)[2], const f32 (&b)[2]) {
#pragma unroll
    for (u32 n = 0; n < 4; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            const f32 x = __fmul_rn(__int2float_rn(v[n][c]), scale[c / 2]);
            out[n][c] = __fmaf_rn(out[n][c], a[c / 2], PLAIN ? x : __fmul_rn(x, b[c / 2]));
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
