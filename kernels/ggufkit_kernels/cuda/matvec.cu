#include "layout.cuh"
#include "sums.cuh"

#define MAGIC 0x4b400000  // 2**23 + 2**22 as float32: an integer below 2**22 added to these bits is added to the float

#ifndef STAGES
#define STAGES (TOKENS > 2 ? 1 : BITS >= 7 ? 1 : BITS >= 4 ? 2 : BITS >= 2 ? 3 : 4)
#endif

// The inputs that a token brings to a chunk.
struct Inputs {
    int q[8];
    float a;
    u32 sums;
};

__device__ __forceinline__ void load_inputs(Inputs& to, const i8* q, const uint2* a, int chunk) {
    const int4 low = *(const int4*)(q + 32 * chunk), high = *(const int4*)(q + 32 * chunk + 16);
    const uint2 both = a[chunk];
    to.q[0] = low.x, to.q[1] = low.y, to.q[2] = low.z, to.q[3] = low.w;
    to.q[4] = high.x, to.q[5] = high.y, to.q[6] = high.z, to.q[7] = high.w;
    to.a = __uint_as_float(both.x), to.sums = both.y;
}

// The sum of the int8 inputs of a unit.
__device__ __forceinline__ int sum_of(u32 sums, int unit) {
    const int all = (int)sums >> 16, half = (short)(sums & 0xffffu);
    return UNITS == 1 ? all : unit == 0 ? half : all - half;
}

__device__ __forceinline__ float magic_to_float(int bits) { return __int_as_float(bits) - 12582912.0f; }

// acc[row] += this chunk's products, of one token.
__device__ __forceinline__ void add_row(float& acc, const int (&w)[8], const int (&w_low)[8], const Inputs& x,
                                        const float (&scale)[UNITS][4], const float (&low)[UNITS][4], int r) {
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const int sum = sum_of(x.sums, u);
        int total = VALUES == V_CODES && OFFSET ? MAGIC - OFFSET * sum : MAGIC, total_low = MAGIC;
#pragma unroll
        for (int q = u * 8 / UNITS; q < (u + 1) * 8 / UNITS; q++) {
            total = __dp4a(w[q], x.q[q], total);
            if (VALUES == V_TABLE16) total_low = __dp4a(w_low[q], x.q[q], total_low);
        }
        float product = magic_to_float(total);
        if (VALUES == V_TABLE16) product = product * 256.0f + magic_to_float(total_low);
        acc += scale[u][r] * (product * x.a);
        if (MINIMUM) acc -= low[u][r] * ((float)sum * x.a);
    }
}

struct Stage {
    Chunk chunk;
#if TOKENS == 1
    Inputs inputs;
#endif
};

__device__ __forceinline__ void load_stage(Stage& to, const Strip& from, const i8* q, const uint2* a, int chunk,
                                           int part) {
    load_chunk(to.chunk, from, chunk, part);
#if TOKENS == 1
    load_inputs(to.inputs, q, a, chunk);
#endif
}

// out (n, rows) = factor * x (n, cols) @ weight.T (+ bias (rows,)) (+ residual (n, rows)), x as `quantize` leaves it.
// Grid: (strips, tiles of TOKENS tokens); what a tile has beyond n repeats the last token and is not written.
extern "C" __global__ void __launch_bounds__(512) matvec(const u8* codes, const u8* d, const u8* scale, const u8* dmin,
                                                         const u8* minimum, const u8* tables, const i8* q,
                                                         const uint2* a, const float* bias, const float* residual,
                                                         float* out, int rows, int chunks, int n, float factor) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int part = lane % PARTS, strip = blockIdx.x, first_token = blockIdx.y * TOKENS;
    const Strip from = strip_of(codes, d, scale, dmin, minimum, strip, chunks);
    const int stride = warps * STEP;
    int chunk = warp * STEP + lane / PARTS;
    q += (size_t)first_token * 32 * chunks, a += (size_t)first_token * chunks;

    Stage stages[STAGES];
#pragma unroll
    for (int k = 0; k < STAGES; k++)
        if (chunk + k * stride < chunks) load_stage(stages[k], from, q, a, chunk + k * stride, part);
    u32 table[4] = {0, 0, 0, 0}, table_low[4] = {0, 0, 0, 0};
    if (IS_TABLE) load_words(table, tables);
    if (VALUES == V_TABLE16) load_words(table_low, tables + VECTOR);

    float acc[4 * TOKENS];
#pragma unroll
    for (int i = 0; i < 4 * TOKENS; i++) acc[i] = 0.0f;
    for (; chunk < chunks; chunk += STAGES * stride) {
#pragma unroll
        for (int k = 0; k < STAGES; k++) {
            const int here = chunk + k * stride, next = here + STAGES * stride;
            if (here >= chunks) break;
            float scales[UNITS][4], low[UNITS][4];
            int w[4][8], w_low[4][8];
            scales_of(stages[k].chunk, here, scales, low);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                quads_of(stages[k].chunk, table, r, w[r]);
                if (VALUES == V_TABLE16) quads_of(stages[k].chunk, table_low, r, w_low[r]);
            }
            if (TOKENS > 1 && next < chunks) load_stage(stages[k], from, q, a, next, part);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                Inputs x;
#if TOKENS == 1
                x = stages[k].inputs;
#else
                const int token = min(t, n - 1 - first_token);
                load_inputs(x, q + (size_t)token * 32 * chunks, a + (size_t)token * chunks, here);
#endif
#pragma unroll
                for (int r = 0; r < 4; r++) add_row(acc[4 * t + r], w[r], w_low[r], x, scales, low, r);
            }
            if (TOKENS == 1 && next < chunks) load_stage(stages[k], from, q, a, next, part);
        }
    }

    finish<TOKENS, 4, PARTS>(acc, strip, first_token, rows, n, factor, bias, residual, out);
}
