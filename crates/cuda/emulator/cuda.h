// CUDA C++ as a CPU's compiler reads it: keywords, built-in variables, vector types and intrinsic functions, each as the
// CUDA C++ Programming Guide and the CUDA Math API have it. Before a kernel's source; after it comes nothing but its entry.
#pragma once
#include <math.h>
#include "runtime.h"

// __CUDA_ARCH__ is given: the emulator runs the code that a GPU of that kind would.
#define TALLY_EMULATOR 1
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local

#define threadIdx (emulator::current()->thread)
#define blockIdx (emulator::current()->block->index)
#define blockDim (emulator::Dim{emulator::current()->block->launch.block, 1, 1})
#define gridDim \
    (emulator::Dim{emulator::current()->block->launch.grid[0], emulator::current()->block->launch.grid[1], \
                   emulator::current()->block->launch.grid[2]})

// ---- Vectors -----------------------------------------------------------------------------------------------------------
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Bits --------------------------------------------------------------------------------------------------------------
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline float __int_as_float(int v) { return __uint_as_float((unsigned)v); }
inline unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz((unsigned)v); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll((unsigned long long)v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    const uint64_t bytes = a | (uint64_t)b << 32;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= ((unsigned)(bytes >> ((s >> (4 * i)) % 8 * 8)) & 0xff) << (8 * i);
    return out;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (uint8_t)(a >> (8 * i)) * (uint8_t)(b >> (8 * i));
    return c;
}

// ---- Floats ------------------------------------------------------------------------------------------------------------
// A NaN that an operation makes is this one, whatever it came from.
inline float emulator_one_nan(float f) { return f != f ? __uint_as_float(0x7fffffffu) : f; }
inline float __fadd_rn(float a, float b) { return emulator_one_nan(a + b); }
inline float __fsub_rn(float a, float b) { return emulator_one_nan(a - b); }
inline float __fmul_rn(float a, float b) { return emulator_one_nan(a * b); }
inline float __fdiv_rn(float a, float b) { return emulator_one_nan(a / b); }
inline float __fsqrt_rn(float a) { return emulator_one_nan(sqrtf(a)); }
inline float __fmaf_rn(float a, float b, float c) { return emulator_one_nan(fmaf(a, b, c)); }
inline float __int2float_rn(int v) { return (float)v; }
inline float __uint2float_rn(unsigned v) { return (float)v; }

// Rounded to `T`; what is out of range goes to its nearest end, NaN to `nan`.
template <class T> T emulator_to_integer(float rounded, T nan) {
    constexpr bool SIGNED = (T)-1 < 0;
    // One more than the largest integer, which is a float.
    constexpr double end = 2.0 * (1ull << (sizeof(T) * 8 - 1 - SIGNED));
    if (rounded != rounded) return nan;
    if (rounded >= end) return (T)(SIGNED ? ~0ull >> (65 - sizeof(T) * 8) : ~0ull);
    if (rounded < (SIGNED ? -end : 0.0)) return SIGNED ? (T)(1ull << (sizeof(T) * 8 - 1)) : 0;
    return (T)rounded;
}
inline int __float2int_rn(float v) { return emulator_to_integer<int>(nearbyintf(v), 0); }
inline int __float2int_rz(float v) { return emulator_to_integer<int>(truncf(v), 0); }
inline unsigned __float2uint_rn(float v) { return emulator_to_integer<unsigned>(nearbyintf(v), 0); }
inline unsigned __float2uint_rz(float v) { return emulator_to_integer<unsigned>(truncf(v), 0); }
inline unsigned long long __float2ull_rn(float v) {
    return emulator_to_integer<unsigned long long>(nearbyintf(v), 0x8000000000000000ull);
}

// CUDA's overloads take mixed types, and for floats pass over a NaN.
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 4 ? fminf((T)a, (T)b) : fmin((T)a, (T)b);
    else return (T)b < (T)a ? (T)b : (T)a;
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 4 ? fmaxf((T)a, (T)b) : fmax((T)a, (T)b);
    else return (T)a < (T)b ? (T)b : (T)a;
}

// ---- Memory ------------------------------------------------------------------------------------------------------------
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldg(const T* p) { return *p; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __threadfence(); }
inline void __threadfence_block() { __threadfence(); }

