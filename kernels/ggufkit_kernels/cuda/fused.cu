// One token's products with what stands beside them and follows them in the network, so that a layer is five launches
// instead of twelve.
//
//     matvecs (q, k, v)   attention   matvec_norm (output)   matvec_gated (gate, up)   matvec_norm (down)
//
// A launch that waits for the one before is said to cost 1 to 2 us, whatever it does; a layer of an 8B network in
// Q4_K is 37 us of memory, of a 1B network 10. A norm and the rounding of its results to int8 are such launches, and
// need not be: norm(x) is (x * weight) times one number for the token, and int8 inputs are made of a chunk of 32
// numbers, whatever they are multiplied with. So the kernel that makes 32 rows of x rounds x * weight, and leaves the
// sum of their squares; who reads these inputs adds the sums up (128 of them for 4,096 numbers) while its weights are
// on their way, and multiplies its results with 1 / sqrt(mean + eps). No sum depends on the order of blocks.
//
// A block makes 32 rows (STRIPS strips, of both matrices in matvec_gated); `warps` warps share a strip as in matvec.cu.
// matvec_norm has up to 32 warps a block: 4096 x 4096 is 128 blocks on 132 multiprocessors, all of it under way at
// once. With 2048 rows there are 64 blocks, and half of the multiprocessors have nothing to do: 36 KB under way in each
// of the others is still enough to keep memory busy, but a multiprocessor takes no more than about 64 bytes a cycle.
// matvec_gated has 16 warps and two blocks a multiprocessor: 14336 rows are 448 blocks of 4 steps a warp.
//
// matvecs is the matvec of matvec.cu over the strips of q, k and v (where these are of one type) as if they were one
// matrix: two of the three are small, and would be launches that others wait for.
//
// sm_90: registers as in matvec.cu; nothing is spilled.
// Considered: the norm in front of each product, in shared memory (x and weight are 32 KB from the second-level cache
// for each block, as much as its weights from memory); the last block to be done makes the norm (an atomic ticket; a
// wait at the end of each kernel). Nothing here has been timed on a device.
#include "chunk.cuh"
#include "steps.cuh"
#include "sums.cuh"

#define STRIPS (32 / LANES)  // of a block: 32 rows, which are a chunk of the next inputs

// The sums of LANES rows over the warps that share a strip; `partial` is theirs.
__device__ __forceinline__ void leave(float (&acc)[4], float* partial) {
    int first = 0;
    bool writes = true;
    reduce<4, 16, PARTS>(acc, threadIdx.x % 32, first, writes);
    constexpr int left = 4 * PARTS > 32 ? 4 * PARTS / 32 : 1;
    if (writes)
#pragma unroll
        for (int i = 0; i < left; i++) partial[4 * (threadIdx.x % PARTS) + first + i] = acc[i];
}
__device__ __forceinline__ float collect(const float (*partial)[LANES], int warps, int lane) {
    float sum = 0.0f;
    for (int w = 0; w < warps; w++) sum += partial[w][lane];
    return sum;
}

// One token: out (rows,) = x @ weight.T (+ bias) (+ residual, which may be `out`), and what a norm with `weight`
// (rows,) makes of it: int8 inputs of out * weight, and the sum of squares of each 32 of `out`, from which those who
// read the inputs make the norm's factor. x and `squares` as in matvec.cu; `warps` share a strip.
// Grid: blocks of 32 rows. Block: STRIPS * warps warps.
extern "C" __global__ void __launch_bounds__(MOST_THREADS * 2)
    matvec_norm(const u8* codes, const u8* d, const u8* scale, const u8* dmin, const u8* minimum, const u8* tables,
                const i8* q, const uint2* a, const float* squares, const float* bias, const float* residual,
                const float* weight, float* out, i8* next_q, uint2* next_a, float* next_squares, int rows, int cols,
                int warps, float factor, float eps) {
    __shared__ float partial[2 * MOST_WARPS][LANES];
    const int lane = threadIdx.x % 32, chunks = (cols + 31) / 32;
    const int warp = __shfl_sync(FULL_WARP, (int)threadIdx.x / 32, 0);  // so that the compiler knows it to be one
    const int strip = blockIdx.x * STRIPS + warp / warps, row = blockIdx.x * 32 + lane;
    const bool there = strip * LANES < rows;
    const Strip from = strip_of(codes, d, scale, dmin, minimum, there ? strip : 0, chunks);
    const Share share = share_of(warp % warps, warps, there ? chunks : 0);
    Stage stages[STAGES];
    let_next_begin();
    begin_weights(stages, share, from);
    Tables book = {};
    load_tables(book, tables);
    wait_for_earlier();
    begin_inputs(stages, share, q, a);
    __shared__ float before[32];  // what products are multiplied with, for each lane of the first warp
    if (warp == 0) before[lane] = squares ? factor * norm_of(squares, chunks, cols, eps) : factor;
    float acc[4];
    run(acc, stages, share, from, book, q, a, 0);
    const bool mine = warp == 0 && row < rows;
    const float extra = mine ? extra_of(bias, residual, row, 0, rows) : 0.0f, times = mine ? weight[row] : 0.0f;
    leave(acc, partial[warp]);
    __syncthreads();
    if (warp) return;
    float x = 0.0f;
    if (mine) {
        x = collect(partial + lane / LANES * warps, warps, lane % LANES) * before[lane] + extra;
        out[row] = x;
    }
    quantize_lanes(x * times, blockIdx.x, next_q, next_a);
    const float sum = warp_sum(x * x);
    if (lane == 0) next_squares[blockIdx.x] = sum;
}

