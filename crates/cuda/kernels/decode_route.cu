// Batch-1 decode: the feed-forward norm, router logits [E], and the choice of K experts, in one kernel.
//
// Grid: ROWS router rows to a block of 16 warps, a row a warp; the rows are fetched before the wait. Every block
// normalises x; block b writes its share of `normed`. The block that arrives last chooses; or nobody does, and decode_up
// chooses for itself, which is sooner.
// Orders: the norm's as rule 3 writes it; a logit's 32 partial sums are lanes, fma in ascending k, butterfly 16 ... 1; the
// choice's as in choose.cuh. Bytes: 4 E D (f32) read.
#include "choose.cuh"
#include "ring.cuh"
#include "row.cuh"

#if HIDDEN % 256 == 0 && EXPERTS > 0
// Router rows to a block: one, for as many experts as models have today. A row is a chain of dependent instructions, and
// rows beside each other on a processor contend for its shared memory.
constexpr u32 ROWS = (EXPERTS + 127) / 128;

// Dynamic shared memory, the row's values normalised in place; after it the block's rows of the router, [ROWS][D].
struct Shared {
    NormedRow<HIDDEN> row;
    u64 full;  // mbarrier of the rows
    u32 last;
};

__device__ __forceinline__ u32 weight_bytes(u32 type) { return has(T_F32) && type == T_F32 ? 4 : 2; }

// One row's logit, rule 2.
template <class At> __device__ __forceinline__ f32 logit(const f32* x, At&& at) {
    f32 sum = 0.0f;
#pragma unroll 16
    for (u32 k = threadIdx.x % 32; k < HIDDEN; k += 32) sum = __fmaf_rn(at(k), x[k], sum);
    return butterfly(sum);
}
__device__ __forceinline__ f32 logit(const u8* row, const f32* x, u32 type) {
    if constexpr (has(T_F32)) if (type == T_F32) return logit(x, [=](u32 k) { return ((const f32*)row)[k]; });
    if constexpr (has(T_F16)) if (type == T_F16) return logit(x, [=](u32 k) { return f16_to_f32(((const u16*)row)[k]); });
    return logit(x, [=](u32 k) { return __uint_as_float((u32)((const u16*)row)[k] << 16); });
}

// Writes what falls to this block of the row, as floats and as `Fixed` has it: fixed-point blocks b, b + gridDim.x, ...
__device__ __forceinline__ void store_row(const Shared& s, f32* normed, const Fixed& fixed) {
#pragma unroll 1
    for (u32 block = blockIdx.x; block < HIDDEN / 256; block += gridDim.x) {
        const u32 i = block * 16 + threadIdx.x;
        if (threadIdx.x < 16) {
            const uint4 hi = piece_of(s.row.planes.hi, i), lo = PLANES == 2 ? piece_of(s.row.planes.lo, i) : uint4{};
            ((uint4*)fixed.hi)[i] = hi;
            if constexpr (PLANES == 2) ((uint4*)fixed.lo)[i] = lo;
            fixed.sum[i] = joined_sum(piece_sum(hi), PLANES == 2 ? piece_sum(lo) : 0);
        }
        if (threadIdx.x == 0) fixed.scale[block] = s.row.planes.scale[block];
        const u32 k = block * 256 + threadIdx.x % 256;
        if (threadIdx.x >= 256) normed[k] = s.row.x[k];
    }
}

#endif

// `arrived` is zero between launches; null where decode_up is to choose.
extern "C" __global__ void __launch_bounds__(512, 2)
decode_route(const f32* x, const f32* norm, Matrix router, f32* normed, Fixed fixed, f32* logits, u32* experts, f32* weights, u32* arrived) {
#if HIDDEN % 256 == 0 && EXPERTS > 0
    u8* const shared = dynamic_shared<u8>();
    Shared& s = *(Shared*)shared;
    u8* rows = shared + (sizeof(Shared) + 15) / 16 * 16;
    const u32 warp = threadIdx.x / 32, first = blockIdx.x * ROWS;
    const u32 count = min(ROWS, EXPERTS - first), bytes = HIDDEN * weight_bytes(router.type);
    const u8* from = router.data + (u64)first * bytes;
    if (warp == 0) {
        if (threadIdx.x == 0) mbarrier_init(&s.full, FULL_ARRIVALS);
        mbarrier_fence();
        __syncwarp();
        copy_stage<true>(rows, from, count * bytes, &s.full);
    }
    Norm<HIDDEN> row;
    row.prepare(norm);
    wait_dependencies();
    launch_dependents();
    row.run(s.row, x, norm, [&](u32 k, const Eight& v) {
        ((float4*)(s.row.x + k))[0] = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
        ((float4*)(s.row.x + k))[1] = make_float4(v.v[4], v.v[5], v.v[6], v.v[7]);
    }, [&] { mbarrier_wait(&s.full, 0); });
    if (warp < count) {
        const f32 v = logit(rows + warp * bytes, s.row.x, router.type);
        if (threadIdx.x % 32 == 0) logits[first + warp] = v;
    }
    store_row(s, normed, fixed);
    if (arrived == nullptr) return;
    __syncthreads();
    if (threadIdx.x == 0) s.last = atomic_inc_acq_rel(arrived, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (s.last && warp == 0) choose_row(logits, experts, weights);
#endif
}
