// Packed codes times int8 inputs, for one to eight tokens: out (n, rows) = x (n, cols) @ weight.T.
//
// A block takes a strip (LANES rows); its warps share the columns (weights.py: `warps_of`). A thread takes four rows of
// a chunk, 32 inputs: 16-byte loads, 32 `dp4a`, and one conversion to float32 and one fma a row; see layout.cuh for
// what it reads and steps.cuh for the loop. Integer sums begin with the bits of 2**23 + 2**22 (MAGIC), so that they are
// floats when they are done, but for a subtraction; an offset goes into that beginning, through the sum of the inputs.
// A minimum is taken off through the same sum. Sums of the columns are joined by shuffles, then over the warps in
// shared memory (sums.cuh), where the bias and the residual are added.
//
// Bytes and operations of one token on an H100 (3.35 TB/s, 132 multiprocessors, 1.7 GHz: 15 bytes a cycle for each). A
// step of a warp, 8 chunks of 16 rows of Q4_K, reads 2,304 bytes and 320 of inputs, which the first-level cache has
// after the first strip. In SASS of sm_90 (nvdisasm) it is 233 instructions: 32 dp4a, 81 of logic, 8 fma, 11 loads,
// each of a vector of codes right after its last use. Four schedulers issue one a cycle each, so a step takes 60 cycles
// of the multiprocessor, its bytes 154: arithmetic is hidden (Q8_0: 109 instructions for 4,352 bytes; Q6_K 272 for
// 3,456; TQ2_0 321 for 2,112, 80 cycles of 141), and what counts is how many bytes are on their way. 20 KB a
// multiprocessor would do for 800 ns of latency (Little); at the start of a matrix there are
//
//     Q4_K, LANES 16    blocks  warps  steps a warp  blocks resident  KB under way   MB    at least
//     1B   2048 x  2048   128      8        1               1              18         2.4    0.7 us
//          8192 x  2048   512      8        1               4              72         9.4    2.8
//          2048 x  8192   128     16        2               1              36         9.4    2.8
//     8B   4096 x  4096   256     16        1               2              72         9.4    2.8
//          1024 x  4096    64     16        1               1              36         2.4    0.7
//         14336 x  4096   896      8        2               4              72          33    9.9
//          4096 x 14336   256     14        4               2              63          33    9.9
//        128256 x  4096  8016      8        2               4              72         296     88
//
// Q8_0 has 34 to 102 KB under way, TQ2_0, two chunks a thread, 8 to 66 (8 in the 1B shape's smallest, which is 8 KB a
// multiprocessor in all). The 4096 x 4096 matrix is on its way as a whole as soon as the kernel runs.
//
// 64 registers a thread (two blocks of 16 warps), 85 for more than 4 bits and for codebooks (two of 12 warps), 128 for
// codebooks of floats (two of 8) and for several tokens. For one token no layout spills any (sm_90, nvrtc 13.5); with 16
// warps Q8_0 spilled 48 bytes, NVFP4 92, Q5_K 20. For 8 tokens Q2_K, Q4_K, Q5_1, Q5_K and TQ2_0 spill 8 to 28. nvrtc
// takes 0.16 to 0.29 s of processor time a module, nvcc 0.4 to 0.6.
//
// Considered: two chunks a thread for 4 bits (96 registers, half as many warps, as many bytes: nothing won on paper,
// and fewer warps to hide the sums' latency); loads of 512 bytes side by side for a warp instead of 8 pieces of 64
// (scales would be decoded four times as often; every sector is whole either way); asynchronous copies to shared memory
// (another path for sm_75). PERSISTENT: blocks that stay and go from strip to strip, the next one's loads under way
// while sums are joined, for long matrices (14336 x 4096: 896 strips for 528 blocks at a time); 8 bytes spilled for
// Q4_K, 28 for Q8_0. To be tried on a device: nothing here has been timed on one.
#include "steps.cuh"
#include "sums.cuh"

#ifndef PERSISTENT
#define PERSISTENT 0  // whether a block goes on to other strips, in steps of the grid
#endif
#define MIN_BLOCKS (TOKENS == 1 ? 2 : 1)  // of MOST_WARPS warps, that registers must suffice for

// out (n, rows) = factor * x (n, cols) @ weight.T (+ bias (rows,)) (+ residual (n, rows)), x as `quantize` leaves it.
// Where `squares` ((cols + 31) / 32,) is not null, the inputs are those of one token before its norm (see fused.cu),
// and the products are multiplied with what the norm is.
// Grid: (strips, or fewer where PERSISTENT, tiles of TOKENS tokens); what a tile has beyond n repeats the last token
// and is not written.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, MIN_BLOCKS)
    matvec(const u8* codes, const u8* d, const u8* scale, const u8* dmin, const u8* minimum, const u8* tables,
           const i8* q, const uint2* a, const float* squares, const float* bias, const float* residual, float* out,
           int rows, int cols, int n, float factor, float eps) {
    const int warp = threadIdx.x / 32, first_token = blockIdx.y * TOKENS, chunks = (cols + 31) / 32;
    const int strips = (rows + LANES - 1) / LANES;
    const Share share = share_of(warp, blockDim.x / 32, chunks);
    let_next_begin();
    int strip = blockIdx.x;
    Strip from = strip_of(codes, d, scale, dmin, minimum, strip, chunks);
    q += (size_t)first_token * 32 * chunks, a += (size_t)first_token * chunks;
    Stage stages[STAGES];
    begin_weights(stages, share, from);
    Tables book = {};
    load_tables(book, tables);
    wait_for_earlier();
    begin_inputs(stages, share, q, a);
    __shared__ float norm;
    if (TOKENS == 1 && warp == 0) {  // while the weights are on their way
        const float found = squares ? norm_of(squares, chunks, cols, eps) : 1.0f;
        if (threadIdx.x == 0) norm = found * factor;
    } else if (TOKENS > 1 && threadIdx.x == 0)
        norm = factor;
    for (;;) {
        float acc[4 * TOKENS];
        run(acc, stages, share, from, book, q, a, n - 1 - first_token);
        const int next = PERSISTENT ? strip + gridDim.x : strips;
        if (next < strips) {
            from = strip_of(codes, d, scale, dmin, minimum, next, chunks);
            begin_weights(stages, share, from);
            begin_inputs(stages, share, q, a);
        }
        finish<TOKENS, 4, PARTS>(acc, strip, first_token, rows, n, &norm, bias, residual, out);
        if (next >= strips) break;
        strip = next;
        __syncthreads();  // the sums of this strip have been read
    }
}
