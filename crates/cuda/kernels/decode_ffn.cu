// Batch-1 decode: the feed-forward network, of the chosen experts or dense.
//
// decode_up: hidden[rank][F] = silu(gate x) * (up x). Mixture: the row is normed_fixed, made by decode_route, and the
// experts are known only after the wait: chosen by decode_route, or here and in decode_down by every block from the logits.
// Dense: x is normalised here and the weights are fetched before the wait.
// decode_down: rounds hidden, multiplies with `down` of every chosen expert, combines by fma in rank order, x += sum.
// Grid: one block of 16 warps to a processor (decode_stream.cuh). Orders: as rules 1, 3 and 6 write them. Bytes: the
// matrices of the chosen experts once.
#include "choose.cuh"
#include "decode_stream.cuh"

constexpr bool MIXTURE = EXPERTS > 0;
constexpr u32 RANKS = MIXTURE ? USED : 1;

#if HIDDEN % 256 == 0
struct Up {
    static constexpr u32 BLOCKS = HIDDEN / 256, COLUMNS = 2 * BLOCKS, BANDS = bands(WIDTH);
    Matrix gate, up;
    const u32* experts;  // [RANKS] in shared memory
    f32* hidden;

    // Columns: the gate's, then those of up.
    __device__ __forceinline__ Item item(u32 band, u32 column) const {
        const Matrix& m = column < BLOCKS ? gate : up;
        const u32 rank = band / BANDS, block = column < BLOCKS ? column : column - BLOCKS;
        return item_of(m.data, m.type, band - rank * BANDS, block, BLOCKS, rank);
    }
    __device__ __forceinline__ u64 offset(const Item& item) const { return MIXTURE ? experts[item.rank] * expert_stride(item.type, HIDDEN, WIDTH) : 0; }
    __device__ __forceinline__ f32 before(u32, u32) const { return 0.0f; }
    __device__ __forceinline__ void finish(u32 band, u32 row, f32, const f32* terms) const {
        const u32 rank = band / BANDS, at = (band - rank * BANDS) * BAND + row;
        const f32 g = sum_terms(terms, BLOCKS, gate.type), u = sum_terms(terms + BLOCKS * TERMS * BAND, BLOCKS, up.type);
        if (at < WIDTH) hidden[rank * WIDTH + at] = __fmul_rn(silu(g), u);
    }
};
#endif

// A choice of experts in global memory; `logits`: of the router, where it is still to be made, else null.
struct Choice {
    u32* experts;
    f32* weights;
    const f32* logits;

