// Plain numbers in strips of columns back to rows: for cuBLAS (`plain_unpack`: float16, or float32 where they are float32,
// which halves would round), and a token's as float32 (`plain_embed`).
//
// plain_unpack: a block transposes a strip's tile of TILE columns in shared memory: 16-byte reads, 512 bytes of a row a
// warp written at a time. float16 and float32 are copied bit for bit; bfloat16 is rounded as in unpack.cu. Not timed on a
// device.
#include "plain.cuh"

#define THREADS 128
#define TILE 256               // columns of a block's tile
#define VEC (16 / (int)sizeof(Out))
#define PITCH (TILE + VEC)     // numbers

#if NUMBER == N_F32
typedef float Out;
__device__ __forceinline__ float unpacked(const u32 (&words)[4], int r) { return plain_at(words, r); }
#elif NUMBER == N_F16
typedef u16 Out;
__device__ __forceinline__ u16 unpacked(const u32 (&words)[4], int r) {
    return (u16)(r % 2 ? words[r / 2 % 4] >> 16 : words[r / 2 % 4] & 0xffffu);
}
#else
typedef u16 Out;
__device__ __forceinline__ u16 unpacked(const u32 (&words)[4], int r) { return half_of_weight(plain_at(words, r)); }
#endif

// Rows first_row … as Out, row-major: out (last - first_row, cols), first_row a multiple of LANES and
// last = min(first_row + LANES * gridDim.y, rows). Grid: (tiles of TILE columns, strips).
extern "C" __global__ void __launch_bounds__(128) plain_unpack(const u8* weights, Out* out, int first_row, int rows,
                                                               int cols) {
    __shared__ uint4 tile[LANES][PITCH / VEC];
    const int quads = (cols + 3) / 4, strip = first_row / LANES + blockIdx.y, first_col = blockIdx.x * TILE;
    const int width = min(TILE, cols - first_col);
    const u8* from = weights + ((size_t)strip * quads * 4 + first_col) * COLUMN_NBYTES;
    for (int i = threadIdx.x; i < width * PARTS; i += THREADS) {
        u32 words[4];
        load_words(words, from + 16 * i);
        for (int r = 0; r < ROWS; r++) ((Out*)tile[i % PARTS * ROWS + r])[i / PARTS] = unpacked(words, r);
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < LANES; i += THREADS / 32) {
        const int row = strip * LANES + i, lane = threadIdx.x % 32;
        if (row >= rows) break;
        Out* to = out + (size_t)(row - first_row) * cols + first_col;
        if (cols % VEC == 0) {
            for (int j = VEC * lane; j < width; j += 32 * VEC) *(uint4*)(to + j) = tile[i][j / VEC];
        } else {
            for (int j = lane; j < width; j += 32) to[j] = ((const Out*)tile[i])[j];
        }
    }
}

// Rows ids (n,) as float32: out (n, cols). A thread takes a column. Grid: (blocks that share a row, n).
extern "C" __global__ void plain_embed(const u8* weights, const int* ids, float* out, int cols) {
    const int row = ids[blockIdx.y], col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    const size_t at = ((size_t)(row / LANES) * ((cols + 3) / 4 * 4) + col) * LANES + row % LANES;
    float w;
    if (NUMBER == N_F32)
        w = ((const float*)weights)[at];
    else if (NUMBER == N_F16)
        w = half_to_float(((const u16*)weights)[at]);
    else
        w = bf16_to_float(((const u16*)weights)[at]);
    out[(size_t)blockIdx.y * cols + col] = w;
}
