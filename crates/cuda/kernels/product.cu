// out[t][n] = w[n] . x[t] for block-quantised weights (ARCHITECTURE.md, rule 1), any number of rows of activations.
//
// A block of threads takes ROW_TILES tiles of 32 weight rows by COLUMNS activation rows. k is cut into slots of 256
// values; SLOTS warps work on as many slots of a tile at once, which is how few columns still fill the GPU. Weights and
// activations arrive in shared memory by asynchronous copies, `stages` stages of SLOTS slots deep; products are exact
// int8 tensor-core sums (product_blocks.cuh).
// Grid: x over groups of row tiles, y over groups of columns. Grouped by expert: y over `groups.tile`, up to a bound that
// the host knows, and what is beyond their count ends at once.
// Order: an output is the sum of its blocks' terms in block order. With SLOTS > 1 the terms of a stage meet in shared
// memory, where one owner adds them in that order.
// Bytes: weights once for every group of columns, activations once for every group of row tiles.
#include "product_blocks.cuh"
#include "product_job.cuh"

// GPUs whose blocks can have 160 KB of shared memory or more; the others have 99.
constexpr bool LARGE = __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870 || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200);

// Shapes of a thread block: the twin of `shape` in launch/product.rs.
template <u32 N, u32 TILES, u32 SIDES, u32 K_SLOTS> struct Shape {
    static constexpr u32 COLUMNS = N, ROW_TILES = TILES;
    // Warps that share a row tile, each with every SIDES-th column tile.
    static constexpr u32 WARPS_N = SIDES;
    static constexpr u32 SLOTS = K_SLOTS;
    static constexpr u32 WARPS = TILES * SIDES * K_SLOTS;
    // Column tiles of 8 to a warp.
    static constexpr u32 J = N / 8 / SIDES;
    // What a warp owns of its tile's sums once the terms have met: M tiles of 16 rows by OWN_J column tiles.
    static constexpr u32 OWN_M = K_SLOTS == 1 ? 2 : 1, OWN_J = K_SLOTS <= 2 ? J : (J + 1) / 2;
    static_assert(SIDES == 1 || K_SLOTS == 1, "either columns or slots are split");
    static_assert(K_SLOTS == 1 || K_SLOTS == 2 || K_SLOTS == 4, "as OWN_M and OWN_J divide");
};

// The rows that a warp works on.
struct Tile {
    const u8* data;
    f32* out;
    u32 type;
    u32 first;  // row
    u32 rows;   // of the matrix
    u32 slot_bytes;
    u64 bytes;
    bool active;
};

// Tile `index` of the matrices' tiles one after the other; for SWIGLU, of both matrices' in turn.
__device__ __forceinline__ Tile find_tile(const Job& job, u32 index, u32 expert) {
    u32 matrix = 0;
    if (job.epilogue == SWIGLU) {
        matrix = index % 2;
        index /= 2;
    } else {
        while (matrix + 1 < job.matrices && index >= (job.w[matrix].rows + 31) / 32) index -= (job.w[matrix++].rows + 31) / 32;
    }
    const Matrix& w = job.w[matrix];
    Tile tile;
    tile.out = job.out[job.epilogue == SWIGLU ? 0 : matrix];
    tile.type = w.type;
    tile.first = index * 32;
    tile.rows = w.rows;
    tile.slot_bytes = slot_bytes(w.type);
    // A slot's bytes are a multiple of 8, whatever the type.
    tile.bytes = (u64)(job.k / 32) * (tile.slot_bytes / 8);
    tile.active = tile.first < w.rows;
    tile.data = w.data + ((u64)expert * ((w.rows + 31) / 32) + index) * tile.bytes;
    return tile;
}

__device__ __forceinline__ void async_wait_but(u32 newest) {
    switch (newest) {
        case 0: async_wait<0>(); break;
        case 1: async_wait<1>(); break;
        case 2: async_wait<2>(); break;
        default: async_wait<3>(); break;
    }
}

