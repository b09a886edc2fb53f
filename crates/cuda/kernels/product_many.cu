// out[t][n] = w[n] . x[t] for weights in super-blocks (ARCHITECTURE.md, rule 1) and many rows of activations, on Hopper:
// what product.cu does, for the types Q2_K to Q6_K and rows of a multiple of 256 values.
//
// A block of threads is persistent. Its items are 4 tiles of 32 weight rows (for SWIGLU two of each matrix) by up to 64
// columns. One warpgroup copies: for a slot of 256 values of k the tiles' weights and the columns' activations, stage after
// stage, item after item, as far ahead as the ring holds. Two warpgroups multiply, 64 rows each: a warp opens its 16 rows
// of weights into registers and the tensor cores take the activations straight from shared memory (wgmma.cuh). While
// one warpgroup turns its sums into terms, the other's products keep the tensor cores busy.
// Grid: as many blocks as processors. Items: row tiles within groups of columns; by expert, groups are `groups.tile`.
// Order: an output is the sum of its blocks' terms in block order, in one thread. Bytes: as product.cu.
#include "product_blocks.cuh"
#include "product_job.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

constexpr u32 WARPGROUP = 128, READERS = 2, COLUMNS = 64, TILES = 2 * READERS;
constexpr u32 THREADS = (READERS + 1) * WARPGROUP;
// Registers of a thread: of who copies and of who multiplies. At the start all have the same share of the 64 Ki.
constexpr u32 COPIER_REGISTERS = 56, READER_REGISTERS = 224;

#if HAS_WGMMA

// A stage: a Columns, then the slots of TILES tiles. Stages begin at multiples of 1024 bytes.
struct Columns {
    u8 plane[PLANES][2][COLUMNS * 128];  // by halves of the slot; panels of wgmma.cuh
    i32 sum[COLUMNS][16];
    f32 scale[COLUMNS];
};
constexpr u32 ATOM = 1024, MAX_STAGES = 8;
static_assert(sizeof(Columns) % 16 == 0, "tiles follow");

// The products of a warpgroup's 64 rows, on their way out.
struct Outputs {
    f32 value[COLUMNS][64];
    u32 row[COLUMNS];  // of `out`

    // Lanes of a warp have eight rows of four pairs of columns: no two meet in a bank.
    __device__ __forceinline__ f32& at(u32 column, u32 row) { return value[column][row ^ column / 2 % 4 * 8]; }
};

__device__ __forceinline__ u32 up_to(u32 n, u32 multiple) { return (n + multiple - 1) / multiple * multiple; }

// Dynamic shared memory, and where a thread stands in it.
struct Ring {
    u64 *full, *free;  // barriers [stages]
    Outputs* outputs;  // [READERS]
    u8* first;
    u32 stages, stage_bytes;
    u32 place = 0, parity = 0;

    __device__ __forceinline__ explicit Ring(const Job& job) : stages(job.stages) {
        full = dynamic_shared<u64>();
        free = full + MAX_STAGES;
        outputs = (Outputs*)(free + MAX_STAGES);
        first = (u8*)(outputs + READERS);
        first += shared_padding(first, ATOM);
        stage_bytes = up_to((u32)sizeof(Columns) + TILES * job.weight_bytes, ATOM);
    }
    __device__ __forceinline__ Columns& columns() const { return *(Columns*)(first + place * stage_bytes); }
    __device__ __forceinline__ u8* weights() const { return first + place * stage_bytes + sizeof(Columns); }
    __device__ __forceinline__ void advance() {
        if (++place == stages) place = 0, parity ^= 1;
    }
};

// Four row tiles by a group of columns.
struct Item {
    u32 matrix, type, rows;  // of the matrix; for SWIGLU, of both
    u32 tile, tiles;         // the first tile, and how many the matrix has
    u32 expert, first, columns;

    // Row tiles of a matrix that an item takes.
    static __device__ __forceinline__ u32 step(const Job& job) { return job.epilogue == SWIGLU ? TILES / 2 : TILES; }
    static __device__ __forceinline__ u32 across(const Job& job, u32 matrix) { return ((job.w[matrix].rows + 31) / 32 + step(job) - 1) / step(job); }

