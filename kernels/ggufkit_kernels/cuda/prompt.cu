// What a prompt's attention needs beside flash.cu: rotating and storing, and the way by two products of cuBLAS with a
// softmax in between, for heads that flash.cu does not take.
//
// `rope_append` rotates q in place and stores k (rotated) and v as halves in the cache. Then, by tiles of tokens that bound
// the scratch: `gather` lays out a tile's queries as halves, those of a key head side by side; scores = q k^T by
// `Device.gemm` in a batch over the key heads, float32; `softmax` makes of them exp(score - maximum) as halves, 0 for
// positions to come, and the sums of what it wrote; p v by gemm; `scatter` divides by the sums and goes back to
// (tokens, heads, head_dim). Weights beside the largest are at most 1, whatever the context's length, so halves keep them
// to 11 bits; divided by the sum before, they would be subnormal from 16,384 positions on.
//
// Bytes and operations. Scores and weights pass through memory: 12 bytes a (query, position) in all (float32 written and
// read, again by the second pass from the cache, halves written and read). 2,048 tokens, 32 heads: 134 M pairs, of which
// tiles of 341 tokens compute 78 M: 0.94 GB, 0.28 ms a layer on an H100, beside 0.11 ms for the products (40 GFLOP at a
// third of the rate of tensor cores); 12 ms for 32 layers. Nothing is measured on a device.
#include "common.cuh"

// The largest of a block, in every thread. All threads must come.
__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(parts[threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0]);
}

// q (n, n_heads, dim) in place (or null), k and v (n, n_kv_heads, dim) float32; keys and values (n_kv_heads, positions,
// dim) float16 of one layer; table (…, 2 pairs): cosines, then sines; pairs 0: nothing is rotated. A block takes one head
// of one token: grid (n, heads of q, then of k, then of v), where q is null without those of q.
extern "C" __global__ void __launch_bounds__(64)
rope_append(float* q, const float* k, const float* v, const float* table, const int* start, u16* keys, u16* values,
            int n_heads, int n_kv_heads, int dim, int pairs, int interleaved, int positions) {
    const int t = blockIdx.x, n_queries = q == nullptr ? 0 : n_heads;
    int head = blockIdx.y;
    const int position = *start + t;
    const float* const angles = table + (size_t)position * 2 * pairs;
    if (head >= n_queries + n_kv_heads) {
        head -= n_queries + n_kv_heads;
        const float* const x = v + ((size_t)t * n_kv_heads + head) * dim;
        u16* const to = values + ((size_t)head * positions + position) * dim;
        for (int d = threadIdx.x; d < dim; d += blockDim.x) to[d] = float_to_half(x[d]);
        return;
    }
    const bool query = head < n_queries;
    head -= query ? 0 : n_queries;
    float* const own = q + ((size_t)t * n_heads + head) * dim;
    const float* const x = query ? own : k + ((size_t)t * n_kv_heads + head) * dim;
    u16* const to = keys + ((size_t)head * positions + position) * dim;
    for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : first + pairs;
        const float cosine = angles[pair], sine = angles[pairs + pair], a = x[first], b = x[second];
        const float c = a * cosine - b * sine, d = a * sine + b * cosine;
        if (query) {
            own[first] = c, own[second] = d;
        } else {
            to[first] = float_to_half(c), to[second] = float_to_half(d);
        }
    }
    if (!query) {
        for (int d = 2 * pairs + threadIdx.x; d < dim; d += blockDim.x) to[d] = float_to_half(x[d]);
    }
}

// q (tokens, n_kv_heads * group, dim) float32 -> out (n_kv_heads, tokens * group, dim) float16, times scale. A block takes
// all queries of one key head of one token: grid (tokens, n_kv_heads).
extern "C" __global__ void __launch_bounds__(128)
gather(const float* q, u16* out, int group, int dim, float scale) {
    const int t = blockIdx.x, head = blockIdx.y, tokens = gridDim.x, heads = gridDim.y, count = group * dim;
    const float* const from = q + ((size_t)t * heads + head) * count;
    u16* const to = out + ((size_t)head * tokens + t) * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = float_to_half(from[i] * scale);
}

// scores (n_kv_heads, tokens * group, width) float32 -> weights, the same shape, float16, and sums (n_kv_heads,
// tokens * group). Token t of the tile stands at *start + first + t and sees itself and what is before. A block a query:
// grid (tokens * group, n_kv_heads).
extern "C" __global__ void __launch_bounds__(256)
softmax(const float* scores, u16* weights, float* sums, const int* start, int first, int group, int width) {
    const size_t row = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    const int seen = min(*start + first + (int)blockIdx.x / group + 1, width);
    const float* const x = scores + row * width;
    u16* const out = weights + row * width;
    float top = __uint_as_float(0xff800000u), total = 0.0f;  // -infinity
    for (int i = threadIdx.x; i < seen; i += blockDim.x) top = fmaxf(top, x[i]);
    top = block_max(top);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const u16 e = i < seen ? float_to_half(expf(x[i] - top)) : (u16)0;
        out[i] = e;
        total += half_to_float(e);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) sums[row] = total;
}

// x (n_kv_heads, tokens * group, dim) over its sums -> out (tokens, n_kv_heads * group, dim). Grid (tokens, n_kv_heads).
extern "C" __global__ void __launch_bounds__(128)
scatter(const float* x, const float* sums, float* out, int group, int dim) {
    const int t = blockIdx.x, head = blockIdx.y, tokens = gridDim.x, heads = gridDim.y, count = group * dim;
    const float* const from = x + ((size_t)head * tokens + t) * count;
    const float* const over = sums + ((size_t)head * tokens + t) * group;
    float* const to = out + ((size_t)t * heads + head) * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i] / over[i / dim];
}

// What rounding to halves left of x: x float32 (n, cols), high float16 (n, cols) as `halves` (elementwise.cu) makes it with
// factors (n,) -> low float16 (n, cols), high + low = x / factor to 22 bits. Grid (any, n).
extern "C" __global__ void __launch_bounds__(256)
low_halves(const float* x, const u16* high, const float* factors, u16* low, int cols) {
    const size_t at = (size_t)blockIdx.y * cols;
    const float down = 1.0f / factors[blockIdx.y];  // a power of two
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < cols; i += gridDim.x * blockDim.x) {
        low[at + i] = float_to_half(x[at + i] * down - half_to_float(high[at + i]));
    }
}