template <u32 T, class S, u32 J> __device__ __forceinline__ void super_columns(const u8* column, const u8* panel, u32 side, u32 used, f32 (&sums)[2][S::J][4]) {
    // Fewer columns cost less; the product of all of them stays one straight piece of code.
    if (J > 1 && used < J) super_columns<T, S, (J > 1 ? J - 1 : 1)>(column, panel, side, used, sums);
    else add_super<T, S::COLUMNS, J, S::WARPS_N, S::J>(column, panel, side, sums);
}

template <class S> __device__ __forceinline__ void super_slot(u32 type, const u8* column, const u8* panel, u32 side, u32 used, f32 (&sums)[2][S::J][4]) {
    switch (type) {
        case T_Q2K: if constexpr (has(T_Q2K)) super_columns<T_Q2K, S, S::J>(column, panel, side, used, sums); break;
        case T_Q3K: if constexpr (has(T_Q3K)) super_columns<T_Q3K, S, S::J>(column, panel, side, used, sums); break;
        case T_Q4K: if constexpr (has(T_Q4K)) super_columns<T_Q4K, S, S::J>(column, panel, side, used, sums); break;
        case T_Q5K: if constexpr (has(T_Q5K)) super_columns<T_Q5K, S, S::J>(column, panel, side, used, sums); break;
        case T_Q6K: if constexpr (has(T_Q6K)) super_columns<T_Q6K, S, S::J>(column, panel, side, used, sums); break;
    }
}

template <class S>
__device__ __forceinline__ void small_slot(u32 type, const u8* column, const u8* panel, u32 blocks, bool shared, u32 m, u32 j, f32 (&sums)[S::OWN_M][S::OWN_J][4]) {
    constexpr u32 N = S::COLUMNS, M = S::OWN_M, J = S::OWN_J, STRIDE = S::WARPS_N;
    switch (type) {
        case T_Q8_0: if constexpr (has(T_Q8_0)) add_small<T_Q8_0, N, M, J, STRIDE>(column, panel, blocks, shared, m, j, sums); break;
        case T_Q4_0: if constexpr (has(T_Q4_0)) add_small<T_Q4_0, N, M, J, STRIDE>(column, panel, blocks, shared, m, j, sums); break;
        case T_Q4_1: if constexpr (has(T_Q4_1)) add_small<T_Q4_1, N, M, J, STRIDE>(column, panel, blocks, shared, m, j, sums); break;
        case T_Q5_0: if constexpr (has(T_Q5_0)) add_small<T_Q5_0, N, M, J, STRIDE>(column, panel, blocks, shared, m, j, sums); break;
        case T_Q5_1: if constexpr (has(T_Q5_1)) add_small<T_Q5_1, N, M, J, STRIDE>(column, panel, blocks, shared, m, j, sums); break;
    }
}