// Atomics; relaxed, as CUDA's are.
template <class T, class F> T emulator_atomic(T* p, F&& next) {
    emulator::move();
    T before = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &before, next(before), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return before;
}
template <class T> T atomicAdd(T* p, std::common_type_t<T> v) { return emulator_atomic(p, [=](T x) { return (T)(x + v); }); }
template <class T> T atomicSub(T* p, std::common_type_t<T> v) { return emulator_atomic(p, [=](T x) { return (T)(x - v); }); }
template <class T> T atomicMin(T* p, std::common_type_t<T> v) { return emulator_atomic(p, [=](T x) { return min(x, v); }); }
template <class T> T atomicMax(T* p, std::common_type_t<T> v) { return emulator_atomic(p, [=](T x) { return max(x, v); }); }
template <class T> T atomicOr(T* p, std::common_type_t<T> v) { return emulator_atomic(p, [=](T x) { return (T)(x | v); }); }
template <class T> T atomicExch(T* p, std::common_type_t<T> v) { return emulator_atomic(p, [=](T) { return v; }); }
inline unsigned atomicInc(unsigned* p, unsigned last) { return emulator_atomic(p, [=](unsigned x) { return x >= last ? 0 : x + 1; }); }

// ---- Barriers and collectives ------------------------------------------------------------------------------------------
inline void __syncthreads() { emulator::barrier(0, 0, "__syncthreads"); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

template <class T> emulator::Gathered emulator_gather(unsigned mask, T v, const char* at) {
    static_assert(sizeof v <= 8, "shuffles move at most 64 bits");
    uint64_t word = 0;
    memcpy(&word, &v, sizeof v);
    return emulator::gather(mask, &word, 1, at);
}
template <class T> T emulator_from(const emulator::Gathered& g, unsigned lane) {
    emulator::require(g.lanes >> lane & 1, "a shuffle from a lane that has ended");
    T v;
    memcpy(&v, g.of[lane], sizeof v);
    return v;
}
inline void __syncwarp(unsigned mask = ~0u) { emulator_gather(mask, 0, "__syncwarp"); }
template <class T> T __shfl_sync(unsigned mask, T v, int from) {
    return emulator_from<T>(emulator_gather(mask, v, "__shfl_sync"), from & 31);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int with) {
    return emulator_from<T>(emulator_gather(mask, v, "__shfl_xor_sync"), (emulator::lane() ^ with) & 31);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by) {
    const unsigned lane = emulator::lane();
    return emulator_from<T>(emulator_gather(mask, v, "__shfl_up_sync"), lane >= by ? lane - by : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by) {
    const unsigned lane = emulator::lane();
    return emulator_from<T>(emulator_gather(mask, v, "__shfl_down_sync"), lane + by < 32 ? lane + by : lane);
}
inline unsigned emulator_ballot(unsigned mask, int p, const char* at) {
    const emulator::Gathered g = emulator_gather(mask, (uint64_t)(p != 0), at);
    unsigned out = 0;
    for (unsigned i = 0; i < 32; i++) out |= (g.lanes >> i & 1 && g.of[i][0]) ? 1u << i : 0;
    return out;
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emulator_ballot(mask, p, "__ballot_sync"); }
inline bool __any_sync(unsigned mask, int p) { return emulator_ballot(mask, p, "__any_sync") != 0; }
inline bool __all_sync(unsigned mask, int p) { return emulator_ballot(mask, !p, "__all_sync") == 0; }

template <class T, class F> T emulator_reduce(unsigned mask, T v, const char* at, F&& join) {
    const emulator::Gathered g = emulator_gather(mask, v, at);
    for (unsigned i = 0; i < 32; i++)
        if (g.lanes >> i & 1) v = join(v, emulator_from<T>(g, i));
    return v;
}
template <class T> T __reduce_max_sync(unsigned mask, T v) {
    return emulator_reduce(mask, v, "__reduce_max_sync", [](T a, T b) { return max(a, b); });
}
template <class T> T __reduce_min_sync(unsigned mask, T v) {
    return emulator_reduce(mask, v, "__reduce_min_sync", [](T a, T b) { return min(a, b); });
}
template <class T> T __reduce_or_sync(unsigned mask, T v) {
    return emulator_reduce(mask, v, "__reduce_or_sync", [](T a, T b) { return a | b; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
    const emulator::Gathered g = emulator_gather(mask, v, "__reduce_add_sync");
    unsigned sum = 0;
    for (unsigned i = 0; i < 32; i++) sum += g.lanes >> i & 1 ? (unsigned)g.of[i][0] : 0;
    return sum;
}
inline int __reduce_add_sync(unsigned mask, int v) { return (int)__reduce_add_sync(mask, (unsigned)v); }
