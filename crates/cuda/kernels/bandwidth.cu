// How fast this GPU reads memory: what bounds decode. Grid-stride loads of 16 bytes, eight in flight a thread, so that a
// processor always waits for memory and never for an instruction.
// Bytes: `count` times 16, read once. Stands alone: no model's constants.

extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, unsigned long long count, unsigned* out) {
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    unsigned sum = 0;
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 7 * stride < count; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int u = 0; u < 8; u++) v[u] = __ldcs(data + i + u * stride);
#pragma unroll
        for (int u = 0; u < 8; u++) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < count; i += stride) {
        const uint4 v = __ldcs(data + i);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    // The memory is zeros, which the compiler cannot know: nothing is ever written.
    if (sum != 0) *out = sum;
}