// A block's work: who its threads are, where its shared memory is.
template <class S> struct Block {
    static constexpr u32 N = S::COLUMNS;
    const Job& job;
    u8* ring;      // [stages][SLOTS]: [ROW_TILES] tiles' slots, then a Panel
    float4* terms; // [ROW_TILES][SLOTS][2][J][32], if SLOTS > 1
    u32* outs;     // [N]: the row of `out` that a column is
    u32* ins;      // [N]: the row of `x` that it reads
    u32 slot_room, lane, warp_m, side, slot, slots, columns;
    Tile tile;

    __device__ __forceinline__ Block(const Job& job, u8* shared) : job(job) {
        lane = threadIdx.x % 32;
        const u32 warp = threadIdx.x / 32;
        side = warp % S::WARPS_N;
        warp_m = warp / S::WARPS_N % S::ROW_TILES;
        slot = warp / (S::WARPS_N * S::ROW_TILES);
        slots = (job.k + 255) / 256;
        slot_room = S::ROW_TILES * job.weight_bytes + Panel<N>::BYTES;
        ring = shared;
        terms = (float4*)(ring + job.stages * S::SLOTS * slot_room);
        outs = (u32*)(terms + (S::SLOTS > 1 ? S::ROW_TILES * S::SLOTS * 2 * S::J * 32 : 0));
        ins = outs + N;
    }

    // Where a slot of the stage at `place` of the ring lies.
    __device__ __forceinline__ u8* weights(u32 place, u32 slot) const {
        return ring + (place * S::SLOTS + slot) * slot_room + warp_m * job.weight_bytes;
    }
    __device__ __forceinline__ u8* panel(u32 place, u32 slot) const {
        return ring + (place * S::SLOTS + slot) * slot_room + S::ROW_TILES * job.weight_bytes;
    }

    // The warp's tile of its slot of a stage.
    __device__ __forceinline__ void load_weights(u32 stage, u32 place) const {
        const u32 b = stage * S::SLOTS + slot;
        if (!tile.active || b >= slots) return;
        const u64 start = (u64)b * tile.slot_bytes;
        const u32 bytes = (u32)min((u64)tile.slot_bytes, tile.bytes - start);
        u8* to = weights(place, slot);
        for (u32 i = (side * 32 + lane) * 16; i < bytes; i += S::WARPS_N * 512) async_copy16(to + i, tile.data + start + i);
    }

    // The activations of a slot of a stage, by the warps that work on it.
    __device__ __forceinline__ void load_panel(u32 stage, u32 place) const {
        const u32 b = stage * S::SLOTS + slot;
        if (b >= slots) return;
        constexpr u32 THREADS = S::ROW_TILES * S::WARPS_N * 32;
        const u32 thread = threadIdx.x % THREADS, k = job.k, values = min(256u, k - b * 256);
        u8* to = panel(place, slot);
        for (u32 i = thread; i < columns * 16; i += THREADS) {
            const u32 column = i / 16, at = i % 16 * 16;
            if (at >= values) continue;
            const u64 from = (u64)ins[column] * k + b * 256 + at;
            async_copy16(to + column * Panel<N>::PITCH + at, job.x.hi + from);
            if constexpr (PLANES == 2) async_copy16(to + Panel<N>::LOW + column * Panel<N>::PITCH + at, job.x.lo + from);
        }
        u8* sums = to + Panel<N>::SUMS;
        u8* scales = to + Panel<N>::SCALES;
        if (k % 256 == 0) {
            for (u32 i = thread; i < columns * 4; i += THREADS)
                async_copy16(sums + i * 16, job.x.sum + (u64)ins[i / 4] * (k / 16) + b * 16 + i % 4 * 4);
            for (u32 i = thread; i < columns; i += THREADS) async_copy4(scales + i * 4, job.x.scale + (u64)ins[i] * (k / 256) + b);
        } else {
            for (u32 i = thread; i < columns * 16; i += THREADS)
                if (i % 16 * 16 < values) async_copy4(sums + i * 4, job.x.sum + (u64)ins[i / 16] * (k / 16) + b * 16 + i % 16);
            for (u32 i = thread; i < columns * 8; i += THREADS)
                if (i % 8 * 32 < values) async_copy4(scales + (i % 8 * N + i / 8) * 4, job.x.scale + (u64)ins[i / 8] * (k / 32) + b * 8 + i % 8);
        }
    }
};

