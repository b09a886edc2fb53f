// The step's (row, rank) pairs sorted by expert, stably: cpu::stages::by_expert, and the tiles of its lists.
//
// Grid: a warp an expert, 8 a block. Each block brings the ids into shared memory, counts them by expert (integer adds: no
// order) and scans the counts, so it knows where its experts' lists begin; each warp then walks the ids once and places its
// expert's pairs in order. More ids than fit are brought twice, part by part.
// Bytes: 4 T K, from L2, for every block; 16 T K written at most.
#include "prelude.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
// A dense model has no experts, and nobody calls this: it only has to compile.
constexpr u32 E = EXPERTS > 0 ? EXPERTS : 1;
static_assert(E < 0xffff, "ids are kept in 16 bits");
// Ids that fit: 2,048 rows' of 8 each.
constexpr u32 PART = 16384;
constexpr u32 NONE = 0xffff;
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

// Brings `n` ids, 16 bits each, and what is no id up to the next 256.
__device__ __forceinline__ void bring(const u32* experts, u32 n, uint4* kept) {
#pragma unroll 4
    for (u32 p = threadIdx.x * 4; p < (n + 255) / 256 * 256; p += THREADS * 4) {
        u32 v[4];
        if (p + 4 <= n) {
            const uint4 four = *(const uint4*)(experts + p);
            v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
        } else {
#pragma unroll
            for (u32 i = 0; i < 4; i++) v[i] = p + i < n ? experts[p + i] : NONE;
        }
        ((uint2*)kept)[p / 4] = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) group(const u32* experts, u32 pairs, u32 columns, Groups groups) {
    __shared__ u32 count[E], start[WARPS], tile[WARPS], scratch[WARPS];
    __shared__ uint4 kept[PART / 8];
    u16* const ids = (u16*)kept;
    const u32 t = threadIdx.x, lane = t % 32;
    for (u32 e = t; e < E; e += THREADS) count[e] = 0;
    __syncthreads();
    launch_dependents();
    wait_dependencies();

    for (u32 first = 0; first < pairs; first += PART) {
        bring(experts + first, min(PART, pairs - first), kept);
        for (u32 p = t; p < min(PART, pairs - first); p += THREADS) atomicAdd(&count[ids[p]], 1u);
        __syncthreads();
    }

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
    const u32 mine = expert < E ? count[expert] : 0, first = start[t / 32];
    for (u32 i = lane; i * columns < mine; i += 32) {
        u32* to = groups.tile + (u64)(tile[t / 32] + i) * 3;
        to[0] = expert;
        to[1] = first + i * columns;
        to[2] = min(columns, mine - i * columns);
    }
    u32 done = 0;
    for (u32 part = 0; part < pairs; part += PART) {
        if (pairs > PART) {
            __syncthreads();
            bring(experts + part, min(PART, pairs - part), kept);
        }
        // A lane takes eight neighbouring pairs, so lanes and their pairs are in order.
        for (u32 base = 0; base < min(PART, pairs - part) && done < mine; base += 256) {
            const u32 p = base + lane * 8;
            const uint4 eight = kept[p / 8];
            const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
            u32 hits = 0;
#pragma unroll
            for (u32 i = 0; i < 8; i++) hits |= (u32)((words[i / 2] >> (i % 2 * 16) & 0xffff) == expert) << i;
            if (!__any_sync(0xffffffffu, hits)) continue;
            const u32 n = __popc(hits), upto = warp_prefix(n, lane);
            u32 at = first + done + upto - n;
            for (u32 rest = hits; rest; rest &= rest - 1) groups.pair[at++] = part + p + __ffs(rest) - 1;
            done += __shfl_sync(0xffffffffu, upto, 31);
        }
    }
}
