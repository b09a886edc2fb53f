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

// Slices that a warp may have under way.
constexpr u32 SLOTS = 4;

// Chosen by the host from the shared memory there is (launch/decode.rs).
struct Plan {
    u32 pass;        // bands to a pass, 32 at most
    u32 slots;       // slices that a warp has under way: 1 to SLOTS
    u32 slot_bytes;  // of the largest slice
    u32 ring;        // where the rings begin
};

// The bands [first, end) of this block, of `count` in all: shares differ by one at most.
struct Share {
    u32 first, end;
};
__device__ __forceinline__ Share share_of(u32 count) {
    return {count * blockIdx.x / gridDim.x, count * (blockIdx.x + 1) / gridDim.x};
}

// Job: static constexpr u32 COLUMNS;
//      Item item(u32 band, u32 column) const;
//      u64 offset(const Item&) const: from the first expert's slice to that of the expert chosen; known when `start` is called.
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
    u64* const full;  // of the warp's slots
    // From sm_90 on a lane asks for a slice, the warp's first ones each by another; all but the expert is known ahead, and
    // what comes between the choice of experts and the copies is on the critical path.
    Item ahead;
    bool asks = false;

    __device__ __forceinline__ Stream(const Job& job, const Plan& plan, Share share, u8* shared)
        : job(job), plan(plan), share(share), terms((f32*)(shared + ROW)),
          ring(shared + plan.ring + threadIdx.x / 32 * plan.slot_bytes), full(barriers() + threadIdx.x / 32 * SLOTS) {
        const u32 lane = threadIdx.x % 32, i = threadIdx.x / 32 + lane * WARPS;
        if (lane < plan.slots) mbarrier_init(full + lane, FULL_ARRIVALS);
        mbarrier_fence();
#if __CUDA_ARCH__ >= 900
        asks = lane < plan.slots && there(i);
        if (!asks) return;
        ahead = item(i);
        mbarrier_expect(full + lane, slice_bytes(ahead.type));
#endif
    }

    __device__ __forceinline__ static u64* barriers() {
        __shared__ u64 all[WARPS * SLOTS];
        return all;
    }
    __device__ __forceinline__ u8* slot_at(u32 slot) const { return ring + slot * WARPS * plan.slot_bytes; }

    // Slice i of the block, if there are so many.
    __device__ __forceinline__ bool there(u32 i) const { return share.first + i / COLUMNS < share.end; }
    __device__ __forceinline__ Item item(u32 i) const { return job.item(share.first + i / COLUMNS, i % COLUMNS); }

    // Asks for slice i.
    __device__ __forceinline__ void fetch(u32 i, u32 slot) const {
        if (!there(i)) return;
        const Item next = item(i);
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x % 32 != 0) return;
        mbarrier_expect(full + slot, slice_bytes(next.type));
#endif
        copy_slice(slot_at(slot), next.from + job.offset(next), next.type, full + slot);
#if __CUDA_ARCH__ < 900
        async_arrive(full + slot);
#endif
    }

    // Fills the ring.
    __device__ __forceinline__ void start() const {
#if __CUDA_ARCH__ >= 900
        const u32 lane = threadIdx.x % 32;
        if (asks) copy_slice(slot_at(lane), ahead.from + job.offset(ahead), ahead.type, full + lane);
#else
        __syncwarp();
#pragma unroll 1
        for (u32 slot = 0; slot < plan.slots; slot++) fetch(threadIdx.x / 32 + slot * WARPS, slot);
#endif
    }

    template <u32 K> __device__ __forceinline__ void run(const Planes<K>& planes) {
        const u32 lane = threadIdx.x % 32;
        u32 slot = 0, parity = 0, i = threadIdx.x / 32;
#pragma unroll 1
        for (u32 first = share.first; first < share.end; first += plan.pass) {
            const u32 end = min(first + plan.pass, share.end);
            const u32 band = first + threadIdx.x / BAND, row = threadIdx.x % BAND;
            const f32 before = band < end ? job.before(band, row) : 0.0f;
            f32* to = terms - (first - share.first) * COLUMNS * TERMS * BAND;
#pragma unroll 1
            for (; i < (end - share.first) * COLUMNS; i += WARPS) {
                mbarrier_wait(full + slot, parity);
                const Item now = item(i);
                by_type(now.type, [&](auto t) {
                    constexpr u32 T = decltype(t)::value;
                    slice_terms<T>(slot_at(slot), lane, planes, now.block, to + i * TERMS * BAND);
                });
                __syncwarp();
                fetch(i + plan.slots * WARPS, slot);
                slot = slot + 1 == plan.slots ? 0 : slot + 1;
                parity ^= slot == 0;
            }
            __syncthreads();
            if (band < end) job.finish(band, row, before, terms + threadIdx.x / BAND * COLUMNS * TERMS * BAND + row);
            if (end < share.end) __syncthreads();
        }
    }
};