// The sums that a warp owns: rows 16 (m + ..) of its tile, column tiles j + .. * WARPS_N.
template <class S> struct Owned {
    f32 sums[S::OWN_M][S::OWN_J][4];
    u32 m, j;
    bool any;

    __device__ __forceinline__ explicit Owned(const Block<S>& block) {
        m = S::SLOTS == 1 ? 0 : block.slot % 2;
        j = S::SLOTS == 1 ? block.side : block.slot / 2 * S::OWN_J;
        any = block.tile.active && j < S::COLUMNS / 8;
#pragma unroll
        for (u32 i = 0; i < S::OWN_M * S::OWN_J * 4; i++) (&sums[0][0][0])[i] = 0.0f;
    }

    // f(m, j, c, row, column) for each sum.
    template <class F> __device__ __forceinline__ void each(const Block<S>& block, F f) const {
#pragma unroll
        for (u32 mi = 0; mi < S::OWN_M; mi++)
#pragma unroll
            for (u32 ji = 0; ji < S::OWN_J; ji++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    const u32 row = block.tile.first + (m + mi) * 16 + c / 2 * 8 + fragment_row();
                    const u32 column = (j + ji * S::WARPS_N) * 8 + fragment_quad() * 2 + c % 2;
                    if (any && row < block.tile.rows && column < block.columns) f(mi, ji, c, row, column);
                }
    }
};

// Adds the terms of a stage, which lies at `place` of the ring.
template <class S> __device__ __forceinline__ void add_stage(const Block<S>& block, Owned<S>& own, u32 stage, u32 place) {
    const Tile& tile = block.tile;
    const u32 first = stage * S::SLOTS;
    if (!is_super(tile.type)) {
        for (u32 i = 0; own.any && i < S::SLOTS && first + i < block.slots; i++)
            small_slot<S>(tile.type, block.weights(place, i), block.panel(place, i), min(8u, block.job.k / 32 - (first + i) * 8), block.job.k % 256 == 0, own.m, own.j, own.sums);
        if constexpr (S::SLOTS > 1) __syncthreads();
        return;
    }
    // Column tiles of this warp that have columns.
    const u32 tiles = (block.columns + 7) / 8, used = (tiles - min(tiles, block.side) + S::WARPS_N - 1) / S::WARPS_N;
    const bool here = tile.active && used > 0 && first + block.slot < block.slots;
    if constexpr (S::SLOTS == 1) {
        if (here) super_slot<S>(tile.type, block.weights(place, 0), block.panel(place, 0), block.side, used, own.sums);
    } else {
        float4* terms = block.terms + block.warp_m * S::SLOTS * 2 * S::J * 32 + block.lane;
        if (here) {
            f32 mine[2][S::J][4] = {};
            super_slot<S>(tile.type, block.weights(place, block.slot), block.panel(place, block.slot), 0, used, mine);
#pragma unroll
            for (u32 i = 0; i < 2 * S::J; i++) {
                const f32* t = mine[i / S::J][i % S::J];
                terms[(block.slot * 2 * S::J + i) * 32] = make_float4(t[0], t[1], t[2], t[3]);
            }
        }
        __syncthreads();
        for (u32 i = 0; own.any && i < S::SLOTS && first + i < block.slots; i++)
#pragma unroll
            for (u32 j = 0; j < S::OWN_J; j++) {
                const float4 t = terms[((i * 2 + own.m) * S::J + own.j + j) * 32];
                f32* sum = own.sums[0][j];
                sum[0] = __fadd_rn(sum[0], t.x), sum[1] = __fadd_rn(sum[1], t.y);
                sum[2] = __fadd_rn(sum[2], t.z), sum[3] = __fadd_rn(sum[3], t.w);
            }
    }
}

// The second matrix's sums cross to the warps of the first one's same rows.
template <class S> __device__ __forceinline__ void swiglu(const Block<S>& block, Owned<S>& own) {
    constexpr u32 EACH = S::OWN_M * S::OWN_J;
    f32* here = (f32*)block.ring + ((block.warp_m / 2 * S::SLOTS + block.slot) * S::WARPS_N + block.side) * EACH * 128 + block.lane;
    f32* sums = &own.sums[0][0][0];
    __syncthreads();
    if (block.warp_m % 2) {
#pragma unroll
        for (u32 i = 0; i < EACH * 4; i++) here[i * 32] = sums[i];
    }
    __syncthreads();
    if (block.warp_m % 2) own.any = false;
    else {
#pragma unroll
        for (u32 i = 0; i < EACH * 4; i++) sums[i] = __fmul_rn(silu(sums[i]), here[i * 32]);
    }
}

