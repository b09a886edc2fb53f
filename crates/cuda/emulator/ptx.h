// The twins of ptx.cuh: what each of its instructions does, by the PTX ISA. Included there, in its place.
#pragma once

inline u32 dynamic_shared_bytes() { return emulator::current()->block->launch.shared; }
template <class T> T* dynamic_shared() { return (T*)emulator::current()->block->shared; }

inline void launch_dependents() {}
inline void wait_dependencies() { emulator::current()->waited = true; }

// ---- Loads -------------------------------------------------------------------------------------------------------------
template <class T> T emulator_load(const void* p) {
    emulator::require((uintptr_t)p % alignof(T) == 0, "a misaligned load");
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline uint4 load_weights(const void* p) { return emulator_load<uint4>(p); }
inline uint4 load_once(const void* p) { return emulator_load<uint4>(p); }
inline float4 load_fresh4(const f32* p) { return emulator_load<float4>(p); }
inline uint4 load_fresh16(const void* p) { return emulator_load<uint4>(p); }
inline f32 load_fresh(const f32* p) { return *p; }
inline u32 load_fresh(const u32* p) { return *p; }
// Asked again and again until somebody has written: others must get on in between.
inline u32 load_acquire(const u32* p) {
    emulator::poll("a word that another block writes");
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void count_release(u32* p) {
    __atomic_fetch_add(p, 1, __ATOMIC_SEQ_CST);
    emulator::move();
}
inline u32 atomic_inc_acq_rel(u32* p, u32 last) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    const u32 before = atomicInc(p, last);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return before;
}

// ---- Arithmetic --------------------------------------------------------------------------------------------------------
inline f32 f16_to_f32(u16 bits) {
    const u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return fraction ? __uint_as_float(0x7fffffffu) : __uint_as_float(sign | 0x7f800000u);
    const f32 size = exponent ? __uint_as_float((exponent + 112) << 23 | fraction << 13) : (f32)fraction * 5.9604644775390625e-8f;
    return __uint_as_float(sign | __float_as_uint(size));
}
inline f32 max_nan(f32 x, f32 y) { return x != x || y != y ? __uint_as_float(0x7fffffffu) : fmaxf(x, y); }

inline f32 inverse_nearly(f32 v) { return 1.0f / v; }
inline void pause(u32) {}
inline u32 opaque(u32 v) { return v; }
inline u32 permute(u32 a, u32 b, u32 select) {
    u32 out = __byte_perm(a, b, select);
    for (int i = 0; i < 4; i++)
        if (select >> (4 * i) & 8) out = (out & ~(0xffu << (8 * i))) | ((out >> (8 * i) & 0x80 ? 0xffu : 0u) << (8 * i));
    return out;
}

// ---- Barriers ----------------------------------------------------------------------------------------------------------
inline void barrier_sync(u32 id, u32 threads) { emulator::barrier(id, threads, "bar.sync"); }

// An mbarrier: a phase ends when all have arrived and all announced bytes have come.
struct Mbarrier {
    u64 wanted : 12, pending : 12, phase : 1;
    i64 bytes : 39;
};
static_assert(sizeof(Mbarrier) == 8, "as on the device");
inline void emulator_end_phase(Mbarrier& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    b.pending = b.wanted;
    b.phase ^= 1;
    emulator::move();
}
inline void mbarrier_init(u64* barrier, u32 arrivals) { *(Mbarrier*)barrier = {arrivals, arrivals, 0, 0}; }
inline void mbarrier_arrive(u64* barrier) {
    Mbarrier& b = *(Mbarrier*)barrier;
    emulator::require(b.pending > 0, "more arrivals at an mbarrier than it expects");
    b.pending--;
    emulator_end_phase(b);
}
inline void mbarrier_expect(u64* barrier, u32 bytes) {
    ((Mbarrier*)barrier)->bytes += bytes;
    mbarrier_arrive(barrier);
}
inline void emulator_make(const emulator::BulkCopy& copy) {
    memcpy(copy.to, copy.from, copy.bytes);
    Mbarrier& b = *(Mbarrier*)copy.barrier;
    b.bytes -= copy.bytes;
    emulator_end_phase(b);
}
inline bool mbarrier_test(u64* barrier, u32 parity) {
    // Late copies come when somebody asks for them.
    auto& bulk = emulator::current()->block->bulk;
    size_t kept = 0;
    for (size_t i = 0; i < bulk.count; i++) {
        if (bulk.values[i].barrier == barrier) emulator_make(bulk.values[i]);
        else bulk.values[kept++] = bulk.values[i];
    }
    bulk.count = kept;
    if (((Mbarrier*)barrier)->phase != parity) return true;
    emulator::poll("an mbarrier");
    return false;
}
inline void mbarrier_fence() {}

// ---- Copies ------------------------------------------------------------------------------------------------------------
inline void emulator_copy(void* to, const void* from, u32 bytes) {
    using namespace emulator;
    require((uintptr_t)to % bytes == 0 && (uintptr_t)from % bytes == 0, "a misaligned cp.async");
    Fibre& self = *current();
    if (self.block->late()) self.copies->push({to, from, bytes, self.committed});
    else memcpy(to, from, bytes);
}
inline void async_copy16(void* shared, const void* global) { emulator_copy(shared, global, 16); }
inline void async_copy4(void* shared, const void* global) { emulator_copy(shared, global, 4); }
inline void async_commit() { emulator::current()->committed++; }
inline void emulator_wait(u32 newest) {
    emulator::Fibre& self = *emulator::current();
    auto& copies = *self.copies;
    size_t kept = 0;
    for (size_t i = 0; i < copies.count; i++) {
        const emulator::Copy copy = copies.values[i];
        if (copy.group + newest < self.committed) memcpy(copy.to, copy.from, copy.bytes);
        else copies.values[kept++] = copy;
    }
    copies.count = kept;
}
template <int N> void async_wait() { emulator_wait(N); }
inline void async_arrive(u64* barrier) {
    async_commit();
    emulator_wait(0);
    mbarrier_arrive(barrier);
}
// Reads nothing, but what it would read has to be there.
inline void prefetch_bulk(const void* global, u32 bytes) {
    emulator::require((uintptr_t)global % 16 == 0 && bytes % 16 == 0, "a misaligned prefetch");
    for (u32 i = 0; i < bytes; i += 16) (void)*((const volatile unsigned char*)global + i);
}
inline void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
    using namespace emulator;
    require((uintptr_t)shared % 16 == 0 && (uintptr_t)global % 16 == 0 && bytes % 16 == 0, "a misaligned bulk copy");
    const BulkCopy copy = {shared, global, bytes, barrier};
    if (current()->block->late()) current()->block->bulk.push(copy);
    else emulator_make(copy);
}
inline void bulk_copy_once(void* shared, const void* global, u32 bytes, u64* barrier) { bulk_copy(shared, global, bytes, barrier); }

