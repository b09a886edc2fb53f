// Batch-1 decode: the norm of one row, its logits [V], and their greatest.
//
// Grid: one block of 16 warps to a processor (decode_stream.cuh); the head is fetched before the wait, as far as the rings
// hold. Orders: as rules 1 and 3 write them; the greatest logit is a maximum of integers, exact in any order.
// Bytes: the head once.
#include "decode_stream.cuh"


// Floats in their order as integers; -0 below +0, a NaN at the very bottom.
__device__ __forceinline__ u32 order_key(f32 v) {
    const u32 bits = __float_as_uint(v);
    return v != v ? 0 : (i32)bits < 0 ? ~bits : bits | 0x80000000u;
}

// What greedy decoding needs. The first three are zero between launches.
struct Greatest {
    u64 key;       // order_key(logit) << 32 | ~id
    u32 infinite;  // logits that are not finite
    u32 arrived;   // blocks
    u64 best;      // the result: as `key`
    u32 bad;       // the result: as `infinite`
    u32 unused;
};

#if HIDDEN % 256 == 0
struct Head {
    static constexpr u32 COLUMNS = HIDDEN / 256;
    Matrix w;
    f32* logits;
    u64* key;       // this block's, in shared memory
    u32* infinite;  // likewise

    __device__ __forceinline__ Item item(u32 band, u32 column) const { return item_of(w.data, w.type, band, column, COLUMNS); }
    __device__ __forceinline__ f32 before(u32, u32) const { return 0.0f; }
    __device__ __forceinline__ void finish(u32 band, u32 row, f32, const f32* terms) const {
        const u32 id = band * BAND + row;
        if (id >= VOCAB) return;
        f32 v = sum_terms(terms, COLUMNS, w.type);
        logits[id] = v;
        // -0 equals +0, so the lower id wins, not the sign.
        if (v == 0.0f) v = 0.0f;
        atomicMax(key, (u64)order_key(v) << 32 | ~id);
        if (magnitude(v) >= 0x7f800000u) atomicAdd(infinite, 1);
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_head(const f32* x, const u32* wanted, const f32* norm, Matrix w, f32* logits, Greatest* greatest, Plan plan) {
#if HIDDEN % 256 == 0
    u8* const shared = dynamic_shared<u8>();
    __shared__ u64 key;
    __shared__ u32 infinite;
    NormedRow<HIDDEN>& row = *(NormedRow<HIDDEN>*)shared;
    if (threadIdx.x == 0) key = 0, infinite = 0;
    const Head job{w, logits, &key, &infinite};
    Stream<Head, sizeof(NormedRow<HIDDEN>)> stream(job, plan, share_of(bands(VOCAB)), shared);
    stream.start();
    Norm<HIDDEN> normed;
    normed.prepare(norm);
    wait_dependencies();
    launch_dependents();
    normed.run(row, x + (u64)load_fresh(wanted) * HIDDEN, norm);
    stream.run(row.planes);
    __syncthreads();
    if (threadIdx.x != 0) return;
    atomicMax(&greatest->key, key);
    if (infinite) atomicAdd(&greatest->infinite, infinite);
    __threadfence();
    if (atomicAdd(&greatest->arrived, 1) != gridDim.x - 1) return;
    __threadfence();
    greatest->best = atomicExch(&greatest->key, 0);
    greatest->bad = atomicExch(&greatest->infinite, 0);
    greatest->arrived = 0;
#endif
}