    __device__ __forceinline__ Item(const Job& job, u32 index, u32 row_items) {
        const u32 group = index / row_items;
        index %= row_items;
        matrix = 0;
        while (matrix + 1 < job.matrices && job.epilogue != SWIGLU && index >= across(job, matrix)) index -= across(job, matrix++);
        type = job.w[matrix].type;
        rows = job.w[matrix].rows;
        tile = index * step(job);
        tiles = (rows + 31) / 32;
        if (job.share > 0) {
            const u32* entry = job.groups.tile + (u64)group * 3;
            expert = entry[0], first = entry[1], columns = entry[2];
        } else {
            expert = 0, first = group * COLUMNS, columns = min(COLUMNS, job.rows - first);
        }
    }
    // The row of `out` that a column is.
    __device__ __forceinline__ u32 out_row(const Job& job, u32 column) const {
        return job.share > 0 ? job.groups.pair[first + column] : first + column;
    }
};

// Items of the whole product, of which a block takes every gridDim.x-th.
struct Items {
    u32 across, count;
    __device__ __forceinline__ explicit Items(const Job& job) : across(Item::across(job, 0)) {
        for (u32 m = 1; m < job.matrices && job.epilogue != SWIGLU; m++) across += Item::across(job, m);
        count = across * (job.share > 0 ? *job.groups.tile_count : (job.rows + COLUMNS - 1) / COLUMNS);
    }
};

// ---- Copying -----------------------------------------------------------------------------------------------------------
// The weights of slot b, by one thread, which arrives at the stage's barrier.
__device__ __forceinline__ void copy_weights(const Job& job, const Item& item, const Ring& ring, u32 b) {
    const u32 bytes = slot_bytes(item.type), slots = job.k / 256;
    const bool pairs = job.epilogue == SWIGLU;
    u32 active = 0;
    for (u32 s = 0; s < TILES; s++) active += item.tile + (pairs ? s / 2 : s) < item.tiles;
    mbarrier_expect(&ring.full[ring.place], active * bytes);
    for (u32 s = 0; s < TILES; s++) {
        const u32 tile = item.tile + (pairs ? s / 2 : s);
        if (tile >= item.tiles) continue;
        const u8* data = job.w[pairs ? s % 2 : item.matrix].data;
        const u64 at = ((u64)item.expert * item.tiles + tile) * slots + b;
        bulk_copy(ring.weights() + s * job.weight_bytes, data + at * bytes, bytes, &ring.full[ring.place]);
    }
}

__device__ __forceinline__ void copy_items(const Job& job, const Items& items, Ring ring) {
    const u32 thread = threadIdx.x % WARPGROUP, slots = job.k / 256;
    // A thread's chunk of a plane's columns, and the columns that it copies it of.
    constexpr u32 STRIDE = WARPGROUP / 16, OWN = COLUMNS / STRIDE, SUMS = COLUMNS * 4 / WARPGROUP;
    const u32 chunk = thread % 16, column = thread / 16;
    for (u32 i = blockIdx.x; i < items.count; i += gridDim.x) {
        const Item item(job, i, items.across);
        auto in_row = [&](u32 column) { return column < item.columns ? item.out_row(job, column) / (job.share > 1 ? job.share : 1) : 0; };
        u32 from[OWN], sum_from[SUMS];
#pragma unroll
        for (u32 j = 0; j < OWN; j++) from[j] = in_row(column + j * STRIDE) * job.k + chunk * 16;
#pragma unroll
        for (u32 j = 0; j < SUMS; j++) sum_from[j] = in_row(thread / 4 + j * (WARPGROUP / 4)) * (job.k / 16) + thread % 4 * 4;
        const u32 scale_from = in_row(thread % COLUMNS) * slots;
        for (u32 b = 0; b < slots; b++, ring.advance()) {
            mbarrier_wait(&ring.free[ring.place], ring.parity ^ 1);
            if (thread == 0) copy_weights(job, item, ring, b);
            Columns& stage = ring.columns();
#pragma unroll
            for (u32 j = 0; j < OWN; j++) {
                const u32 c = column + j * STRIDE;
                if (c >= item.columns) continue;
                u8* place = &stage.plane[0][chunk / 8][0] + swizzled(c, chunk % 8);
                async_copy16(place, job.x.hi + from[j] + b * 256);
                if constexpr (PLANES == 2) async_copy16(place + sizeof stage.plane[0], job.x.lo + from[j] + b * 256);
            }
#pragma unroll
            for (u32 j = 0; j < SUMS; j++) {
                const u32 c = thread / 4 + j * (WARPGROUP / 4);
                if (c < item.columns) async_copy16(&stage.sum[c][thread % 4 * 4], job.x.sum + sum_from[j] + b * 16);
            }
            if (thread < item.columns) async_copy4(&stage.scale[thread], job.x.scale + scale_from + b);
            async_arrive(&ring.full[ring.place]);
        }
    }
    // A block's shared memory is not given back while copies are under way.
    async_wait<0>();
}

