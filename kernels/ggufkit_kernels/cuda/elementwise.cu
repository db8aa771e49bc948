// What stands between the matrices of a batch of tokens: norms, rotations, activations, sums, and the way to float16
// and back. (For a single token most of it is fused into the kernels of matrices and attention.)
//
// All of it is bound by memory: a few operations a number. A norm reads a row twice, the second time from cache; the
// others read and write each number once, four at a time where addresses allow. On an H100 (3.35 TB/s) 512 tokens of
// an 8B model take at least 26 us for swiglu (3 x 512 x 14336 floats), 5 us for a norm (2 x 512 x 4096).
//
// A row is one block's, or one warp's where it is short (heads are normed in some networks: 128 numbers a row).
#include "common.cuh"

// -- norms -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float square_sum(const float* x, int dim, int first, int step) {
    float sum = 0.0f;
    for (int k = first; k < dim; k += step) sum += x[k] * x[k];
    return sum;
}
__device__ __forceinline__ void scale_row(const float* x, const float* weight, float* out, int dim, float sum, float eps,
                                          int first, int step) {
    const float factor = 1.0f / sqrtf(sum / (float)dim + eps);
    for (int k = first; k < dim; k += step) out[k] = x[k] * factor * weight[k];
}

// x (rows, dim) / sqrt(mean of squares + eps) * weight (dim,): a block a row, grid (rows). out may be x.
extern "C" __global__ void __launch_bounds__(1024) rmsnorm(const float* x, const float* weight, float* out, int dim,
                                                           float eps) {
    let_next_begin();
    wait_for_earlier();
    const size_t at = (size_t)blockIdx.x * dim;
    const float sum = block_sum(square_sum(x + at, dim, threadIdx.x, blockDim.x));
    scale_row(x + at, weight, out + at, dim, sum, eps, threadIdx.x, blockDim.x);
}

// The same, a warp a row: for rows too short for a block.
extern "C" __global__ void __launch_bounds__(1024) rmsnorm_short(const float* x, const float* weight, float* out, int rows,
                                                                 int dim, float eps) {
    let_next_begin();
    wait_for_earlier();
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;  // a whole warp
    const size_t at = (size_t)row * dim;
    const float sum = warp_sum(square_sum(x + at, dim, lane, 32));
    scale_row(x + at, weight, out + at, dim, sum, eps, lane, 32);
}

// -- rotations ---------------------------------------------------------------------------------------------

// Rotates pairs of x (n, heads, head_dim) in place: a block a token, grid (n), at positions *start, *start + 1, ...
// table (positions, 2 * pairs): cosines, then sines. Pairs are (2i, 2i + 1), or (i, i + pairs); what lies beyond
// 2 * pairs stays.
extern "C" __global__ void __launch_bounds__(1024) rope(float* x, const float* table, const int* start, int heads,
                                                        int head_dim, int pairs, int interleaved) {
    let_next_begin();
    wait_for_earlier();
    const float* angles = table + (size_t)(*start + blockIdx.x) * (2 * pairs);
    x += (size_t)blockIdx.x * heads * head_dim;
    const int step = interleaved ? 1 : pairs, stride = interleaved ? 2 : 1;
    for (int k = threadIdx.x; k < heads * pairs; k += blockDim.x) {
        const int pair = k % pairs;
        float* at = x + k / pairs * head_dim + pair * stride;
        const float a = at[0], b = at[step], cosine = angles[pair], sine = angles[pairs + pair];
        at[0] = a * cosine - b * sine;
        at[step] = a * sine + b * cosine;
    }
}

// -- number by number --------------------------------------------------------------------------------------

struct Swiglu {
    __device__ static float of(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }
};
struct Relu2 {
    __device__ static float of(float gate, float up) {
        const float x = gate < 0.0f ? 0.0f : gate;  // NaN stays
        return x * x * up;
    }
};
struct Add {
    __device__ static float of(float a, float b) { return a + b; }
};

