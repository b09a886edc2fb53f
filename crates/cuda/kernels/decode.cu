// Batch-1 decode: the products whose weights do not depend on the step.
//
// decode_qkv: x [D] -> norm, fixed point -> q [H HD], k [KH HD], v [KH HD].
// decode_attn_out: attn [H HD] in fixed point -> x += W_o attn.
// Grid: one block of 16 warps to a processor; every block makes the whole activation row and streams its share of
// octets (decode_stream.cuh), fetched before the wait. Orders: as rules 1 and 3 write them. Bytes: the matrices once.
#include "decode_stream.cuh"

constexpr u32 Q_ROWS = HEADS * HEAD_DIM, KV_ROWS = KV_HEADS * HEAD_DIM;

#if HIDDEN % 256 == 0
struct Qkv {
    static constexpr u32 COLUMNS = HIDDEN / 256;
    static constexpr u32 Q_END = octets(Q_ROWS), K_END = Q_END + octets(KV_ROWS), END = K_END + octets(KV_ROWS);
    Matrix q, k, v;
    f32 *q_out, *k_out, *v_out;

    __device__ __forceinline__ Item item(u32 octet, u32 column) const {
        const u32 start = octet < Q_END ? 0 : octet < K_END ? Q_END : K_END;
        const u8* data = octet < Q_END ? q.data : octet < K_END ? k.data : v.data;
        const u32 type = octet < Q_END ? q.type : octet < K_END ? k.type : v.type;
        return item_of(data, type, octet - start, column, COLUMNS);
    }
    __device__ __forceinline__ void finish(u32 octet, u32 row, const f32* terms) const {
        const u32 start = octet < Q_END ? 0 : octet < K_END ? Q_END : K_END;
        f32* out = octet < Q_END ? q_out : octet < K_END ? k_out : v_out;
        const u32 type = octet < Q_END ? q.type : octet < K_END ? k.type : v.type;
        const u32 at = (octet - start) * 8 + row;
        if (at < (octet < Q_END ? Q_ROWS : KV_ROWS)) out[at] = sum_terms(terms, COLUMNS, type);
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_qkv(const f32* x, const f32* norm, Matrix q, Matrix k, Matrix v, f32* q_out, f32* k_out, f32* v_out, Plan plan) {
#if HIDDEN % 256 == 0
    extern __shared__ __align__(16) u8 shared[];
    __shared__ f32 partial[256];
    Planes<HIDDEN>& planes = *(Planes<HIDDEN>*)shared;
    launch_dependents();
    const Qkv job{q, k, v, q_out, k_out, v_out};
    Stream<Qkv, HIDDEN> stream(job, plan, share_of(Qkv::END), shared);
    stream.start();
    Norm<HIDDEN> normed;
    normed.prepare(norm);
    wait_dependencies();
    normed.run(planes, x, norm, partial, [](u32, const Eight&) {});
    stream.run(planes);
#endif
}

#if (HEADS * HEAD_DIM) % 256 == 0
struct AttnOut {
    static constexpr u32 COLUMNS = Q_ROWS / 256;
    Matrix w;
    f32* x;

    __device__ __forceinline__ Item item(u32 octet, u32 column) const { return item_of(w.data, w.type, octet, column, COLUMNS); }
    __device__ __forceinline__ void finish(u32 octet, u32 row, const f32* terms) const {
        const u32 at = octet * 8 + row;
        if (at < HIDDEN) x[at] = __fadd_rn(load_fresh(x + at), sum_terms(terms, COLUMNS, w.type));
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) decode_attn_out(Fixed attn, Matrix w, f32* x, Plan plan) {
#if (HEADS * HEAD_DIM) % 256 == 0
    extern __shared__ __align__(16) u8 shared[];
    Planes<Q_ROWS>& planes = *(Planes<Q_ROWS>*)shared;
    launch_dependents();
    const AttnOut job{w, x};
    Stream<AttnOut, Q_ROWS> stream(job, plan, share_of(octets(HIDDEN)), shared);
    stream.start();
    wait_dependencies();
    load_planes(planes, attn, THREADS);
    __syncthreads();
    stream.run(planes);
#endif
}