// ---- Multiplying -------------------------------------------------------------------------------------------------------
constexpr u32 COLUMN_TILES = COLUMNS / 8;

// A row of a band in shared memory. A warp's 16 rows may come from two tiles.
struct BandRow {
    const u8* band;
    u32 row;
};

// What a lane needs of half h of a row's super-block, in registers.
template <u32 T> struct HalfRow {
    static constexpr u32 LOW = T == T_Q2K || T == T_Q3K ? 2 : 4;
    u32 low[LOW], high[2];
    uint2 scales;

    // The word of `low` that sub-block (s, half) lies in.
    static constexpr __device__ u32 place(u32 s, u32 half) { return (T == T_Q6K ? s % 2 * 2 : LOW == 4 ? s / 2 * 2 : 0) + half; }

    __device__ __forceinline__ void load(const BandRow& r, u32 h) {
        scales = half_scales<T>(r.band, r.row, h);
#pragma unroll
        for (u32 s = 0; s < 4; s++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) low[place(s, half)] = word(r.band, low_piece<T>(h, s, half), r.row);
        if constexpr (HAS_HIGH<T>) high[0] = word(r.band, high_piece<T>(h, 0), r.row), high[1] = word(r.band, high_piece<T>(h, 1), r.row);
    }
    __device__ __forceinline__ void open(u32 h, u32 s, u32 half, u32& low_plane, u32& high_plane) const {
        multiply<T>(join_codes<T>(low[place(s, half)], HAS_HIGH<T> ? high[half] : 0, h, s), factor<T>(scales, s, half), low_plane, high_plane);
    }
};

// Adds a super-block's terms to sums[j][c]: column tile j of N / 8; c as in fragment.cuh, for the lane's two rows.
template <u32 T, u32 N> __device__ __forceinline__ void add_super(const BandRow (&rows)[2], const Columns& x, f32 (&sums)[COLUMN_TILES][4]) {
    constexpr u32 PARTS = WEIGHT_PLANES<T>, STEPS = 8;
    i32 acc[PARTS * PLANES][N / 2];
    const Panel128 first(&x.plane[0][0][0]);
    u32 a[2][2][4];
    HalfRow<T> half[2];
    half[0].load(rows[0], 0), half[1].load(rows[1], 0);
#pragma unroll
    for (u32 step = 0; step < STEPS; step++) {
        const u32 h = step / 4, s = step % 4;
        u32 (&planes)[2][4] = a[step % 2];
#pragma unroll
        for (u32 i = 0; i < 4; i++) half[i % 2].open(h, s, i / 2, planes[0][i], planes[1][i]);
        // The second half's words come while the first half's last ones are multiplied.
        if (step == 3) half[0].load(rows[0], 1), half[1].load(rows[1], 1);
        wgmma_fence();
#pragma unroll
        for (u32 p = 0; p < PLANES; p++) {
            const Panel128 part = first.at((u32)(p * sizeof x.plane[0] + h * sizeof x.plane[0][0] + s * 32));
            wgmma<N, SIGNED<T> && PARTS == 1>(acc[p], planes[0], part, step > 0);
            if constexpr (PARTS == 2) wgmma<N, SIGNED<T>>(acc[PLANES + p], planes[1], part, step > 0);
        }
        wgmma_commit();
        // The step before is done with its fragments.
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (u32 p = 0; p < PARTS * PLANES; p++) wgmma_settle(acc[p]);

    float2 d[2];
    u32 minimum[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        d[i] = block_scales<T>(rows[i].band, rows[i].row);
        if constexpr (HAS_MINIMUM<T>) minimum[i] = minima<T>(rows[i].band, rows[i].row);
    }
#pragma unroll
    for (u32 j = 0; j < N / 8; j++) {
        const float2 s = *(const float2*)&x.scale[j * 8 + fragment_quad() * 2];
        i32 g[4];
        if constexpr (HAS_MINIMUM<T>) {
            u32 planes[4];
            byte_planes(*(const int4*)&x.sum[j * 8 + fragment_row()][fragment_quad() * 4], planes);
            minimum_sums(minimum, planes, g);
        }
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            i32 tile[PARTS * PLANES][4];
#pragma unroll
            for (u32 p = 0; p < PARTS * PLANES; p++) tile[p][c] = acc[p][j * 4 + c];
            f32 term = __fmul_rn(d[c / 2].x, joined<T, PARTS>(tile, c));
            // Without minima the rule subtracts +0, which changes no bit.
            if constexpr (HAS_MINIMUM<T>) term = __fsub_rn(term, __fmul_rn(d[c / 2].y, __int2float_rn(g[c])));
            sums[j][c] = __fadd_rn(sums[j][c], __fmul_rn(c % 2 ? s.y : s.x, term));
        }
    }
}