    // Into shared memory, by the first warp. Not synchronised.
    __device__ __forceinline__ void take(u32* chosen, f32* weight) const {
        if (threadIdx.x >= 32) return;
        if (logits) return choose_row(logits, chosen, weight);
        if (threadIdx.x >= RANKS) return;
        chosen[threadIdx.x] = load_fresh(experts + threadIdx.x);
        weight[threadIdx.x] = load_fresh(weights + threadIdx.x);
    }
    // The first `most` experts alone, which is sooner.
    __device__ __forceinline__ void take_experts(u32* chosen, u32 most) const {
        if (threadIdx.x >= 32) return;
        if (!logits) {
            if (threadIdx.x < most) chosen[threadIdx.x] = load_fresh(experts + threadIdx.x);
        } else if (!choose_apart(logits, chosen, most)) {
            choose_row(logits, chosen, nullptr, most);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_up(const f32* x, const f32* norm, Fixed normed, Choice choice, Matrix gate, Matrix up, f32* hidden, Plan plan) {
#if HIDDEN % 256 == 0
    u8* const shared = dynamic_shared<u8>();
    __shared__ u32 chosen[RANKS];
    constexpr u32 ROW = MIXTURE ? sizeof(Planes<HIDDEN>) : sizeof(NormedRow<HIDDEN>);
    Planes<HIDDEN>& planes = *(Planes<HIDDEN>*)shared;  // a NormedRow begins with them
    const Up job{gate, up, chosen, hidden};
    Stream<Up, ROW> stream(job, plan, share_of(RANKS * Up::BANDS), shared);
    if constexpr (MIXTURE) {
        wait_dependencies();
        launch_dependents();
        Copied<HIDDEN, THREADS> row;
        row.fetch(normed);
        // As far as this block's bands go.
        choice.take_experts(chosen, (stream.share.end + Up::BANDS - 1) / Up::BANDS);
        row.store(planes);
        __syncthreads();
        // No barrier after it: a warp may multiply its first slice while others still ask for theirs.
        stream.start();
    } else {
        stream.start();
        Norm<HIDDEN> row;
        row.prepare(norm);
        wait_dependencies();
        launch_dependents();
        row.run(*(NormedRow<HIDDEN>*)shared, x, norm);
    }
    stream.run(planes);
#endif
}

#if WIDTH % 256 == 0
struct Down {
    static constexpr u32 BLOCKS = WIDTH / 256, COLUMNS = RANKS * BLOCKS;
    Matrix down;
    const u32* experts;   // [RANKS] in shared memory
    const f32* weights;   // [RANKS]
    f32* x;

    __device__ __forceinline__ Item item(u32 band, u32 column) const {
        const u32 rank = column / BLOCKS;
        Item item = item_of(down.data, down.type, band, column - rank * BLOCKS, BLOCKS, rank);
        item.block = column;
        return item;
    }
    __device__ __forceinline__ u64 offset(const Item& item) const { return MIXTURE ? experts[item.rank] * expert_stride(item.type, WIDTH, HIDDEN) : 0; }
    __device__ __forceinline__ f32 before(u32 band, u32 row) const { return band * BAND + row < HIDDEN ? load_fresh(x + band * BAND + row) : 0.0f; }
    __device__ __forceinline__ void finish(u32 band, u32 row, f32 before, const f32* terms) const {
        const u32 at = band * BAND + row;
        f32 sum = 0.0f;
#pragma unroll
        for (u32 rank = 0; rank < RANKS; rank++) {
            const f32 out = sum_terms(terms + rank * BLOCKS * TERMS * BAND, BLOCKS, down.type);
            sum = MIXTURE ? __fmaf_rn(weights[rank], out, sum) : out;
        }
        if (at < HIDDEN) x[at] = __fadd_rn(before, sum);
    }
};
#endif

// Cycles that decode_up has for asking for its weights before those of decode_down join the queue: decode_up's are waited for
// first. Measured on an H200: 1,000 and 1,500 are 0.8% of a token better than 500, and 0.4% than 2,000.
constexpr u32 HEAD_START = 1000;

// `early`: the kernel ahead is decode_up, which starts this one when its own wait is over, so what the choice of experts
// is made of stands already.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_down(const f32* hidden, Choice choice, Matrix down, f32* x, u32 early, Plan plan) {
#if WIDTH % 256 == 0
    u8* const shared = dynamic_shared<u8>();
    __shared__ u32 chosen[RANKS];
    __shared__ f32 weight[RANKS];
    Planes<RANKS * WIDTH>& planes = *(Planes<RANKS * WIDTH>*)shared;
    const Down job{down, chosen, weight, x};
    Stream<Down, sizeof(Planes<RANKS * WIDTH>)> stream(job, plan, share_of(bands(HIDDEN)), shared);
    if constexpr (MIXTURE) {
        if (!early) wait_dependencies();
        choice.take(chosen, weight);
        if (early && threadIdx.x < 32) pause(HEAD_START);
        __syncthreads();
    }
    stream.start();
    wait_dependencies();
    launch_dependents();
    // Written down for whoever looks at a step.
    if (MIXTURE && choice.logits && blockIdx.x == 0 && threadIdx.x < RANKS) {
        choice.experts[threadIdx.x] = chosen[threadIdx.x];
        choice.weights[threadIdx.x] = weight[threadIdx.x];
    }
    round_row(planes, hidden, WARPS);
    __syncthreads();
    stream.run(planes);
#endif
}
