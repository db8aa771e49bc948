// From packed codes back to weights: rows as float16 for cuBLAS (`unpack`), single rows as float32 (`embed`).
//
// A weight is computed in float32 by the formula of `Quants` in its order, so `embed` equals the type's own decoding
// bit for bit, and `unpack` is that rounded to nearest even. float16 ends at 65,504: finite weights beyond become that
// (none are in any network that we know of), infinity and NaN stay. Weights below 6e-8 become subnormal or zero.
//
// unpack: a warp takes STEP chunks of a strip as the matvec does, decodes them into a tile of shared memory, and writes
// the tile row by row, 512 bytes of a row a warp. Reads and writes are whole lines; what is written is 3.6 times what
// is read (Q4_K). 8e9 weights: 20 GB, 6 ms at 3.35 TB/s where nothing stays in the 50 MB of second-level cache; slabs
// that do stay there are not written to memory. Some 10 instructions a weight, half of them of half rate: 3 ms. embed:
// a thread takes four columns of a row, whose codes lie VECTOR bytes apart; a few rows, so nothing is shared. sm_90: 80
// and 32 registers, no spills. Not timed on a device.
#include "layout.cuh"

#define THREADS 128
#define WARPS (THREADS / 32)
#define TILE (32 * STEP)        // columns of a warp's tile
#define ROW (TILE / 8)          // of a tile, in pieces of 8 halves

// Where a tile's row begins. Four rows, those of one thread, are a piece further on than the four before: of eight
// threads that write side by side, each then meets other banks (of 8 lanes, every two).
__device__ __forceinline__ int row_at(int row) { return row * ROW + row / 4; }

__device__ __forceinline__ u32 two_halves(float a, float b) {
    return half_of_weight(a) | (u32)half_of_weight(b) << 16;
}

// The four weights of a quad by the formula of `Quants`, in its order: (d * scale) * x - dmin * minimum, no fma.
// `levels`, of a table: its 16 numbers.
__device__ __forceinline__ void weights_of(u32 quad, float scale, float low, const float* levels, float (&w)[4]) {
    const u32 flipped = VALUES == V_BYTES ? quad ^ 0x80808080u : quad;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float x;
        if (IS_TABLE)
            x = levels[quad >> 8 * j & 15];
        else
            x = __fsub_rn(byte_to_float(flipped, j), (float)OFFSET);
        w[j] = __fmul_rn(scale, x);
        if (MINIMUM) w[j] = __fsub_rn(w[j], low);
    }
}

// Rows first_row … of a matrix as float16, row-major: out (last - first_row, cols), first_row a multiple of LANES and
// last = min(first_row + LANES * gridDim.y, rows). Grid: (groups of WARPS tiles of TILE columns, strips).
extern "C" __global__ void __launch_bounds__(128)
    unpack(const u8* codes, const u8* d, const u8* scale, const u8* dmin, const u8* minimum, const float* levels,
           u16* out, int first_row, int rows, int cols, int chunks) {
    __shared__ uint4 tile[WARPS][LANES * ROW + PARTS];
    __shared__ float book[16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % PARTS;
    const int strip = first_row / LANES + blockIdx.y, first_chunk = (blockIdx.x * WARPS + warp) * STEP;
    const int chunk = first_chunk + lane / PARTS;
    Chunk c;
    if (chunk < chunks) load_chunk(c, strip_of(codes, d, scale, dmin, minimum, strip, chunks), chunk, part);
    if (IS_TABLE) {
        if (threadIdx.x < 16) book[threadIdx.x] = levels[threadIdx.x];
        __syncthreads();
    }
    if (chunk < chunks) {
        float scales[UNITS][4], low[UNITS][4];
        scales_of(c, chunk, scales, low);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint4* to = tile[warp] + row_at(4 * part + r) + 4 * (lane / PARTS);
#pragma unroll
            for (int q = 0; q < 8; q += 2) {
                const int u = UNITS == 2 ? q / 4 : 0;
                float w[4], v[4];
                weights_of(quad_of(c.code, q, r), scales[u][r], low[u][r], book, w);
                weights_of(quad_of(c.code, q + 1, r), scales[u][r], low[u][r], book, v);
                to[q / 2] = make_uint4(two_halves(w[0], w[1]), two_halves(w[2], w[3]), two_halves(v[0], v[1]),
                                       two_halves(v[2], v[3]));
            }
        }
    }
    __syncwarp();
    const int first_col = 32 * first_chunk, width = min(TILE, cols - first_col);
    for (int r = 0; r < LANES; r++) {
        const int row = strip * LANES + r;
        if (row >= rows) break;
        u16* to = out + (size_t)(row - first_row) * cols + first_col;
        const uint4* from = tile[warp] + row_at(r);
        if (cols % 8 == 0) {
            for (int i = 8 * lane; i < width; i += 256) *(uint4*)(to + i) = from[i / 8];
        } else {
            for (int i = lane; i < width; i += 32) to[i] = ((const u16*)from)[i];
        }
    }
}

// Rows ids (n,) as float32: out (n, cols), equal to the type's own decoding bit for bit. A thread takes four columns.
// Grid: (blocks that share a row, n).
extern "C" __global__ void embed(const u8* codes, const u8* d, const u8* scale, const u8* dmin, const u8* minimum,
                                 const float* levels, const int* ids, float* out, int cols, int chunks) {
    const int row = ids[blockIdx.y], quad = blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * quad >= cols) return;
    const int part = row % LANES / 4, r = row % 4, chunk = quad / 8, q = quad % 8;
    Chunk c;
    load_chunk(c, strip_of(codes, d, scale, dmin, minimum, row / LANES, chunks), chunk, part);
    float scales[UNITS][4], low[UNITS][4], w[4];
    scales_of(c, chunk, scales, low);
    u32 four = 0;
    float s = 0.0f, m = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i != r) continue;
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k == q) four = quad_of(c.code, k, i);
        s = scales[UNITS == 2 ? q / 4 : 0][i], m = low[UNITS == 2 ? q / 4 : 0][i];
    }
    weights_of(four, s, m, levels, w);
    out += (size_t)blockIdx.y * cols;
    for (int j = 0; j < 4; j++)
        if (4 * quad + j < cols) out[4 * quad + j] = w[j];
}
