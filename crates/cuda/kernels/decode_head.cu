// Batch-1 decode: the norm of one row, and its logits [V].
//
// Grid: one block of 16 warps to a processor (decode_stream.cuh); the head is fetched before the wait, as far as the rings
// hold. Orders: as rules 1 and 3 write them. Bytes: the head once.
#include "decode_stream.cuh"

#if HIDDEN % 256 == 0
struct Head {
    static constexpr u32 COLUMNS = HIDDEN / 256;
    Matrix w;
    f32* logits;

    __device__ __forceinline__ Item item(u32 band, u32 column) const { return item_of(w.data, w.type, band, column, COLUMNS); }
    __device__ __forceinline__ u64 offset(const Item&) const { return 0; }
    __device__ __forceinline__ f32 before(u32, u32) const { return 0.0f; }
    __device__ __forceinline__ void finish(u32 band, u32 row, f32, const f32* terms) const {
        const u32 id = band * BAND + row;
        if (id < VOCAB) logits[id] = sum_terms(terms, COLUMNS, w.type);
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_head(const f32* x, const u32* wanted, const f32* norm, Matrix w, f32* logits, Plan plan) {
#if HIDDEN % 256 == 0
    u8* const shared = dynamic_shared<u8>();
    NormedRow<HIDDEN>& row = *(NormedRow<HIDDEN>*)shared;
    const Head job{w, logits};
    Stream<Head, sizeof(NormedRow<HIDDEN>)> stream(job, plan, share_of(bands(VOCAB)), shared);
    stream.start();
    Norm<HIDDEN> normed;
    normed.prepare(norm);
    wait_dependencies();
    launch_dependents();
    normed.run(row, x + (u64)load_fresh(wanted) * HIDDEN, norm);
    stream.run(row.planes);
#endif
}
