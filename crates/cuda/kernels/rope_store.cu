// Norms of the heads, rotation, and the step's keys and values into the cache: cpu::stages::rope_store, cpu::cache::store.
//
// q [T][H][HD] becomes the rotated queries; k and v [T][KH][HD] stay as projected. A warp takes one head of one row: a
// query, a key or a value. Grid: ceil(T (H + 2 KH) / 8). Sum of squares: lane p is partial p and takes d = p (mod 32)
// ascending, then a butterfly 16 ... 1. Bytes a row: 8 H HD + 8 KH HD of floats, 4 KH HD of planes.
#include "cache.cuh"
#include "head.cuh"

constexpr u32 WARPS = 8;
constexpr u32 HALF = HEAD_DIM / 2;
constexpr u32 UNITS = HEADS + 2 * KV_HEADS;  // heads of a row

extern "C" __global__ void __launch_bounds__(WARPS * 32)
rope_store(f32* q, const f32* k, const f32* v, const f32* q_norm, const f32* k_norm, const f32* rope, Step step, u8* layer) {
    const u32 lane = threadIdx.x % 32, unit = blockIdx.x * WARPS + threadIdx.x / 32;
    f32* const head = dynamic_shared<f32>() + threadIdx.x / 32 * HEAD_DIM;  // [WARPS][HD]: halves of a head meet here
    const u32 row = unit / UNITS, which = unit % UNITS;
    const bool is_query = which < HEADS, is_value = which >= HEADS + KV_HEADS;
    const f32* const norm = is_query ? q_norm : k_norm;
    f32 x[OWN], weight[OWN];
#pragma unroll
    for (u32 i = 0; i < OWN; i++) weight[i] = norm[i * 32 + lane];
    wait_dependencies();
    launch_dependents();
    if (row >= step.rows) return;

    const u32 position = step.position[row];
    const u32 kv_head = (which - HEADS) % KV_HEADS;
    f32* const query = q + ((u64)row * HEADS + which) * HEAD_DIM;
    const u64 at = ((u64)row * KV_HEADS + kv_head) * HEAD_DIM;
    const f32* const from = is_query ? query : (is_value ? v : k) + at;
#pragma unroll
    for (u32 i = 0; i < OWN; i++) x[i] = from[i * 32 + lane];

    if (!is_value) {
        normalise(x, weight);
#pragma unroll
        for (u32 i = 0; i < OWN; i++) head[i * 32 + lane] = x[i];
        __syncwarp();
        // Half-split: pair i is (x[i], x[i + HD / 2]).
        const float2* const turn = (const float2*)(rope + (u64)position * HEAD_DIM);
        for (u32 i = lane; i < HALF; i += 32) {
            rotate(head[i], head[i + HALF], turn[i]);
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < OWN; i++) x[i] = head[i * 32 + lane];
    }
    if (is_query) {
#pragma unroll
        for (u32 i = 0; i < OWN; i++) query[i * 32 + lane] = x[i];
        return;
    }

    const u32 block = step.tables[(u64)step.sequence[row] * step.stride + position / BLOCK], slot = position % BLOCK;
    u8* const tile = (u8*)tile_at(layer, block, kv_head);
    const Rounding r = round_head(x);
    if (lane == 0) ((f32*)(tile + SCALES_AT))[(is_value ? BLOCK : 0) + slot] = r.scale;
    if (is_value) {
        // A value's neighbours in memory are other positions' bytes.
#pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            const i32 n = round_fixed(x[i], r);
            u8* const to = tile + value_at(slot, i * 32 + lane);
            to[0] = (u8)high_plane(n);
            to[PLANE_BYTES] = (u8)n;
        }
    } else {
        for (u32 d = lane * 4; d < HEAD_DIM; d += 128) {
            u32 hi = 0, lo = 0;
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                const i32 n = round_fixed(head[d + b], r);
                hi |= (u32)(high_plane(n) & 0xff) << (b * 8);
                lo |= (u32)(n & 0xff) << (b * 8);
            }
            u8* const to = tile + key_at(slot, d);
            *(u32*)to = hi;
            *(u32*)(to + PLANE_BYTES) = lo;
        }
    }
}
