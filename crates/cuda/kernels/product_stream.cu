// out[t][n] = w[n] . x[t] for super-block types and few rows of activations, or few to an expert (ARCHITECTURE.md, rule 1):
// bound by the bytes of the weights, which stream once through shared memory.
//
// A unit is a tile of 32 weight rows (SWIGLU: the same tile of both matrices) by a group of up to N columns; its slices are
// 256 values of k each. Grid: one block of 16 warps to a processor, which takes a contiguous range of units, a pass of few
// at a time, a warp a slice. Slices come through a ring: who has multiplied slice i asks for slice i + slots, which lands
// in the same place. So memory is busy from the first to the last slice, whatever ends in between.
// With experts each block sorts the step's pairs by expert for itself: they are few, and it takes less than a launch. The
// first such kernel of a layer lets no other begin before the experts are known, so the second reads them before its wait.
// Without experts, or where they are settled so, the ring fills before the wait; else a slice to a warp is asked for, then
// activations, then the rest of the ring: nobody multiplies before both are there, and memory gives in the order of asking.
// The activations of a group are in shared memory for all of k. From sm_90 on they come by bulk copies, one to a thread,
// which are spread over the block without a division; 16 bytes at a time took 1,500 to 2,300 cycles longer.
// A block lives for some microseconds and runs most of its code once, from an instruction cache that is cold: loops that
// few laps go through stay loops. All of this, on an H200 for 8 / 32 / 64 streams: 3 / 1.2 / 1.6% of the tokens a second.
// Order: an output is the sum of its slices' terms in block order, from +0: terms meet in shared memory, where one thread
// adds an output's.
// Bytes: weights once for every group of columns; a group's activations once for every block that has units of it.
#include "fixed.cuh"
#include "product_few.cuh"
#include "ring.cuh"

// Of launch/product.rs.
enum Epilogue : u32 { STORE = 0, ADD = 1, GATE = 2, SWIGLU = 3 };

// The twins of constants in launch/stream.rs.
constexpr u32 WARPS = 16;
constexpr u32 MAX_SLOTS = 48;
constexpr u32 MAX_PAIRS = 512;
constexpr u32 THREADS = 32 * WARPS;
// A dense model has no experts: then it only has to compile.
constexpr u32 E = EXPERTS > 0 ? EXPERTS : 1;
static_assert(MAX_PAIRS <= THREADS, "a thread sorts one pair");

struct Job {
    Matrix w[3];
    f32* out[3];         // [T][rows], or [T * K][rows]
    Fixed x;             // [..][k]
    const f32* values;   // [..][k], to be rounded here; null: `x` is
    const u32* experts;  // [T * K], the experts of pairs; null: columns are rows of x
    u32 settled;         // whether `experts` may be read before the wait
    u32 matrices;
    u32 k;
    u32 columns;         // T, N at most; or T * K, MAX_PAIRS at most
    u32 share;           // pairs that read the same row of x
    u32 epilogue;
    u32 pass;            // units whose terms meet at a time: WARPS slices at most, unless a unit alone has more
    u32 slots;           // of the ring, WARPS at least
    u32 slice_bytes[3];  // of the matrices
    u32 slot_bytes;      // of the largest one
    u32 narrow;          // whether all matrices are of types that HAS_FEW
    u64 per_slices;      // for `quotient`: by the slices of a unit
    u64 per_tiles;       // and by the tiles of a group
};

// n / d for `inverse` = 2^32 / d, rounded up: right while n d < 2^32.
__device__ __forceinline__ u32 quotient(u32 n, u64 inverse) { return (u32)((n * inverse) >> 32); }

// A team of LANES threads asks for `pieces` pieces of BYTES (a multiple of 16), which follow one another, each `apart` bytes
// behind the one before. They are there once `expect_pieces` has been told of all bytes, its barrier's phase has ended,
// and, before sm_90, everyone has waited for copies of their own.
template <u32 LANES, u32 BYTES>
__device__ __forceinline__ void copy_pieces(u8* to, u32 apart, const void* from, u32 pieces, u64* barrier) {
#if __CUDA_ARCH__ >= 900
#pragma unroll 1
    for (u32 i = threadIdx.x % LANES; i < pieces; i += LANES) bulk_copy_once(to + i * apart, (const u8*)from + i * BYTES, BYTES, barrier);
#else
    for (u32 i = threadIdx.x % LANES * 16; i < pieces * BYTES; i += LANES * 16)
        async_copy16(to + i / BYTES * apart + i % BYTES, (const u8*)from + i);
#endif
}
__device__ __forceinline__ void expect_pieces(u64* barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    mbarrier_expect(barrier, bytes);
#else
    mbarrier_arrive(barrier);
#endif
}