// ---- Tensor cores ------------------------------------------------------------------------------------------------------
// A lane's four results of D = A B + C: rows g and g + 8, columns 2t and 2t + 1; `K` values, 16 to a word of each lane.
template <int K, class A, class B, size_t N> void emulator_mma(i32 (&c)[4], const uint64_t (&brought)[N], const char* at) {
    constexpr int HALVES = K / 16;
    const auto all = emulator::gather(~0u, brought, N, at);
    emulator::require(all.lanes == ~0u, "a product without all lanes of the warp");
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    A a[2][K];
    B b[2][K];
    for (int h = 0; h < HALVES; h++)
        for (u32 q = 0; q < 4; q++)
            for (int i = 0; i < 2; i++) {
                const u32 wa = (u32)all.of[g * 4 + q][h * 2 + i], wb = (u32)all.of[(t * 2 + i) * 4 + q][HALVES * 2 + h];
                memcpy(&a[i][h * 16 + q * 4], &wa, 4);
                memcpy(&b[i][h * 16 + q * 4], &wb, 4);
            }
    for (int i = 0; i < 4; i++) {
        i32 sum = 0;
        for (int k = 0; k < K; k++) sum += (i32)a[i / 2][k] * (i32)b[i % 2][k];
        c[i] += sum;
    }
}
template <bool SIGNED> void mma_k32(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator_mma<32, std::conditional_t<SIGNED, i8, u8>, i8, 6>(c, {a[0], a[1], a[2], a[3], b0, b1}, "mma.m16n8k32");
}
template <bool SIGNED> void mma_k16(i32 (&c)[4], u32 a0, u32 a1, u32 b) {
    emulator_mma<16, u8, std::conditional_t<SIGNED, i8, u8>, 3>(c, {a0, a1, b}, "mma.m16n8k16");
}

// A lane reads the row that it names; matrix m's row g is lane 8 m + g's.
template <u32 N> void load_matrices(u32 (&r)[N], const void* row) {
    uint64_t words[2] = {};
    if (emulator::lane() < N * 8) {
        emulator::require((uintptr_t)row % 16 == 0, "a misaligned ldmatrix");
        memcpy(words, row, 16);
    }
    const auto all = emulator::gather(~0u, words, 2, "ldmatrix");
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (u32 m = 0; m < N; m++) r[m] = (u32)(all.of[m * 8 + g][t / 2] >> (t % 2 * 32));
}
