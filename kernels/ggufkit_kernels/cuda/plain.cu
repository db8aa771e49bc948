// Weights of float32, float16 or bfloat16 times float32 inputs, for up to TOKENS tokens at once: a matvec without any
// rounding but that of float32 sums.
//
//   weights   strips of columns (strips, cols, LANES), cols rounded up to 4
//   x         float32 (n, cols), as it is
//
// A thread takes four columns of ROWS rows: 16-byte loads COLUMN_NBYTES apart, a warp 2 KB side by side, and 16 bytes
// of inputs for each token. Sums are float32, joined as in matvec.cu (sums.cuh). One token has two steps under way, 128
// bytes a thread: 16 warps and two blocks a multiprocessor are 128 KB (matvec.cu says what is needed). A step of F16 is
// 126 instructions (SASS of sm_90), 64 of them fma and conversions, for 2,048 bytes: 32 cycles of a multiprocessor of
// an H100, 137 of its share of memory.
// 64 registers, for 8 tokens 128, with 40 bytes spilled (76 with all inputs of 8 tokens held at once: hence TAKEN). Not
// timed on a device.
#include "plain.cuh"
#include "sums.cuh"

#define TAKEN (TOKENS * ROWS > 32 ? 2 : 4)  // inputs of a token that are held at a time

struct Columns {
    u32 w[4][4];  // column, word
};

__device__ __forceinline__ void load_columns(Columns& to, const u8* strip, int quad, int part) {
#pragma unroll
    for (int k = 0; k < 4; k++) load_words(to.w[k], strip + (size_t)((u32)(4 * quad + k) * COLUMN_NBYTES + 16 * part));
}

// TAKEN inputs of a token, zeros beyond `cols`. `whole`: rows of x begin at multiples of 16 bytes.
__device__ __forceinline__ void load_inputs(float (&to)[TAKEN], const float* x, int first, int cols, bool whole) {
    if (whole && TAKEN == 4) {
        const float4 v = *(const float4*)(x + first);
        to[0] = v.x, to[1] = v.y, to[2 % TAKEN] = v.z, to[3 % TAKEN] = v.w;
    } else if (whole) {
        const float2 v = *(const float2*)(x + first);
        to[0] = v.x, to[1] = v.y;
    } else {
#pragma unroll
        for (int k = 0; k < TAKEN; k++) to[k] = first + k < cols ? x[first + k] : 0.0f;
    }
}

// out (n, rows) = x (n, cols) @ weight.T (+ bias (rows,)) (+ residual (n, rows)). Grid: (strips, tiles of TOKENS
// tokens).
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    plain_matvec(const u8* weights, const float* x, const float* bias, const float* residual, float* out, int rows,
                 int cols, int n) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int part = lane % PARTS, strip = blockIdx.x, first_token = blockIdx.y * TOKENS;
    const int quads = (cols + 3) / 4, stride = warps * (32 / PARTS);
    const bool whole = cols % 4 == 0;
    const u8* from = weights + (size_t)strip * quads * 4 * COLUMN_NBYTES;
    x += (size_t)first_token * cols;
    int quad = warp * (32 / PARTS) + lane / PARTS;

    let_next_begin();
    Columns stages[STAGES];
#pragma unroll
    for (int k = 0; k < STAGES; k++)
        if (quad + k * stride < quads) load_columns(stages[k], from, quad + k * stride, part);
    wait_for_earlier();
    float acc[TOKENS * ROWS];
#pragma unroll
    for (int i = 0; i < TOKENS * ROWS; i++) acc[i] = 0.0f;
    for (; quad < quads; quad += STAGES * stride) {
#pragma unroll
        for (int k = 0; k < STAGES; k++) {
            const int here = quad + k * stride, next = here + STAGES * stride;
            if (here >= quads) break;
#pragma unroll
            for (int c = 0; c < 4; c += TAKEN) {
                float in[TOKENS][TAKEN];
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
                    load_inputs(in[t], x + (size_t)min(t, n - 1 - first_token) * cols, 4 * here + c, cols, whole);
#pragma unroll
                for (int j = 0; j < TAKEN; j++) {
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        const float w = plain_at(stages[k].w[c + j], r);
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) acc[t * ROWS + r] += w * in[t][j];
                    }
                }
            }
            if (next < quads) load_columns(stages[k], from, next, part);
        }
    }
    __shared__ float factor;
    if (threadIdx.x == 0) factor = 1.0f;
    finish<TOKENS, ROWS, PARTS>(acc, strip, first_token, rows, n, &factor, bias, residual, out);
}
