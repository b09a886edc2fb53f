// How a decode kernel streams its weights: the part that all of them share.
//
// A block of 16 warps owns a contiguous range of bands (sixteen output rows each). A band's products are COLUMNS slices
// (dot.cuh); the block's slices are dealt to its warps in turn, and each warp copies what it will multiply into a ring of
// its own, so the copies need no synchronisation but the warp's. Terms meet in shared memory; when a pass of bands is
// through, a thread a row adds the row's terms in block order. A kernel whose weights do not depend on the step fills its
// rings before it waits for the kernel ahead. It lets its dependents start when its own wait is over: sooner, they would
// take memory and issue slots from the kernel ahead; later, their start is on the critical path (measured both ways).
//
// Dynamic shared memory: the activations, Planes<K> or NormedRow<K>, then terms [pass][COLUMNS][TERMS][BAND] f32, then the rings,
// [slots][16 warps][slot_bytes]; where the slices are fewer, only as many.
#pragma once
#include "dot.cuh"

constexpr u32 WARPS = 16;
constexpr u32 THREADS = 32 * WARPS;

// Chosen by the host from the shared memory there is (launch/decode.rs).
struct Plan {
    u32 pass;        // bands to a pass, 32 at most
    u32 depth;       // slices that a warp has under way: 1 to 4
    u32 slots;       // as many, or fewer if that is all the slices a warp has
    u32 slot_bytes;  // of the largest slice
    u32 ring;        // where the rings begin
};

// Waits until all but the newest depth - 1 groups of this thread's copies have landed.
__device__ __forceinline__ void wait_copies(u32 depth) {
    if (depth > 2) depth == 3 ? async_wait<2>() : async_wait<3>();
    else depth == 1 ? async_wait<0>() : async_wait<1>();
}

// The bands [first, end) of this block, of `count` in all: shares differ by one at most.
struct Share {
    u32 first, end;
};
__device__ __forceinline__ Share share_of(u32 count) {
    return {count * blockIdx.x / gridDim.x, count * (blockIdx.x + 1) / gridDim.x};
}

// Job: static constexpr u32 COLUMNS;
//      Item item(u32 band, u32 column) const;
//      f32 before(u32 band, u32 row) const: what the row held, fetched ahead of the product;
//      void finish(u32 band, u32 row, f32 before, const f32* terms): the row's terms [COLUMNS][TERMS][BAND], at this row.
// ROW: bytes of the activations.
template <class Job, u32 ROW> struct Stream {
    static constexpr u32 COLUMNS = Job::COLUMNS;
    const Job& job;
    const Plan& plan;
    const Share share;
    f32* const terms;
    u8* const ring;
    u32 next = threadIdx.x / 32, slot_in = 0;  // the warp's next slice to fetch, and its slot

    __device__ __forceinline__ Stream(const Job& job, const Plan& plan, Share share, u8* shared)
        : job(job), plan(plan), share(share), terms((f32*)(shared + ROW)),
          ring(shared + plan.ring + threadIdx.x / 32 * plan.slot_bytes) {}

    __device__ __forceinline__ u8* slot_at(u32 slot) const { return ring + slot * WARPS * plan.slot_bytes; }

    __device__ __forceinline__ void fetch() {
        if (share.first + next / COLUMNS < share.end) {
            const Item item = job.item(share.first + next / COLUMNS, next % COLUMNS);
            by_type(item.type, [&](auto t) {
                copy_slice<decltype(t)::value>(item, slot_at(slot_in), threadIdx.x % 32);
            });
        }
        async_commit();
        next += WARPS;
        slot_in = slot_in + 1 == plan.slots ? 0 : slot_in + 1;
    }

    // Fills the ring. Every slice is a group of copies, those that are not there too.
    __device__ __forceinline__ void start() {
#pragma unroll 1
        for (u32 i = 0; i < plan.depth; i++) fetch();
    }

    template <u32 K> __device__ __forceinline__ void run(const Planes<K>& planes) {
        const u32 lane = threadIdx.x % 32;
        u32 slot = 0, i = threadIdx.x / 32;
#pragma unroll 1
        for (u32 first = share.first; first < share.end; first += plan.pass) {
            const u32 end = min(first + plan.pass, share.end);
            const u32 band = first + threadIdx.x / BAND, row = threadIdx.x % BAND;
            const f32 before = band < end ? job.before(band, row) : 0.0f;
            f32* to = terms - (first - share.first) * COLUMNS * TERMS * BAND;
#pragma unroll 1
            for (; i < (end - share.first) * COLUMNS; i += WARPS) {
                wait_copies(plan.depth);
                __syncwarp();
                const Item item = job.item(share.first + i / COLUMNS, i % COLUMNS);
                by_type(item.type, [&](auto t) {
                    constexpr u32 T = decltype(t)::value;
                    slice_terms<T>(slot_at(slot), lane, planes, item.block, to + i * TERMS * BAND);
                });
                slot = slot + 1 == plan.slots ? 0 : slot + 1;
                if (share.first + next / COLUMNS < share.end) {
                    __syncwarp();
                    fetch();
                } else {
                    async_commit();
                }
            }
            __syncthreads();
            if (band < end) job.finish(band, row, before, terms + threadIdx.x / BAND * COLUMNS * TERMS * BAND + row);
            if (end < share.end) __syncthreads();
        }
    }
};
