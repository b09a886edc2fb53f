// The twins of wgmma.cuh, by the PTX ISA; included there, in its place. A product is done when it is asked for: the hardware
// may do it at any time until the wait.
#pragma once

inline u32 shared_padding(const void* p, u32 to) { return (u32)((to - (uintptr_t)p % to) % to); }

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <u32 N> void wgmma_wait() {}
template <u32 N> void wgmma_settle(i32 (&)[N]) {}
inline void wgmma_see_shared() {}
template <u32 N> void registers_less() {}
template <u32 N> void registers_more() {}

struct Panel128 {
    const u8* panel;
    u32 step;
    explicit Panel128(const u8* panel, u32 step = 0) : panel(panel), step(step) {
        emulator::require((uintptr_t)panel % 1024 == 0 && step < 4, "a panel that begins amid an atom");
    }
    Panel128 at(u32 bytes) const { return Panel128(panel + bytes / 1024 * 1024, step + bytes % 1024 / 32); }
    i8 value(u32 column, u32 k) const { return (i8)panel[swizzled(column, step * 2 + k / 16) + k % 16]; }
};

struct Panel64 {
    const u8* panel;
    u32 stride, step;
    Panel64(const u8* panel, u32 stride, u32 step = 0) : panel(panel), stride(stride), step(step) {
        emulator::require((uintptr_t)panel % 512 == 0 && stride % 512 == 0 && step < 2, "a panel that begins amid an atom");
    }
    Panel64 at(u32 bytes) const { return Panel64(panel + bytes / 512 * 512, stride, step + bytes % 512 / 32); }
    i8 value(u32 column, u32 k) const {
        const u32 chunk = (step * 2 + k / 16) ^ (column / 2 % 4);
        return (i8)panel[column / 8 * stride + column % 8 * 64 + chunk * 16 + k % 16];
    }
};

// A lane's sums: `row(i, k)` is value k of the warp's row g, or g + 8.
template <u32 N, class Row, class Panel> void emulator_wgmma(i32 (&c)[N], const Row& row, const Panel& b, bool add) {
    const u32 t = emulator::lane() % 4;
    for (u32 i = 0; i < N; i++) {
        const u32 column = i / 4 * 8 + t * 2 + i % 2;
        i32 sum = add ? c[i] : 0;
        for (u32 k = 0; k < 32; k++) sum += row(i % 4 / 2, k) * b.value(column, k);
        c[i] = sum;
    }
}

template <u32 N, bool SIGNED, class Panel> void wgmma(i32 (&c)[N / 2], const u32 (&a)[4], Panel b, bool add) {
    const uint64_t brought[4] = {a[0], a[1], a[2], a[3]};
    const auto all = emulator::gather(~0u, brought, 4, "wgmma");
    emulator::require(all.lanes == ~0u, "a product without all lanes of the warp");
    const u32 g = emulator::lane() / 4;
    u8 rows[2][32];
    for (u32 q = 0; q < 4; q++)
        for (u32 i = 0; i < 4; i++) {
            const u32 word = (u32)all.of[g * 4 + q][i];
            memcpy(&rows[i % 2][i / 2 * 16 + q * 4], &word, 4);
        }
    emulator_wgmma(c, [&](u32 i, u32 k) { return SIGNED ? (i32)(i8)rows[i][k] : (i32)rows[i][k]; }, b, add);
}

inline void wgmma_shared(i32 (&c)[32], Panel64 a, Panel64 b, bool add) {
    const uint64_t brought[1] = {};
    emulator::require(emulator::gather(~0u, brought, 1, "wgmma").lanes == ~0u, "a product without all lanes of the warp");
    const u32 first = threadIdx.x / 32 % 4 * 16 + emulator::lane() / 4;
    emulator_wgmma(c, [&](u32 i, u32 k) { return (i32)a.value(first + i * 8, k); }, b, add);
}
