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
    Panel128(const u8* panel, u32 step) : panel(panel), step(step) {
        emulator::require((uintptr_t)panel % 1024 == 0, "a panel that begins amid an atom");
    }
};

template <u32 N, bool SIGNED> void wgmma(i32 (&c)[N / 2], const u32 (&a)[4], Panel128 b, bool add) {
    const uint64_t brought[4] = {a[0], a[1], a[2], a[3]};
    const auto all = emulator::gather(~0u, brought, 4, "wgmma");
    emulator::require(all.lanes == ~0u, "a product without all lanes of the warp");
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    u8 rows[2][32];
    for (u32 q = 0; q < 4; q++)
        for (u32 i = 0; i < 4; i++) {
            const u32 word = (u32)all.of[g * 4 + q][i];
            memcpy(&rows[i % 2][i / 2 * 16 + q * 4], &word, 4);
        }
    for (u32 i = 0; i < N / 2; i++) {
        const u32 column = i / 4 * 8 + t * 2 + i % 2;
        i32 sum = add ? c[i] : 0;
        for (u32 k = 0; k < 32; k++) {
            const i8 value = (i8)b.panel[swizzled(column, b.step * 2 + k / 16) + k % 16];
            const u8 weight = rows[i % 4 / 2][k];
            sum += (SIGNED ? (i32)(i8)weight : (i32)weight) * value;
        }
        c[i] = sum;
    }
}
