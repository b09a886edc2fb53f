// Batch-1 decode: the products whose weights do not depend on the step.
//
// decode_qkv: x [D] -> norm, fixed point -> q [H HD], k [KH HD], v [KH HD]. `cache`: the layer's, to be brought near; or null.
// decode_attn_out: attn [H HD] in fixed point -> x += W_o attn.
// Grid: one block of 16 warps to a processor; every block makes the whole activation row and streams its share of
// bands (decode_stream.cuh), fetched before the wait. Orders: as rules 1 and 3 write them. Bytes: the matrices once.
#include "cache.cuh"
#include "decode_stream.cuh"

// The first number from `step` on that has no factor in common with `count`.
constexpr u32 coprime(u32 step, u32 count) {
    u32 a = count, b = step;
    while (b != 0) {
        const u32 rest = a % b;
        a = b, b = rest;
    }
    return a == 1 ? step : coprime(step + 1, count);
}

#if HIDDEN % 256 == 0
struct Qkv {
    static constexpr u32 Q_ROWS = HEADS * HEAD_DIM, KV_ROWS = KV_HEADS * HEAD_DIM;
    static constexpr u32 COLUMNS = HIDDEN / 256;
    static constexpr u32 Q_END = bands(Q_ROWS), K_END = Q_END + bands(KV_ROWS), END = K_END + bands(KV_ROWS);
    Matrix q, k, v;
    f32 *q_out, *k_out, *v_out;

    // A block's places follow each other, but its bands come from far apart: nobody shall have only bands of the matrix whose
    // type takes longest (V's, often).
    static constexpr u32 STEP = coprime(END / 3 + 1, END);
    __device__ __forceinline__ static u32 spread(u32 band) { return band * STEP % END; }

    __device__ __forceinline__ Item item(u32 place, u32 column) const {
        const u32 band = spread(place);
        const u32 start = band < Q_END ? 0 : band < K_END ? Q_END : K_END;
        const u8* data = band < Q_END ? q.data : band < K_END ? k.data : v.data;
        const u32 type = band < Q_END ? q.type : band < K_END ? k.type : v.type;
        return item_of(data, type, band - start, column, COLUMNS);
    }
    __device__ __forceinline__ u64 offset(const Item&) const { return 0; }
    __device__ __forceinline__ f32 before(u32, u32) const { return 0.0f; }
    __device__ __forceinline__ void finish(u32 place, u32 row, f32, const f32* terms) const {
        const u32 band = spread(place), start = band < Q_END ? 0 : band < K_END ? Q_END : K_END;
        f32* out = band < Q_END ? q_out : band < K_END ? k_out : v_out;
        const u32 type = band < Q_END ? q.type : band < K_END ? k.type : v.type;
        const u32 at = (band - start) * BAND + row;
        if (at < (band < Q_END ? Q_ROWS : KV_ROWS)) out[at] = sum_terms(terms, COLUMNS, type);
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_qkv(const f32* x, const f32* norm, Matrix q, Matrix k, Matrix v, f32* q_out, f32* k_out, f32* v_out, const u8* cache, Step step, Plan plan) {
#if HIDDEN % 256 == 0
    u8* const shared = dynamic_shared<u8>();
    NormedRow<HIDDEN>& row = *(NormedRow<HIDDEN>*)shared;
    const Qkv job{q, k, v, q_out, k_out, v_out};
    Stream<Qkv, sizeof(NormedRow<HIDDEN>)> stream(job, plan, share_of(Qkv::END), shared);
    stream.start();
    Norm<HIDDEN> normed;
    normed.prepare(norm);
    if (cache && threadIdx.x / 32 == WARPS - 1) prefetch_tiles(cache, step);
    wait_dependencies();
    launch_dependents();
    normed.run(row, x, norm);
    stream.run(row.planes);
#endif
}

#if (HEADS * HEAD_DIM) % 256 == 0
struct AttnOut {
    static constexpr u32 VALUES = HEADS * HEAD_DIM, COLUMNS = VALUES / 256;
    Matrix w;
    f32* x;

    __device__ __forceinline__ Item item(u32 band, u32 column) const { return item_of(w.data, w.type, band, column, COLUMNS); }
    __device__ __forceinline__ u64 offset(const Item&) const { return 0; }
    __device__ __forceinline__ f32 before(u32 band, u32 row) const { return band * BAND + row < HIDDEN ? load_fresh(x + band * BAND + row) : 0.0f; }
    __device__ __forceinline__ void finish(u32 band, u32 row, f32 before, const f32* terms) const {
        const u32 at = band * BAND + row;
        if (at < HIDDEN) x[at] = __fadd_rn(before, sum_terms(terms, COLUMNS, w.type));
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) decode_attn_out(Fixed attn, Matrix w, f32* x, Plan plan) {
#if (HEADS * HEAD_DIM) % 256 == 0
    u8* const shared = dynamic_shared<u8>();
    Planes<AttnOut::VALUES>& planes = *(Planes<AttnOut::VALUES>*)shared;
    const AttnOut job{w, x};
    Stream<AttnOut, sizeof(Planes<AttnOut::VALUES>)> stream(job, plan, share_of(bands(HIDDEN)), shared);
    stream.start();
    wait_dependencies();
    launch_dependents();
    Copied<AttnOut::VALUES, THREADS> row;
    row.fetch(attn);
    row.store(planes);
    __syncthreads();
    stream.run(planes);
#endif
}
