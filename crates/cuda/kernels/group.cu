// The step's (row, rank) pairs sorted by expert, stably: cpu::stages::by_expert, and the tiles of its lists.
//
// Grid: a warp an expert, 8 a block. Each block counts all pairs by expert (integer adds: no order) and scans the counts,
// so it knows where its experts' lists begin; each warp then walks the ids once and places its expert's pairs in order.
// Bytes: 4 T K, from L2, for every block and warp; 16 T K written at most.
#include "prelude.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
// A dense model has no experts, and nobody calls this: it only has to compile.
constexpr u32 E = EXPERTS > 0 ? EXPERTS : 1;
// Experts whose counts one thread scans.
constexpr u32 OWN = (E + THREADS - 1) / THREADS;

__device__ __forceinline__ u32 warp_prefix(u32 v, u32 lane) {
#pragma unroll
    for (u32 w = 1; w < 32; w *= 2) {
        const u32 other = __shfl_up_sync(0xffffffffu, v, w);
        if (lane >= w) v += other;
    }
    return v;
}

// Exclusive prefix sum over the block's threads.
__device__ __forceinline__ u32 block_prefix(u32 v, u32* scratch) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 inclusive = warp_prefix(v, lane);
    if (lane == 31) scratch[warp] = inclusive;
    __syncthreads();
    u32 before = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) before += w < warp ? scratch[w] : 0;
    __syncthreads();
    return before + inclusive - v;
}

extern "C" __global__ void __launch_bounds__(THREADS) group(const u32* experts, u32 pairs, u32 columns, Groups groups) {
    __shared__ u32 count[E], start[WARPS], tile[WARPS], scratch[WARPS];
    const u32 t = threadIdx.x, lane = t % 32;
    for (u32 e = t; e < E; e += THREADS) count[e] = 0;
    __syncthreads();
    launch_dependents();
    wait_dependencies();

    for (u32 p = t * 4; p < pairs; p += THREADS * 4) {
        if (p + 4 <= pairs) {
            const uint4 ids = *(const uint4*)(experts + p);
            atomicAdd(&count[ids.x], 1u);
            atomicAdd(&count[ids.y], 1u);
            atomicAdd(&count[ids.z], 1u);
            atomicAdd(&count[ids.w], 1u);
        } else {
            for (u32 i = p; i < pairs; i++) atomicAdd(&count[experts[i]], 1u);
        }
    }
    __syncthreads();

    u32 own_pairs = 0, own_tiles = 0;
    for (u32 i = 0; i < OWN; i++) {
        const u32 e = t * OWN + i;
        if (e >= E) break;
        own_pairs += count[e];
        own_tiles += (count[e] + columns - 1) / columns;
    }
    u32 first_pair = block_prefix(own_pairs, scratch), first_tile = block_prefix(own_tiles, scratch);
    for (u32 i = 0; i < OWN; i++) {
        const u32 e = t * OWN + i;
        if (e >= E) break;
        if (e / WARPS == blockIdx.x) {
            start[e % WARPS] = first_pair;
            tile[e % WARPS] = first_tile;
        }
        if (blockIdx.x == 0) groups.start[e] = first_pair;
        first_pair += count[e];
        first_tile += (count[e] + columns - 1) / columns;
        if (blockIdx.x == 0 && e == E - 1) {
            groups.start[E] = first_pair;
            *groups.tile_count = first_tile;
        }
    }
    __syncthreads();

    const u32 expert = blockIdx.x * WARPS + t / 32;
    if (expert >= E || count[expert] == 0) return;
    const u32 mine = count[expert], first = start[t / 32];
    for (u32 i = lane; i * columns < mine; i += 32) {
        u32* to = groups.tile + (u64)(tile[t / 32] + i) * 3;
        to[0] = expert;
        to[1] = first + i * columns;
        to[2] = min(columns, mine - i * columns);
    }
    // A lane takes eight neighbouring pairs, so lanes and their pairs are in order.
    for (u32 base = 0, done = 0; done < mine; base += 256) {
        const u32 p = base + lane * 8;
        u32 ids[8];
        if (p + 8 <= pairs) {
            const uint4 a = ((const uint4*)(experts + p))[0], b = ((const uint4*)(experts + p))[1];
            ids[0] = a.x, ids[1] = a.y, ids[2] = a.z, ids[3] = a.w;
            ids[4] = b.x, ids[5] = b.y, ids[6] = b.z, ids[7] = b.w;
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) ids[i] = p + i < pairs ? experts[p + i] : E;
        }
        u32 hits = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) hits |= (u32)(ids[i] == expert) << i;
        if (!__any_sync(0xffffffffu, hits)) continue;
        const u32 n = __popc(hits), upto = warp_prefix(n, lane);
        u32 at = first + done + upto - n;
        for (u32 rest = hits; rest; rest &= rest - 1) groups.pair[at++] = p + __ffs(rest) - 1;
        done += __shfl_sync(0xffffffffu, upto, 31);
    }
}