// Which rows of an item a lane has: in the ring's tiles, and in the matrix.
struct LaneRows {
    u32 slot[2], row[2];  // tile of the stage, row of it
    u32 out[2];           // row of the warpgroup's 64 outputs

    __device__ __forceinline__ explicit LaneRows(bool pairs) {
        const u32 group = threadIdx.x / WARPGROUP, warp = threadIdx.x % WARPGROUP / 32, g = fragment_row();
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            // For SWIGLU a warp has eight rows of both matrices: a lane finds both factors of its outputs.
            slot[i] = pairs ? group * 2 + i : group * 2 + warp / 2;
            row[i] = pairs ? warp * 8 + g : warp % 2 * 16 + i * 8 + g;
            out[i] = pairs ? i * 32 + row[i] : warp / 2 * 32 + row[i];
        }
    }
};

// Stores a warpgroup's products. They cross to other threads, so that a warp stores 32 rows of a column, and by little code:
// it runs once an item, and comes from far.
template <u32 EPILOGUE>
__device__ __forceinline__ void store(const Item& item, f32* out, u32 left, Outputs& outputs) {
    constexpr bool GATED = EPILOGUE == SWIGLU || EPILOGUE == GATE;
    constexpr u32 ROWS = EPILOGUE == SWIGLU ? 32 : 64, STEP = WARPGROUP / ROWS, BATCH = GATED ? 4 : 8;
    const u32 thread = threadIdx.x % WARPGROUP, row = thread % ROWS;
    if (row >= left) return;
#pragma unroll 1
    for (u32 first = thread / ROWS; first < item.columns; first += BATCH * STEP) {
        f32* to[BATCH];
        f32 old[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 column = min(first + i * STEP, item.columns - 1);
            to[i] = out + (u64)outputs.row[column] * item.rows + row;
            if constexpr (EPILOGUE == ADD || EPILOGUE == GATE) old[i] = *to[i];
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 column = first + i * STEP;
            f32 v = outputs.at(min(column, COLUMNS - 1), row);
            if constexpr (EPILOGUE == ADD) v = __fadd_rn(old[i], v);
            if constexpr (EPILOGUE == GATE) v = __fmul_rn(silu(v), old[i]);
            if constexpr (EPILOGUE == SWIGLU) v = __fmul_rn(silu(v), outputs.at(min(column, COLUMNS - 1), ROWS + row));
            if (column < item.columns) *to[i] = v;
        }
    }
}

__device__ __forceinline__ void finish(const Job& job, const Item& item, const LaneRows& lane, u32 out_row, const f32 (&sums)[COLUMN_TILES][4], Outputs& outputs) {
    const u32 group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    // The item before has left.
    barrier_sync(1 + group, WARPGROUP);
#pragma unroll
    for (u32 j = 0; j < COLUMN_TILES; j++) {
        if (j * 8 >= item.columns) break;
#pragma unroll
        for (u32 c = 0; c < 4; c++) outputs.at(j * 8 + fragment_quad() * 2 + c % 2, lane.out[c / 2]) = sums[j][c];
    }
    if (thread < COLUMNS) outputs.row[thread] = out_row;
    barrier_sync(1 + group, WARPGROUP);
    const u32 first = item.tile * 32 + group * (job.epilogue == SWIGLU ? 32 : 64), left = item.rows - min(first, item.rows);
    f32* const out = job.out[item.matrix] + first;
    switch (job.epilogue) {
        case STORE: store<STORE>(item, out, left, outputs); break;
        case ADD: store<ADD>(item, out, left, outputs); break;
        case GATE: store<GATE>(item, out, left, outputs); break;
        default: store<SWIGLU>(item, out, left, outputs); break;
    }
}

