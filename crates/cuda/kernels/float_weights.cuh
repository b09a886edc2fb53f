// Weights kept as floats: F32, F16 and BF16, row by row as in the file.
#pragma once
#include "prelude.cuh"

// Value k of a row.
template <u32 T> __device__ __forceinline__ f32 weight_at(const u8* row, u32 k) {
    if constexpr (T == T_F32) return ((const f32*)row)[k];
    const u16 bits = ((const u16*)row)[k];
    return T == T_F16 ? f16_to_f32(bits) : __uint_as_float((u32)bits << 16);
}

// Bytes of a value.
template <u32 T> constexpr u32 FLOAT_BYTES = T == T_F32 ? 4 : 2;
