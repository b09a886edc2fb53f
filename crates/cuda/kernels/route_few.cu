// `route` of up to MAX_GROUPS * COLUMNS rows in one launch: the norm, router logits, and the choice of experts.
//
// x [T][D] -> normed [T][D] and the same in fixed point, logits [T][E], experts [T][K], weights [T][K].
// Grid: x over shares of the router's rows, y over groups of COLUMNS rows of x, a warp a row of x. A block fetches its
// router rows before the wait. A warp normalises its row, which then stays in registers (lane p holds k = p mod 32, as the
// product wants it), and multiplies it with each router row; what else is written of it falls to the group's blocks in
// turn. The last block of a group chooses. Every block makes its rows' norm again: cheaper than a launch.
// Orders: as rules 2 and 3 write them. Partial p of the norm takes k = p (mod 256), 8 of them in a lane, so the butterfly
// 128, 64, 32 joins the lane's own and 16 ... 1 the lanes'; a logit's 32 partial sums are lanes, fma in ascending k.
// Bytes: the router once for every group, x once for every share; both from L2 but the first time.
#include "choose.cuh"
#include "fixed.cuh"
#include "float_weights.cuh"

// The twins of constants in launch/route.rs. A row stays in a warp's registers, so it may not be longer than MAX_HIDDEN.
constexpr u32 COLUMNS = 8;
constexpr u32 MAX_HIDDEN = 4096;
constexpr u32 THREADS = 32 * COLUMNS;

#if HIDDEN % 256 == 0 && HIDDEN <= 4096 && EXPERTS > 0
constexpr u32 BLOCKS = HIDDEN / 256, STEPS = HIDDEN / 32;

struct Job {
    const f32* x;
    const f32* norm;
    Matrix router;
    f32* normed;
    Fixed fixed;
    f32* logits;
    u32* experts;
    f32* weights;
    u32* arrived;  // [groups]: zero between launches
    u32 rows;      // T
    u32 share;     // router rows to a block
};

// Dynamic shared memory; after it the block's rows of the router.
struct Shared {
    f32 norm[HIDDEN];
    f32 block[COLUMNS][256];  // of a warp's row, in the order of k
    u32 last;
};

// A row, lane by lane: value i is k = 32 i + lane.
struct Row {
    f32 v[STEPS];

    __device__ __forceinline__ void normalise(const f32* x, const f32* norm) {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) v[i] = load_fresh(x + i * 32 + lane);
        f32 s[8] = {};
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) s[i % 8] = __fmaf_rn(v[i], v[i], s[i % 8]);
#pragma unroll
        for (u32 step = 4; step > 0; step /= 2)
#pragma unroll
            for (u32 i = 0; i < step; i++) s[i] = __fadd_rn(s[i], s[i + step]);
        const f32 mean = __fdiv_rn(butterfly(s[0]), (f32)HIDDEN);
        const f32 r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, __int_as_float(RMS_EPS))));
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) v[i] = __fmul_rn(__fmul_rn(v[i], r), norm[i * 32 + lane]);
    }

    template <u32 T> __device__ __forceinline__ f32 dot(const u8* weights) const {
        f32 sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) sum = __fmaf_rn(weight_at<T>(weights, i * 32 + threadIdx.x % 32), v[i], sum);
        return butterfly(sum);
    }

    // Writes blocks b, b + gridDim.x, ... of 256 values, as floats and in fixed point, by way of `scratch` [256].
    __device__ __forceinline__ void store(u64 start, f32* scratch, const Job& job) const {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 block = 0; block < BLOCKS; block++) {
            if (block % gridDim.x != blockIdx.x) continue;
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < 8; i++) scratch[i * 32 + lane] = v[block * 8 + i];
            __syncwarp();
            const u64 at = start + block * 256 + lane * 8;
            const Eight eight = load_eight(scratch + lane * 8);
            ((float4*)(job.normed + at))[0] = make_float4(eight.v[0], eight.v[1], eight.v[2], eight.v[3]);
            ((float4*)(job.normed + at))[1] = make_float4(eight.v[4], eight.v[5], eight.v[6], eight.v[7]);
            round_eight<256>(eight, at, true, job.fixed);
        }
    }
};

template <u32 T> __device__ __forceinline__ void route(const Job& job) {
    Shared& s = *(Shared*)dynamic_shared<u8>();
    u8* const weights = (u8*)&s + (sizeof(Shared) + 15) / 16 * 16;
    constexpr u32 BYTES = HIDDEN * FLOAT_BYTES<T>;
    const u32 first = blockIdx.x * job.share, count = first < EXPERTS ? min(job.share, EXPERTS - first) : 0;
    const u32 warp = threadIdx.x / 32, t = blockIdx.y * COLUMNS + warp;
    for (u32 i = threadIdx.x; i < HIDDEN / 4; i += THREADS) async_copy16(s.norm + i * 4, job.norm + i * 4);
    const u8* from = job.router.data + (u64)first * BYTES;
    for (u32 i = threadIdx.x; i < count * BYTES / 16; i += THREADS) async_copy16(weights + i * 16, from + i * 16);
    async_commit();
    async_wait<0>();
    __syncthreads();
    wait_dependencies();
    launch_dependents();

    if (t < job.rows) {
        Row row;
        row.normalise(job.x + (u64)t * HIDDEN, s.norm);
#pragma unroll 1
        for (u32 r = 0; r < count; r++) {
            const f32 v = row.template dot<T>(weights + r * BYTES);
            if (threadIdx.x % 32 == 0) job.logits[(u64)t * EXPERTS + first + r] = v;
        }
        row.store((u64)t * HIDDEN, s.block[warp], job);
    }
    __syncthreads();
    if (threadIdx.x == 0) s.last = atomic_inc_acq_rel(job.arrived + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (s.last && t < job.rows) choose_row(job.logits + (u64)t * E, job.experts + (u64)t * K, job.weights + (u64)t * K);
}
#else
struct Job {
    u32 none;
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) route_few(const __grid_constant__ Job job) {
#if HIDDEN % 256 == 0 && HIDDEN <= 4096 && EXPERTS > 0
    switch (job.router.type) {
        case T_F32: if constexpr (has(T_F32)) route<T_F32>(job); break;
        case T_F16: if constexpr (has(T_F16)) route<T_F16>(job); break;
        case T_BF16: if constexpr (has(T_BF16)) route<T_BF16>(job); break;
    }
#endif
}