template <class F>
__device__ __forceinline__ void map(const float* a, const float* b, float* out, int n) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    int done = 0;
    if ((((size_t)a | (size_t)b | (size_t)out) & 15) == 0) {
        for (int k = first; k < n / 4; k += step) {
            const float4 p = ((const float4*)a)[k], q = ((const float4*)b)[k];
            ((float4*)out)[k] = make_float4(F::of(p.x, q.x), F::of(p.y, q.y), F::of(p.z, q.z), F::of(p.w, q.w));
        }
        done = n / 4 * 4;
    }
    for (int k = done + first; k < n; k += step) out[k] = F::of(a[k], b[k]);
}

// silu(gate) * up over n numbers; out may be one of them. Any grid.
extern "C" __global__ void __launch_bounds__(1024) swiglu(const float* gate, const float* up, float* out, int n) {
    let_next_begin();
    wait_for_earlier();
    map<Swiglu>(gate, up, out, n);
}

// max(gate, 0) squared, times up.
extern "C" __global__ void __launch_bounds__(1024) relu2(const float* gate, const float* up, float* out, int n) {
    let_next_begin();
    wait_for_earlier();
    map<Relu2>(gate, up, out, n);
}

extern "C" __global__ void __launch_bounds__(1024) add(const float* a, const float* b, float* out, int n) {
    let_next_begin();
    wait_for_earlier();
    map<Add>(a, b, out, n);
}

// -- to float16 and back -----------------------------------------------------------------------------------

// x (n, cols) as float16 (n, wide), the columns beyond cols zero: a block a token, grid (n). Rows whose largest
// magnitude is 2^14 or more are divided by a power of two first, to between 2^13 and 2^14; factors (n,) has it, 1
// elsewhere. A row with an infinite number is not divided: nothing would save its products.
extern "C" __global__ void __launch_bounds__(1024) halves(const float* x, u16* out, float* factors, int cols, int wide) {
    __shared__ float parts[32];
    x += (size_t)blockIdx.x * cols;
    out += (size_t)blockIdx.x * wide;
    float largest = 0.0f;
    for (int k = threadIdx.x; k < cols; k += blockDim.x) largest = fmaxf(largest, fabsf(x[k]));
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = warp_max(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f);
    const int exponent = (int)(__float_as_uint(largest) >> 23);  // biased by 127; 255: infinite
    const int shift = exponent >= 141 && exponent < 255 ? exponent - 140 : 0;
    const float down = __uint_as_float((u32)(127 - shift) << 23);
    if (threadIdx.x == 0) factors[blockIdx.x] = __uint_as_float((u32)(127 + shift) << 23);
    for (int k = threadIdx.x; k < wide; k += blockDim.x) out[k] = k < cols ? float_to_half(x[k] * down) : (u16)0;
}

// x (n, rows) times its token's factor, plus bias (rows,) where there is one: grid (any, n). Leaves at once where there
// is nothing to do.
extern "C" __global__ void __launch_bounds__(1024) undo_halves(float* x, const float* factors, const float* bias, int rows) {
    const float factor = factors[blockIdx.y];
    if (factor == 1.0f && bias == nullptr) return;
    x += (size_t)blockIdx.y * rows;
    for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < rows; k += gridDim.x * blockDim.x)
        x[k] = x[k] * factor + (bias == nullptr ? 0.0f : bias[k]);
}

// x (n, rows) plus bias (rows,), plus residual (n, rows), each where there is one: grid (any, n).
extern "C" __global__ void __launch_bounds__(1024) add_rows(float* x, const float* bias, const float* residual, int rows) {
    const size_t at = (size_t)blockIdx.y * rows;
    for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < rows; k += gridDim.x * blockDim.x) {
        float value = x[at + k];
        if (bias != nullptr) value += bias[k];
        if (residual != nullptr) value += residual[at + k];
        x[at + k] = value;
    }
}
