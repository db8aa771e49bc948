// Plain numbers in strips of columns back to rows: float16 for cuBLAS (`plain_unpack`), float32 (`plain_embed`).
//
// plain_unpack: a block transposes a strip's tile of TILE columns in shared memory: 16-byte reads, 512 bytes of a row a
// warp written at a time. float16 is copied bit for bit; else rounding is as in unpack.cu. Not timed on a device.
#include "plain.cuh"

#define THREADS 128
#define TILE 256               // columns of a block's tile
#define PITCH (TILE + 8)       // halves

// Rows first_row … as float16, row-major: out (last - first_row, cols), first_row a multiple of LANES and
// last = min(first_row + LANES * gridDim.y, rows). Grid: (tiles of TILE columns, strips).
extern "C" __global__ void __launch_bounds__(128) plain_unpack(const u8* weights, u16* out, int first_row, int rows,
                                                               int cols) {
    __shared__ uint4 tile[LANES][PITCH / 8];
    const int quads = (cols + 3) / 4, strip = first_row / LANES + blockIdx.y, first_col = blockIdx.x * TILE;
    const int width = min(TILE, cols - first_col);
    const u8* from = weights + ((size_t)strip * quads * 4 + first_col) * COLUMN_NBYTES;
    for (int i = threadIdx.x; i < width * PARTS; i += THREADS) {
        u32 words[4];
        load_words(words, from + 16 * i);
        for (int r = 0; r < ROWS; r++) {
            u16 h;
            if (NUMBER == N_F16)
                h = (u16)(r % 2 ? words[r / 2 % 4] >> 16 : words[r / 2 % 4] & 0xffffu);
            else
                h = half_of_weight(plain_at(words, r));
            ((u16*)tile[i % PARTS * ROWS + r])[i / PARTS] = h;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < LANES; i += THREADS / 32) {
        const int row = strip * LANES + i, lane = threadIdx.x % 32;
        if (row >= rows) break;
        u16* to = out + (size_t)(row - first_row) * cols + first_col;
        if (cols % 8 == 0) {
            for (int j = 8 * lane; j < width; j += 256) *(uint4*)(to + j) = tile[i][j / 8];
        } else {
            for (int j = lane; j < width; j += 32) to[j] = ((const u16*)tile[i])[j];
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
