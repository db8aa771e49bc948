// What a matvec makes of its inputs: int8 with a float32 scale for each 32 of them (a chunk). With norms and
// activations in front, so that their results never go through memory.
//
//   q   int8 (n, padded)            padded is `cols` rounded up to 32; what is beyond `cols` is 0
//   a   two words a chunk (n, padded / 32, 2): the scale, largest magnitude / 127, as float32, and the sums of its
//       int8 inputs: of the first 16 in the low half, of all 32 in the high half. An offset or a minimum needs them;
//       read they cost one instruction a unit, made in the matvec eight `dp4a`, a fifth of all there are.
//
// Rounded to nearest even, as on the CPU (cpu/inputs.py). Where an input of a chunk is not finite, its scale is NaN.
// `y`, where it is not null, gets the float32 numbers (n, cols) too, for matrices that are not quantized.
//
// A thread takes four inputs, eight threads a chunk: three shuffles for the largest magnitude, three for the sums. All
// of this is small: 4,096 inputs are 16 KB; the time is that of a launch, of reading (about 600 cycles) and of the
// shuffles and barriers (about 300). `norm_quantize` takes one block a token, since the sum of squares needs all of
// it: 4,096 inputs are one load of 16 bytes for each of 1,024 threads. The others take several blocks a token.
// Nothing here has been timed on a device.
#include "common.cuh"

// Four numbers from x on, of `count` that there are; zeros behind them. `whole`: 16-byte loads are possible.
__device__ __forceinline__ float4 load_four(const float* x, int count, bool whole) {
    if (whole && count >= 4) return *(const float4*)x;
    return make_float4(count > 0 ? x[0] : 0.0f, count > 1 ? x[1] : 0.0f, count > 2 ? x[2] : 0.0f,
                       count > 3 ? x[3] : 0.0f);
}
__device__ __forceinline__ void store_four(float* y, float4 v, int count, bool whole) {
    if (whole && count >= 4) {
        *(float4*)y = v;
        return;
    }
    if (count > 0) y[0] = v.x;
    if (count > 1) y[1] = v.y;
    if (count > 2) y[2] = v.z;
    if (count > 3) y[3] = v.w;
}

__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ int rounded(float x) { return __float2int_rn(x) & 0xff; }

// Quantizes inputs 4i … 4i + 3 of a token; all 32 lanes come, eight with consecutive i for each chunk. Those that are
// beyond `padded` write nothing.
__device__ __forceinline__ void quantize_four(float4 v, int i, int padded, i8* q, uint2* a) {
    u32 largest = max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w)));
    for (int k = 1; k < 8; k <<= 1) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, k));
    const bool finite = largest < 0x7f800000u;  // as integers, infinity and NaN are the largest magnitudes
    const float most = __uint_as_float(largest);
    const float inverse = finite && most > 1e-30f ? __fdiv_rn(127.0f, most) : 0.0f;
    const float scale = finite ? __fdiv_rn(most, 127.0f) : __uint_as_float(0x7fc00000u);
    u32 four = 0;
    if (finite)
        four = rounded(__fmul_rn(v.x, inverse)) | rounded(__fmul_rn(v.y, inverse)) << 8 |
               rounded(__fmul_rn(v.z, inverse)) << 16 | (u32)rounded(__fmul_rn(v.w, inverse)) << 24;
    int half = __dp4a((int)four, 0x01010101, 0);
    half += __shfl_xor_sync(FULL_WARP, half, 1);
    half += __shfl_xor_sync(FULL_WARP, half, 2);
    const int all = half + __shfl_xor_sync(FULL_WARP, half, 4);
    if (4 * i >= padded) return;
    *(u32*)(q + 4 * i) = four;
    if (i % 8 == 0) a[i / 8] = make_uint2(__float_as_uint(scale), (u32)all << 16 | ((u32)half & 0xffffu));
}

// x float32 (n, cols). Grid: (blocks that share a token, n).
extern "C" __global__ void quantize(const float* x, i8* q, uint2* a, int cols, int padded) {
    let_next_begin();
    wait_for_earlier();
    const size_t t = blockIdx.y;
    x += t * cols, q += t * padded, a += t * (padded / 32);
    const bool whole = cols % 4 == 0;
    const int threads = gridDim.x * blockDim.x;
    for (int first = blockIdx.x * blockDim.x; 4 * first < padded; first += threads) {
        const int i = first + threadIdx.x;
        quantize_four(load_four(x + 4 * i, cols - 4 * i, whole), i, padded, q, a);
    }
}

// x / sqrt(mean(x²) + eps) * weight, weight float32 (cols). Grid: n.
extern "C" __global__ void __launch_bounds__(1024) norm_quantize(const float* x, const float* weight, float* y, i8* q,
                                                                 uint2* a, int cols, int padded, float eps) {
    const size_t t = blockIdx.x;
    x += t * cols, q += t * padded, a += t * (padded / 32);
    const bool whole = cols % 4 == 0;
    float4 kept = make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // the first load, which often is all
    let_next_begin();
    const float4 kept_weight = load_four(weight + 4 * threadIdx.x, cols - 4 * (int)threadIdx.x, whole);
    wait_for_earlier();
    float squares = 0.0f;
    for (int i = threadIdx.x; 4 * i < cols; i += blockDim.x) {
        const float4 v = load_four(x + 4 * i, cols - 4 * i, whole);
        if (i == threadIdx.x) kept = v;
        squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares) / (float)cols + eps);
    for (int first = 0; 4 * first < padded; first += blockDim.x) {
        const int i = first + threadIdx.x;
        float4 v = first ? load_four(x + 4 * i, cols - 4 * i, whole) : kept;
        const float4 w = first ? load_four(weight + 4 * i, cols - 4 * i, whole) : kept_weight;
        v = make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w);
        if (y) store_four(y + t * cols + 4 * i, v, cols - 4 * i, whole);
        quantize_four(v, i, padded, q, a);
    }
}

__device__ __forceinline__ float gated(float gate, float up, int squared) {
    if (!squared) return gate / (1.0f + expf(-gate)) * up;
    const float positive = gate > 0.0f ? gate : 0.0f;
    return (gate != gate ? gate : positive * positive) * up;
}

// silu(gate) * up, or max(gate, 0)² * up where `squared`. gate and up float32 (n, cols). Grid: (blocks a token, n).
extern "C" __global__ void gate_quantize(const float* gate, const float* up, float* y, i8* q, uint2* a, int cols,
                                         int padded, int squared) {
    let_next_begin();
    wait_for_earlier();
    const size_t t = blockIdx.y;
    gate += t * cols, up += t * cols, q += t * padded, a += t * (padded / 32);
    const bool whole = cols % 4 == 0;
    const int threads = gridDim.x * blockDim.x;
    for (int first = blockIdx.x * blockDim.x; 4 * first < padded; first += threads) {
        const int i = first + threadIdx.x;
        const float4 g = load_four(gate + 4 * i, cols - 4 * i, whole), u = load_four(up + 4 * i, cols - 4 * i, whole);
        const float4 v = make_float4(gated(g.x, u.x, squared), gated(g.y, u.y, squared), gated(g.z, u.z, squared),
                                     gated(g.w, u.w, squared));
        if (y) store_four(y + t * cols + 4 * i, v, cols - 4 * i, whole);
        quantize_four(v, i, padded, q, a);
    }
}