// One token: out (rows,) = x @ weight.T (+ bias) of two or three matrices of one layout and one input; x and `squares` as
// in matvec.cu, and the same sums. rows_2 is 0 where there are two.
// Grid: the strips of all matrices, one after the other.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    matvecs(const u8* codes_0, const u8* d_0, const u8* scale_0, const u8* dmin_0, const u8* minimum_0, const u8* codes_1,
            const u8* d_1, const u8* scale_1, const u8* dmin_1, const u8* minimum_1, const u8* codes_2, const u8* d_2,
            const u8* scale_2, const u8* dmin_2, const u8* minimum_2, const u8* tables, const i8* q, const uint2* a,
            const float* squares, const float* bias_0, const float* bias_1, const float* bias_2, float* out_0,
            float* out_1, float* out_2, int rows_0, int rows_1, int rows_2, int cols, float factor_0, float factor_1,
            float factor_2, float eps) {
    let_next_begin();
    const int strips_0 = (rows_0 + LANES - 1) / LANES, strips_1 = (rows_1 + LANES - 1) / LANES;
    const int chunks = (cols + 31) / 32, place = blockIdx.x;
    const bool first = place < strips_0, second = !first && place < strips_0 + strips_1;
    const int strip = first ? place : second ? place - strips_0 : place - strips_0 - strips_1;
    const Strip from = strip_of(first ? codes_0 : second ? codes_1 : codes_2, first ? d_0 : second ? d_1 : d_2,
                                first ? scale_0 : second ? scale_1 : scale_2, first ? dmin_0 : second ? dmin_1 : dmin_2,
                                first ? minimum_0 : second ? minimum_1 : minimum_2, strip, chunks);
    const Share share = share_of(threadIdx.x / 32, blockDim.x / 32, chunks);
    Stage stages[STAGES];
    begin_weights(stages, share, from);
    Tables book = {};
    load_tables(book, tables);
    wait_for_earlier();
    begin_inputs(stages, share, q, a);
    __shared__ float norm;
    if (threadIdx.x < 32) {
        const float found = squares ? norm_of(squares, chunks, cols, eps) : 1.0f;
        if (threadIdx.x == 0) norm = found * (first ? factor_0 : second ? factor_1 : factor_2);
    }
    float acc[4];
    run(acc, stages, share, from, book, q, a, 0);
    finish<1, 4, PARTS>(acc, strip, 0, first ? rows_0 : second ? rows_1 : rows_2, 1, &norm,
                        first ? bias_0 : second ? bias_1 : bias_2, nullptr, first ? out_0 : second ? out_1 : out_2);
}

__device__ __forceinline__ float gated(float gate, float up, int squared) {
    if (!squared) return gate / (1.0f + expf(-gate)) * up;
    const float positive = gate > 0.0f ? gate : 0.0f;
    return (gate != gate ? gate : positive * positive) * up;
}

// One token: silu(gate) * up, or max(gate, 0)² * up where `squared`, of gate = x @ weight.T and up = x @ other.T, two
// matrices (rows, cols) of one layout, as int8 inputs, and as float32 out (rows,) where it is not null.
// Grid: blocks of 32 rows. Block: 2 * STRIPS * warps warps; the second half takes `other`.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    matvec_gated(const u8* codes, const u8* d, const u8* scale, const u8* dmin, const u8* minimum, const u8* tables,
                 const u8* other_codes, const u8* other_d, const u8* other_scale, const u8* other_dmin,
                 const u8* other_minimum, const i8* q, const uint2* a, const float* squares, float* out, i8* next_q,
                 uint2* next_a, int rows, int cols, int warps, float factor, float other_factor, float eps,
                 int squared) {
    __shared__ float partial[MOST_WARPS][LANES];
    const int lane = threadIdx.x % 32, chunks = (cols + 31) / 32;
    const int warp = __shfl_sync(FULL_WARP, (int)threadIdx.x / 32, 0);  // so that the compiler knows it to be one
    const bool second = warp >= STRIPS * warps;
    const int strip = blockIdx.x * STRIPS + warp / warps % STRIPS, row = blockIdx.x * 32 + lane;
    const bool there = strip * LANES < rows;
    const Strip from =
        strip_of(second ? other_codes : codes, second ? other_d : d, second ? other_scale : scale,
                 second ? other_dmin : dmin, second ? other_minimum : minimum, there ? strip : 0, chunks);
    const Share share = share_of(warp % warps, warps, there ? chunks : 0);
    Stage stages[STAGES];
    let_next_begin();
    begin_weights(stages, share, from);
    Tables book = {};
    load_tables(book, tables);
    wait_for_earlier();
    begin_inputs(stages, share, q, a);
    __shared__ float before[32];
    if (warp == 0) before[lane] = squares ? norm_of(squares, chunks, cols, eps) : 1.0f;
    float acc[4];
    run(acc, stages, share, from, book, q, a, 0);
    leave(acc, partial[warp]);
    __syncthreads();
    if (warp) return;
    float x = 0.0f;
    if (row < rows) {
        const float norm = before[lane];
        const float gate = collect(partial + lane / LANES * warps, warps, lane % LANES) * (norm * factor);
        const float up = collect(partial + (STRIPS + lane / LANES) * warps, warps, lane % LANES) *
                         (norm * other_factor);
        x = gated(gate, up, squared);
        if (out) out[row] = x;
    }
    quantize_lanes(x, blockIdx.x, next_q, next_a);
}
