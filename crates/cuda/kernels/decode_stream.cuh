// How a decode kernel streams its weights: the part that all of them share.
//
// A block of 16 warps owns a contiguous range of octets (eight output rows each). An octet's products are COLUMNS slices
// (dot.cuh); the block's slices are dealt to its warps in turn, and each warp copies what it will multiply into a ring of
// its own, `slots` slices deep, so the copies need no synchronisation but the warp's. Terms meet in shared memory; when
// a pass of octets is through, the job adds each row's terms in block order. A kernel whose weights do not depend on
// the step fills its rings before it waits for the kernel ahead.
//
// Dynamic shared memory: Planes of the activations, then terms [pass][COLUMNS][TERMS][8] f32, then rings
// [16][slots][slot_bytes].
#pragma once
#include "dot.cuh"

constexpr u32 WARPS = 16;
constexpr u32 THREADS = 32 * WARPS;

// Chosen by the host from the shared memory there is (launch/decode.rs).
struct Plan {
    u32 pass;        // octets to a pass
    u32 slots;       // 1 to 8
    u32 slot_bytes;  // of the largest slice
    u32 ring;        // where the rings begin
};

// Waits until all but the newest `pending` copies of this thread have landed.
__device__ __forceinline__ void wait_copies(u32 pending) {
    switch (pending) {
        case 0: return async_wait<0>();
        case 1: return async_wait<1>();
        case 2: return async_wait<2>();
        case 3: return async_wait<3>();
        case 4: return async_wait<4>();
        case 5: return async_wait<5>();
        case 6: return async_wait<6>();
        default: return async_wait<7>();
    }
}

// The octets [first, end) of block b of `blocks`, of `count` in all: shares differ by one at most.
struct Share {
    u32 first, end;
};
__device__ __forceinline__ Share share_of(u32 count) {
    return {(u32)((u64)count * blockIdx.x / gridDim.x), (u32)((u64)count * (blockIdx.x + 1) / gridDim.x)};
}

// Job: static constexpr u32 COLUMNS;
//      Item item(u32 octet, u32 column) const;
//      void finish(u32 octet, u32 row, const f32* terms): the row's terms [COLUMNS][TERMS][8], at this row.
template <class Job, u32 K> struct Stream {
    static constexpr u32 COLUMNS = Job::COLUMNS;
    const Job& job;
    const Plan& plan;
    const Share share;
    f32* const terms;
    u8* const ring;
    u32 fetched = 0, slot_in = 0;  // the warp's next slice to fetch, and its slot

    __device__ __forceinline__ Stream(const Job& job, const Plan& plan, Share share, u8* shared)
        : job(job), plan(plan), share(share), terms((f32*)(shared + sizeof(Planes<K>))),
          ring(shared + plan.ring + threadIdx.x / 32 * plan.slots * plan.slot_bytes) {}

    __device__ __forceinline__ void fetch() {
        const u32 i = fetched * WARPS + threadIdx.x / 32, octet = share.first + i / COLUMNS;
        if (octet < share.end) {
            const Item item = job.item(octet, i % COLUMNS);
            by_type(item.type, [&](auto t) {
                copy_slice<decltype(t)::value>(item, ring + slot_in * plan.slot_bytes, threadIdx.x % 32);
            });
        }
        async_commit();
        fetched++;
        slot_in = slot_in + 1 == plan.slots ? 0 : slot_in + 1;
    }

    // Fills the ring.
    __device__ __forceinline__ void start() {
        for (u32 i = 0; i < plan.slots; i++) fetch();
    }

    __device__ __forceinline__ void run(const Planes<K>& planes) {
        const u32 lane = threadIdx.x % 32;
        Operand x;
        u32 loaded = 0xffffffffu, slot = 0, i = threadIdx.x / 32;
        for (u32 first = share.first; first < share.end; first += plan.pass) {
            const u32 end = min(first + plan.pass, share.end);
            for (; i < (end - share.first) * COLUMNS; i += WARPS) {
                wait_copies(plan.slots - 1);
                __syncwarp();
                const Item item = job.item(share.first + i / COLUMNS, i % COLUMNS);
                f32* to = terms + (i - (first - share.first) * COLUMNS) * TERMS * 8;
                by_type(item.type, [&](auto t) {
                    constexpr u32 T = decltype(t)::value;
                    const u32 wanted = item.block * 2 + (T == T_Q6K);
                    if (wanted != loaded) load_operand<T>(x, planes, item.block, lane / 8);
                    loaded = wanted;
                    slice_terms<T>(ring + slot * plan.slot_bytes, lane, x, planes, item.block, to);
                });
                __syncwarp();
                slot = slot + 1 == plan.slots ? 0 : slot + 1;
                fetch();
            }
            __syncthreads();
            for (u32 r = threadIdx.x; r < (end - first) * 8; r += THREADS)
                job.finish(first + r / 8, r % 8, terms + r / 8 * COLUMNS * TERMS * 8 + r % 8);
            if (end < share.end) __syncthreads();
        }
    }
};