template <class S> __device__ __forceinline__ void finish(const Block<S>& block, Owned<S>& own) {
    const u32 epilogue = block.job.epilogue;
    if (S::ROW_TILES % 2 == 0 && epilogue == SWIGLU) swiglu<S>(block, own);
    own.each(block, [&](u32 m, u32 j, u32 c, u32 row, u32 column) {
        f32* out = block.tile.out + (u64)block.outs[column] * block.tile.rows + row;
        const f32 v = own.sums[m][j][c];
        if (epilogue == ADD) *out = __fadd_rn(*out, v);
        else if (epilogue == GATE) *out = __fmul_rn(silu(v), *out);
        else *out = v;
    });
}

template <class S> __device__ __forceinline__ void product(const Job& job) {
    Block<S> block(job, dynamic_shared<u8>());
    const u32 stages = job.stages, ahead = stages > 1 ? stages - 1 : 1;
    launch_dependents();

    u32 expert = 0, first = blockIdx.y * S::COLUMNS;
    if (job.share > 0) {
        wait_dependencies();
        if (blockIdx.y >= *job.groups.tile_count) return;
        const u32* entry = job.groups.tile + (u64)blockIdx.y * 3;
        expert = entry[0], first = entry[1], block.columns = entry[2];
    } else {
        block.columns = min(S::COLUMNS, job.rows - first);
    }
    block.tile = find_tile(job, blockIdx.x * S::ROW_TILES + block.warp_m, expert);
    for (u32 s = 0; s < ahead; s++) block.load_weights(s, s);
    // Weights are the only thing that may be read before the kernels ahead have ended.
    if (job.share == 0) wait_dependencies();
    for (u32 i = threadIdx.x; i < block.columns; i += S::WARPS * 32) {
        const u32 row = job.share > 0 ? job.groups.pair[first + i] : first + i;
        block.outs[i] = row;
        block.ins[i] = job.share > 1 ? row / job.share : row;
    }
    __syncthreads();

    Owned<S> own(block);
    const u32 total = (block.slots + S::SLOTS - 1) / S::SLOTS;
    for (u32 s = 0; s + 1 < stages; s++) {
        block.load_panel(s, s);
        async_commit();
    }
    // The places of this stage and of the newest one.
    u32 place = 0, newest = ahead % stages;
    for (u32 s = 0; s < total; s++) {
        if (stages == 1) {
            // One place: it is filled again when every warp has done with it.
            if (s > 0) {
                __syncthreads();
                block.load_weights(s, 0);
            }
            block.load_panel(s, 0);
            async_commit();
        }
        async_wait_but(stages > 1 ? stages - 2 : 0);
        __syncthreads();
        if (stages > 1) {
            block.load_weights(s + ahead, newest);
            block.load_panel(s + ahead, newest);
            async_commit();
        }
        add_stage<S>(block, own, s, place);
        place = place + 1 == stages ? 0 : place + 1;
        newest = newest + 1 == stages ? 0 : newest + 1;
    }
    async_wait<0>();
    finish<S>(block, own);
}

// Columns, row tiles, warps across columns, slots.
typedef Shape<8, 2, 1, LARGE ? 4 : 2> Eight;
typedef Shape<16, 2, 1, LARGE ? 4 : 2> Sixteen;
typedef Shape<LARGE ? 64 : 32, 4, 2, 1> Many;

extern "C" __global__ void __launch_bounds__(Eight::WARPS * 32, 2) product_8(const __grid_constant__ Job job) {
    product<Eight>(job);
}
extern "C" __global__ void __launch_bounds__(Sixteen::WARPS * 32, 2) product_16(const __grid_constant__ Job job) {
    product<Sixteen>(job);
}
extern "C" __global__ void __launch_bounds__(Many::WARPS * 32, 1) product_64(const __grid_constant__ Job job) {
    product<Many>(job);
}
