// HEADER
#include "steps.cuh"
#include "sums.cuh"

#define MIN_BLOCKS (TOKENS == 1 ? 2 : 1)  // of MOST_WARPS warps, that registers must suffice for

// out (n, rows) = factor * x (n, cols) @ weight.T (+ bias (rows,)) (+ residual (n, rows)), x as `quantize` leaves it. Where
// `squares` ((cols + 31) / 32,) is not null, the inputs are those of one token before its norm (see fused.cu), and the
// products are multiplied with what the norm is.
// Grid: (strips, tiles of TOKENS tokens); what a tile has beyond n repeats the last token and is not written.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, MIN_BLOCKS)
    matvec(const u8* codes, const u8* d, const u8* scale, const u8* dmin, const u8* minimum, const u8* tables,
           const i8* q, const uint2* a, const float* squares, const float* bias, const float* residual, float* out,
           int rows, int cols, int n, float factor, float eps) {
    const int warp = threadIdx.x / 32, strip = blockIdx.x, first_token = blockIdx.y * TOKENS, chunks = (cols + 31) / 32;
    const Strip from = strip_of(codes, d, scale, dmin, minimum, strip, chunks);
    const Share share = share_of(warp, blockDim.x / 32, chunks);
    q += (size_t)first_token * 32 * chunks, a += (size_t)first_token * chunks;
    Stage stages[STAGES];
    begin(stages, share, from, q, a);
    Tables book = {};
    load_tables(book, tables);
    __shared__ float norm;
    if (TOKENS == 1 && warp == 0) {  // while the weights are on their way
        const float found = squares ? norm_of(squares, chunks, cols, eps) : 1.0f;
        if (threadIdx.x == 0) norm = found * factor;
    } else if (TOKENS > 1 && threadIdx.x == 0)
        norm = factor;
    float acc[4 * TOKENS];
    run(acc, stages, share, from, book, q, a, n - 1 - first_token);
    finish<TOKENS, 4, PARTS>(acc, strip, first_token, rows, n, &norm, bias, residual, out);
}
