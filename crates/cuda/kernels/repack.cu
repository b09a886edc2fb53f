// The file's rows of blocks into tiles (layout.rs, types.cuh), exactly: bytes move, none changes.
// Grid: a thread a block of a row. Bytes: the matrix read once and written once.
#include "types.cuh"

struct Pieces {
    u32 count;
    u16 list[15][2];  // offset in the block, size
};

extern "C" __global__ void repack(const u8* file, u8* tiles, u32 rows, u32 padded, u32 blocks, u32 block_bytes, Pieces pieces) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)padded * blocks) return;
    u32 row = i / blocks, block = i % blocks;
    const u8* from = file + i * block_bytes;
    u8* to = tiles + (((u64)(row / 32) * blocks + block) * 2 + row % 32 / BAND) * BAND * block_bytes;
    for (u32 p = 0; p < pieces.count; p++) {
        u32 offset = pieces.list[p][0], size = pieces.list[p][1];
        // Fields of a block are aligned to two bytes, in the file too.
        for (u32 b = 0; b < size; b += 2)
            *(u16*)(to + row % BAND * size + b) = row < rows ? *(const u16*)(from + offset + b) : (u16)0;
        to += BAND * size;
    }
}