// All slots of an item.
template <u32 T, u32 N>
__device__ __forceinline__ void add_item(const Job& job, const LaneRows& lane, Ring& ring, f32 (&sums)[COLUMN_TILES][4]) {
    u32 offset[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) offset[i] = lane.slot[i] * job.weight_bytes + lane.row[i] / BAND * BAND_BYTES<T>;
#pragma unroll 1
    for (u32 left = job.k / 256; left > 0; left--, ring.advance()) {
        mbarrier_wait(&ring.full[ring.place], ring.parity);
        wgmma_see_shared();
        const BandRow rows[2] = {{ring.weights() + offset[0], lane.row[0] % BAND}, {ring.weights() + offset[1], lane.row[1] % BAND}};
        add_super<T, N>(rows, ring.columns(), sums);
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&ring.free[ring.place]);
    }
}

// Fewer columns cost less.
template <u32 T>
__device__ __forceinline__ void add_columns(const Job& job, const LaneRows& lane, u32 columns, Ring& ring, f32 (&sums)[COLUMN_TILES][4]) {
    if (columns > 48) add_item<T, 64>(job, lane, ring, sums);
    else if (columns > 32) add_item<T, 48>(job, lane, ring, sums);
    else if (columns > 16) add_item<T, 32>(job, lane, ring, sums);
    else add_item<T, 16>(job, lane, ring, sums);
}

__device__ __forceinline__ void multiply_items(const Job& job, const Items& items, Ring ring) {
    const u32 thread = threadIdx.x % WARPGROUP;
    const LaneRows lane(job.epilogue == SWIGLU);
    Outputs& outputs = ring.outputs[threadIdx.x / WARPGROUP];
    for (u32 i = blockIdx.x; i < items.count; i += gridDim.x) {
        const Item item(job, i, items.across);
        // Asked for early, wanted late.
        const u32 out_row = thread < item.columns ? item.out_row(job, thread) : 0;
        f32 sums[COLUMN_TILES][4] = {};
        switch (item.type) {
            case T_Q2K: if constexpr (has(T_Q2K)) add_columns<T_Q2K>(job, lane, item.columns, ring, sums); break;
            case T_Q3K: if constexpr (has(T_Q3K)) add_columns<T_Q3K>(job, lane, item.columns, ring, sums); break;
            case T_Q4K: if constexpr (has(T_Q4K)) add_columns<T_Q4K>(job, lane, item.columns, ring, sums); break;
            case T_Q5K: if constexpr (has(T_Q5K)) add_columns<T_Q5K>(job, lane, item.columns, ring, sums); break;
            case T_Q6K: if constexpr (has(T_Q6K)) add_columns<T_Q6K>(job, lane, item.columns, ring, sums); break;
        }
        finish(job, item, lane, out_row, sums, outputs);
    }
}

__device__ __forceinline__ void product(const Job& job) {
    const Ring ring(job);
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < job.stages; s++) {
            // Every copying thread when its copies have come, and the one that expects the weights.
            mbarrier_init(&ring.full[s], WARPGROUP + 1);
            mbarrier_init(&ring.free[s], READERS * WARPGROUP / 32);
        }
        mbarrier_fence();
    }
    __syncthreads();
    wait_dependencies();
    const Items items(job);
    if (threadIdx.x / WARPGROUP == READERS) {
        registers_less<COPIER_REGISTERS>();
        copy_items(job, items, ring);
    } else {
        registers_more<READER_REGISTERS>();
        multiply_items(job, items, ring);
    }
}
#else
// The host asks for this kernel on Hopper only.
__device__ __forceinline__ void product(const Job&) { wait_dependencies(); }
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) product_many(const __grid_constant__ Job job) {
    launch_dependents();
    product(job);
}
