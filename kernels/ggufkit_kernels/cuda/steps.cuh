// The products of a strip's chunks with int8 inputs: what each warp does with its share of the columns, its loads
// always under way. STAGES is how many chunks of a thread are asked for at once, TOKENS how many tokens share what is
// unpacked.
#pragma once
#include "layout.cuh"

#define MAGIC 0x4b400000  // 2**23 + 2**22 as float32: an integer below 2**22 added to these bits is added to the float

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

// What the sums of a unit's products begin with.
__device__ __forceinline__ int start_of(u32 sums, int unit) {
    return VALUES == V_CODES && OFFSET ? MAGIC - OFFSET * sum_of(sums, unit) : MAGIC;
}

// acc += a unit's products of row r. Many tokens and one do this alike.
__device__ __forceinline__ void add_unit(float& acc, int total, int total_low, const Inputs& x, float scale, float low,
                                         int unit) {
    float product = magic_to_float(total);
    if (VALUES == V_TABLE16) product = product * 256.0f + magic_to_float(total_low);
    acc += scale * (product * x.a);
    if (MINIMUM) acc -= low * ((float)sum_of(x.sums, unit) * x.a);
}

struct Stage {
    Chunk chunk;
#if TOKENS == 1
    Inputs inputs;
#endif
};

struct Tables {
    u32 high[4], low[4];  // of a codebook of bytes: `high` alone
};

#if TOKENS == 1
// One token: acc += the stage's chunk; then the stage has chunk `next`, if there is one. Each vector of codes is asked
// for again as soon as its last code is used, so that a thread always has loads on their way.
__device__ __forceinline__ void step(Stage& stage, float (&acc)[4], const Strip& from, const Tables& book, const i8* q,
                                     const uint2* a, int here, int next, int chunks, int part, int) {
    Chunk& c = stage.chunk;
    Inputs& x = stage.inputs;
    const u8* codes = codes_at(from, next, part);
    int total[UNITS][4], total_low[UNITS][4];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int r = 0; r < 4; r++) total[u][r] = start_of(x.sums, u), total_low[u][r] = MAGIC;
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int w, v;
            pair_of(c, book.high, k, r, w, v);
            total[0][r] = __dp4a(w, x.q[k], total[0][r]);
            total[UNITS - 1][r] = __dp4a(v, x.q[k + 4], total[UNITS - 1][r]);
            if (VALUES != V_TABLE16) continue;
            pair_of(c, book.low, k, r, w, v);
            total_low[0][r] = __dp4a(w, x.q[k], total_low[0][r]);
            total_low[UNITS - 1][r] = __dp4a(v, x.q[k + 4], total_low[UNITS - 1][r]);
        }
        if (next < chunks) load_codes(c, codes, k);
    }
    float scales[UNITS][4], low[UNITS][4];
    scales_of(c, here, scales, low);
    if (next < chunks) load_scales(c, from, next, part);
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int u = 0; u < UNITS; u++) add_unit(acc[r], total[u][r], total_low[u][r], x, scales[u][r], low[u][r], u);
    if (next < chunks) load_inputs(x, q, a, next);
}
#else
// Several tokens: the chunk is unpacked once, then the stage's next chunk is asked for.
__device__ __forceinline__ void step(Stage& stage, float (&acc)[4 * TOKENS], const Strip& from, const Tables& book,
                                     const i8* q, const uint2* a, int here, int next, int chunks, int part, int last) {
    float scales[UNITS][4], low[UNITS][4];
    int w[4][8], w_low[4][8];
    scales_of(stage.chunk, here, scales, low);
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            pair_of(stage.chunk, book.high, k, r, w[r][k], w[r][k + 4]);
            if (VALUES == V_TABLE16) pair_of(stage.chunk, book.low, k, r, w_low[r][k], w_low[r][k + 4]);
        }
    if (next < chunks) load_chunk(stage.chunk, from, next, part);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = min(t, last);
        Inputs x;
        load_inputs(x, q + (size_t)token * 32 * chunks, a + (size_t)token * chunks, here);
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                int total = start_of(x.sums, u), total_low = MAGIC;
#pragma unroll
                for (int k = u * 8 / UNITS; k < (u + 1) * 8 / UNITS; k++) {
                    total = __dp4a(w[r][k], x.q[k], total);
                    if (VALUES == V_TABLE16) total_low = __dp4a(w_low[r][k], x.q[k], total_low);
                }
                add_unit(acc[4 * t + r], total, total_low, x, scales[u][r], low[u][r], u);
            }
    }
}
#endif

// The chunks of one thread: `chunk`, and every `stride`-th from there on, below `chunks`.
struct Share {
    int chunk, stride, chunks, part;
};

// Warp `warp` of `warps` that share a strip.
__device__ __forceinline__ Share share_of(int warp, int warps, int chunks) {
    const int lane = threadIdx.x % 32;
    return {warp * STEP + lane / PARTS, warps * STEP, chunks, lane % PARTS};
}

// The first chunks are asked for: weights, which nobody computes, then their inputs.
__device__ __forceinline__ void begin_weights(Stage (&stages)[STAGES], Share s, const Strip& from) {
#pragma unroll
    for (int k = 0; k < STAGES; k++)
        if (s.chunk + k * s.stride < s.chunks) load_chunk(stages[k].chunk, from, s.chunk + k * s.stride, s.part);
}
__device__ __forceinline__ void begin_inputs(Stage (&stages)[STAGES], Share s, const i8* q, const uint2* a) {
#if TOKENS == 1
#pragma unroll
    for (int k = 0; k < STAGES; k++)
        if (s.chunk + k * s.stride < s.chunks) load_inputs(stages[k].inputs, q, a, s.chunk + k * s.stride);
#endif
}

__device__ __forceinline__ void load_tables(Tables& to, const u8* tables) {
    if (IS_TABLE) load_words(to.high, tables);
    if (VALUES == V_TABLE16) load_words(to.low, tables + VECTOR);
}

// acc: sums of 4 rows of each token, over the thread's chunks. q and a begin at the first token; `last` is the last one
// that there is.
__device__ __forceinline__ void run(float (&acc)[4 * TOKENS], Stage (&stages)[STAGES], Share s, const Strip& from,
                                    const Tables& tables, const i8* q, const uint2* a, int last) {
#pragma unroll
    for (int i = 0; i < 4 * TOKENS; i++) acc[i] = 0.0f;
    for (; s.chunk < s.chunks; s.chunk += STAGES * s.stride) {
#pragma unroll
        for (int k = 0; k < STAGES; k++) {
            const int here = s.chunk + k * s.stride;
            if (here >= s.chunks) break;
            step(stages[k], acc, from, tables, q, a, here, here + STAGES * s.stride, s.chunks, s.part, last);
        }
    }
}

// What the numbers of a norm are multiplied with: 1 / sqrt(mean square + eps), from the sums of squares that blocks
// left. All 32 lanes of a warp come.
__device__ __forceinline__ float norm_of(const float* squares, int n_squares, int cols, float eps) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < n_squares; i += 32) sum += squares[i];
    return 1.0f / sqrtf(warp_sum(sum) / (float)cols + eps);
}