// At the start of dynamic shared memory; then a Panel for each block of k, terms, and the ring.
struct alignas(16) State {
    u64 full[MAX_SLOTS];   // a slot's slice
    u64 here;              // a group's activations
    u32 group[MAX_PAIRS];  // expert << 13 | first of `pair` << 4 | columns
    u16 pair[MAX_PAIRS];   // by expert
    u32 start[E + 1];      // where an expert's pairs begin
    u32 groups;
};

__device__ __forceinline__ u32 warp_prefix(u32 v) {
#pragma unroll
    for (u32 w = 1; w < 32; w *= 2) {
        const u32 other = __shfl_up_sync(0xffffffffu, v, w);
        if (threadIdx.x % 32 >= w) v += other;
    }
    return v;
}

// Sorts the pairs by expert, into groups of N. `start` is zero. All blocks have the same groups: which of an expert's pairs
// are in one depends on the pairs alone, not on who came first.
template <u32 N> __device__ __forceinline__ void sort_pairs(State& s, const Job& job) {
    const u32 p = threadIdx.x;
    const bool mine = p < job.columns;
    u32 expert = 0, rank = 0;
    if (mine) {
        expert = load_fresh(job.experts + p);
        rank = atomicAdd(&s.start[expert], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        // Pairs below, groups above: a lane's experts are neighbours.
        constexpr u32 OWN = (E + 31) / 32;
        u32 own = 0;
#pragma unroll 1
        for (u32 i = 0; i < OWN; i++) {
            const u32 e = threadIdx.x * OWN + i, n = e < E ? s.start[e] : 0;
            own += (n + N - 1) / N << 16 | n;
        }
        const u32 upto = warp_prefix(own);
        u32 first = (upto - own) & 0xffff, group = (upto - own) >> 16;
#pragma unroll 1
        for (u32 i = 0; i < OWN; i++) {
            const u32 e = threadIdx.x * OWN + i, n = e < E ? s.start[e] : 0;
            if (e < E) s.start[e] = first;
#pragma unroll 1
            for (u32 c = 0; c < n; c += N) s.group[group++] = e << 13 | (first + c) << 4 | min(N, n - c);
            first += n;
        }
        if (threadIdx.x == 31) s.groups = group, s.start[E] = first;
    }
    __syncthreads();
    const u32 first = s.start[expert], n = s.start[expert + 1] - first;
    if (mine) s.pair[first + rank] = (u16)p;
    __syncthreads();
    // Where an expert has one group, any order does; each has where there are N rows at most, since experts of a row differ.
    if (job.columns <= N * USED) return;
    const bool ordered = mine && n > N;
    rank = 0;
    if (ordered)
#pragma unroll 1
        for (u32 i = 0; i < n; i++) rank += s.pair[first + i] < p;
    __syncthreads();
    if (ordered) s.pair[first + rank] = (u16)p;
    __syncthreads();
}

// The terms of a slice: FEW_RESULTS of a lane, `to` [results][32].
template <u32 T, u32 N, bool NARROW, u32 J>
__device__ __forceinline__ void slice_terms(const u8* slice, const u8* panel, u32 used, f32* to) {
    // Fewer column tiles cost less.
    if constexpr (J > 1) if (used < J) return slice_terms<T, N, NARROW, J - 1>(slice, panel, used, to);
    f32 terms[FEW_RESULTS<NARROW, N>];
    if constexpr (HAS_FEW<T>) {
        few_terms<T, N, NARROW, J>(slice, panel, terms);
    } else {
        // Of add_super: [m][j][row g or g + 8][column].
        f32 sums[2][N / 8][4] = {};
        add_super<T, N, J, 1, N / 8>(slice, panel, 0, sums);
#pragma unroll
        for (u32 i = 0; i < 8 * J; i++) terms[i] = sums[i / 4 % 2][i / 8][i % 4];
    }
#pragma unroll
    for (u32 i = 0; i < (NARROW ? 4 : 8 * J); i++) to[i * 32 + threadIdx.x % 32] = terms[i];
}

template <u32 N> struct Stream {
    // Room for the terms of a slice.
    static constexpr u32 TERMS = 32 * N;
    // Up to four columns have a product of their own.
    static constexpr bool NARROWS = N == 8 && PLANES == 2 && (has(T_Q4K) || has(T_Q6K));
    const Job& job;
    State& s;
    u8* panels;  // [blocks]
    f32* terms;  // [2][pass][slices][2][N / 8][4][32]
    u8* ring;    // [slots][slot_bytes]
    u32 blocks, slices, tiles;
    u32 first_unit, total;  // the block's first unit, and its slices

    __device__ __forceinline__ Stream(const Job& job, u8* shared) : job(job), s(*(State*)shared) {
        blocks = job.k / 256;
        slices = job.epilogue == SWIGLU ? 2 * blocks : blocks;
        tiles = 0;
        for (u32 i = 0; i < (job.epilogue == SWIGLU ? 1 : job.matrices); i++) tiles += (job.w[i].rows + 31) / 32;
        panels = shared + sizeof(State);
        terms = (f32*)(panels + blocks * Panel<N>::BYTES);
        ring = (u8*)(terms + 2 * job.pass * slices * TERMS);
        first_unit = total = 0;
    }

    // The matrix of a tile, which becomes that of the matrix.
    __device__ __forceinline__ u32 matrix_of(u32& tile) const {
        if (job.epilogue == SWIGLU) return 0;
        u32 matrix = 0;
#pragma unroll 1
        while (matrix + 1 < job.matrices && tile >= (job.w[matrix].rows + 31) / 32) tile -= (job.w[matrix++].rows + 31) / 32;
        return matrix;
    }

    // Asks for slice `i` of the block.
    __device__ __forceinline__ void fetch(u32 i, u32 slot) const {
        const u32 unit = quotient(i, job.per_slices), at = first_unit + unit, group = quotient(at, job.per_tiles);
        u32 tile = at - group * tiles, block = i - unit * slices, matrix = matrix_of(tile);
        if (block >= blocks) block -= blocks, matrix = 1;
        const Matrix& w = job.w[matrix];
        const u32 bytes = job.slice_bytes[matrix];
        const u64 expert = job.experts ? s.group[group] >> 13 : 0;
        const u8* from = w.data + ((expert * ((w.rows + 31) / 32) + tile) * blocks + block) * bytes;
        copy_stage<true>(ring + slot * job.slot_bytes, from, bytes, s.full + slot);
    }

    // Asks for slices `from` to `to - 1`, of those that the block has, before any slot is used again.
    __device__ __forceinline__ void fill(u32 from, u32 to) const {
#pragma unroll 1
        for (u32 i = from + threadIdx.x / 32; i < min(to, total); i += WARPS) fetch(i, i);
    }

    // Columns of a group.
    __device__ __forceinline__ u32 columns(u32 group) const { return job.experts ? s.group[group] & 15 : job.columns; }
    // The row of `out` that column c of a group is.
    __device__ __forceinline__ u32 column_id(u32 group, u32 c) const { return job.experts ? s.pair[(s.group[group] >> 4 & 511) + c] : c; }

    // Rounds block b of a row of floats to column c, by a warp.
    __device__ __forceinline__ void round_block(u32 c, u32 b, u32 row) const {
        const u32 at = threadIdx.x % 32 * 8;
        u8* panel = panels + b * Panel<N>::BYTES;
        const Fixed to = {(i8*)panel + c * Panel<N>::PITCH, (i8*)panel + Panel<N>::LOW + c * Panel<N>::PITCH,
                          (i32*)(panel + Panel<N>::SUMS) + c * 16, (f32*)(panel + Panel<N>::SCALES) + c};
        round_eight<256>(load_eight(job.values + (u64)row * job.k + b * 256 + at), at, true, to);
    }
    // Asks for a part of column c, by half a warp: plane 0 or 1, sums (2), scales (3).
    __device__ __forceinline__ void ask_part(u32 part, u32 c, u32 row) const {
        const u64 at = (u64)row * job.k;
        if (part < PLANES) {
            u8* to = panels + part * Panel<N>::LOW + c * Panel<N>::PITCH;
            copy_pieces<16, 256>(to, Panel<N>::BYTES, (part ? job.x.lo : job.x.hi) + at, blocks, &s.here);
        } else if (part == 2) {
            copy_pieces<16, 64>(panels + Panel<N>::SUMS + c * 64, Panel<N>::BYTES, job.x.sum + at / 16, blocks, &s.here);
        } else if (part == 3) {
            // Too small for a bulk copy.
#pragma unroll 1
            for (u32 b = threadIdx.x % 16; b < blocks; b += 16)
                async_copy4(panels + b * Panel<N>::BYTES + Panel<N>::SCALES + c * 4, job.x.scale + at / 256 + b);
        }
    }
    // Asks for a group's activations.
    __device__ __forceinline__ void ask_panels(u32 group) const {
        const u32 count = columns(group);
        const auto row = [&](u32 c) { return column_id(group, c) / job.share; };
        if (job.values) {
#pragma unroll 1
            for (u32 i = threadIdx.x / 32; i < count * blocks; i += WARPS) round_block(i / blocks, i % blocks, row(i / blocks));
        } else {
            if (threadIdx.x == 0) expect_pieces(&s.here, count * blocks * (PLANES * 256 + 64));
#pragma unroll 1
            for (u32 i = threadIdx.x / 16; i < count * 4; i += THREADS / 16) ask_part(i % 4, i / 4, row(i / 4));
        }
    }
    // Waits for them; `parity`: of the number of groups before.
    __device__ __forceinline__ void await_panels(u32 parity) const {
        async_commit();
        async_wait<0>();
        __syncthreads();
        if (!job.values) mbarrier_wait(&s.here, parity);
    }

    // The terms of a slice of `type`, block `block` of its row.
    template <bool NARROW> __device__ __forceinline__ void multiply(u32 type, u32 block, const u8* slice, u32 count, f32* to) const {
        const u8* panel = panels + block * Panel<N>::BYTES;
        constexpr u32 J = NARROW ? 1 : N / 8;
        const u32 used = (count + 7) / 8;
        switch (type) {
            case T_Q4K: if constexpr (has(T_Q4K)) slice_terms<T_Q4K, N, NARROW, J>(slice, panel, used, to); break;
            case T_Q6K: if constexpr (has(T_Q6K)) slice_terms<T_Q6K, N, NARROW, J>(slice, panel, used, to); break;
            case T_Q2K: if constexpr (has(T_Q2K) && !NARROW) slice_terms<T_Q2K, N, NARROW, J>(slice, panel, used, to); break;
            case T_Q3K: if constexpr (has(T_Q3K) && !NARROW) slice_terms<T_Q3K, N, NARROW, J>(slice, panel, used, to); break;
            case T_Q5K: if constexpr (has(T_Q5K) && !NARROW) slice_terms<T_Q5K, N, NARROW, J>(slice, panel, used, to); break;
        }
    }

    // The outputs of `units` units from tile `first` of a group on; an output's terms lie TERMS apart.
    template <bool NARROW> __device__ __forceinline__ void finish(u32 group, u32 first, u32 units, const f32* from) const {
        constexpr u32 OUTPUTS = 32 * FEW_RESULTS<NARROW, N>;
        const u32 count = columns(group);
#pragma unroll 1
        for (u32 o = threadIdx.x; o < units * OUTPUTS; o += THREADS) {
            const u32 unit = o / OUTPUTS, place = o % OUTPUTS, lane = place % 32;
            const u32 column = few_column<NARROW>(place / 32, lane);
            if (column >= count) continue;
            u32 tile = first + unit;
            const u32 matrix = matrix_of(tile), row = tile * 32 + few_row<NARROW>(place / 32, lane);
            const u32 rows = job.w[matrix].rows;
            if (row >= rows) continue;
            const f32* term = from + unit * slices * TERMS + place;
            const auto sum_of = [&](u32 first) {
                f32 sum = 0.0f;
#pragma unroll 8
                for (u32 b = 0; b < blocks; b++) sum = __fadd_rn(sum, term[(first + b) * TERMS]);
                return sum;
            };
            f32* out = job.out[matrix] + (u64)column_id(group, column) * rows + row;
            const f32 v = sum_of(0);
            if (job.epilogue == SWIGLU) *out = __fmul_rn(silu(v), sum_of(blocks));
            else if (job.epilogue == ADD) *out = __fadd_rn(*out, v);
            else if (job.epilogue == GATE) *out = __fmul_rn(silu(v), *out);
            else *out = v;
        }
    }

    // Multiplies the slices from `done` to `stop`, which begin at tile `first` of a group.
    template <bool NARROW> __device__ __forceinline__ void pass(u32 group, u32 first, u32 done, u32 stop, u32 place, u32 parity, f32* meeting) {
        const u32 count = columns(group);
#pragma unroll 1
        for (u32 i = done + threadIdx.x / 32; i < stop; i += WARPS) {
            u32 slot = place + i - done, turn = parity;
            while (slot >= job.slots) slot -= job.slots, turn ^= 1;
            const u32 unit = quotient(i - done, job.per_slices);
            u32 tile = first + unit, block = i - done - unit * slices, matrix = matrix_of(tile);
            if (block >= blocks) block -= blocks, matrix = 1;
            mbarrier_wait(s.full + slot, turn);
            multiply<NARROW>(job.w[matrix].type, block, ring + slot * job.slot_bytes, count, meeting + (i - done) * TERMS);
            __syncwarp();
            if (i + job.slots < total) fetch(i + job.slots, slot);
        }
    }

    __device__ __forceinline__ void run() {
        for (u32 i = threadIdx.x; i < job.slots; i += THREADS) mbarrier_init(s.full + i, FULL_ARRIVALS);
        if (threadIdx.x == 0) mbarrier_init(&s.here, 1);
        for (u32 e = threadIdx.x; e < E; e += THREADS) s.start[e] = 0;
        mbarrier_fence();
        // Brings all lines of the job near before anybody is in a hurry: a word of each, to where terms will be.
        constexpr u32 LINE = 64;
        if (threadIdx.x < (sizeof(Job) + LINE - 1) / LINE) ((u32*)terms)[threadIdx.x] = ((const u32*)&job)[threadIdx.x * (LINE / 4)];
        __syncthreads();
        u32 groups = 1;
        if (job.experts) {
            if (!job.settled) wait_dependencies();
            launch_dependents();
            sort_pairs<N>(s, job);
            groups = s.groups;
        }
        const u32 units = groups * tiles, end = (u64)units * (blockIdx.x + 1) / gridDim.x;
        first_unit = (u64)units * blockIdx.x / gridDim.x;
        total = (end - first_unit) * slices;
        const bool waited = job.experts && !job.settled;
        fill(0, waited ? WARPS : job.slots);
        if (!waited) wait_dependencies();
        if (!job.experts) launch_dependents();

        u32 group = first_unit / tiles, tile = first_unit - group * tiles, place = 0, parity = 0, turn = 0;
        f32* meeting = terms;
        bool fresh = true;
#pragma unroll 1
        for (u32 done = 0; done < total;) {
            if (fresh) {
                ask_panels(group);
                if (waited && done == 0) fill(WARPS, job.slots);
                await_panels(turn);
                turn ^= 1;
            }
            const bool narrow = NARROWS && job.narrow && columns(group) <= 4;
            const u32 count = min(job.pass, tiles - tile), stop = min(done + count * slices, total);
            if (narrow) pass<NARROWS>(group, tile, done, stop, place, parity, meeting);
            else pass<false>(group, tile, done, stop, place, parity, meeting);
            __syncthreads();
            const u32 passed = quotient(stop - done, job.per_slices);
            if (narrow) finish<NARROWS>(group, tile, passed, meeting);
            else finish<false>(group, tile, passed, meeting);
            // The next pass's terms go elsewhere while this one's are being read.
            meeting = meeting == terms ? terms + job.pass * slices * TERMS : terms;
            place += stop - done;
            while (place >= job.slots) place -= job.slots, parity ^= 1;
            done = stop, tile += passed;
            fresh = tile == tiles;
            if (fresh) tile = 0, group++;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) product_stream_8(const __grid_constant__ Job job) {
    Stream<8>(job, dynamic_shared<u8>()).run();
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) product_stream_16(const __grid_constant__ Job job) {
    Stream<16>(job, dynamic_shared<u8>()).run();
}
