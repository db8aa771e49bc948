// Attention of several tokens in one launch: softmax(scale q k) v, scores on the chip (FlashAttention-2, arXiv 2307.08691).
//
// Compiled for a HEAD_DIM (a multiple of 16, at most 256), WARPS of a block, M_TILES of 16 rows a warp, KEYS positions a
// tile (a multiple of 16); attention.py chooses. q and k are rotated, keys and values stored (rope_append, prompt.cu).
//
//   rows       of a key head: tokens * group, a token's queries side by side, so that those that read the same keys share
//              them. A block takes ROWS (128), a warp 16 M_TILES. Grid (n_kv_heads, tiles of rows, spans): the last rows,
//              who see most, come first.
//   queries    halves in registers, each row over a power of two of its own, with the scale and log2 e in them: large
//              queries do not overflow, small ones keep their digits. The power comes back with the scores, in float32.
//   positions  a block walks over tiles of KEYS up to its last row's own. While one tile is read in shared memory, the next
//              one's keys and values are on their way to another place there (cp.async; on sm_75 through registers): one
//              barrier a tile. A warp leaves out what is behind its own rows, and masks only where a tile straddles them.
//   weights    2^(score - largest so far) as halves, 1 at most: halves of D's layout are A's of the next product. Their
//              sums are a product with ones: of what was rounded, exact, and cheaper than converting and adding. What was
//              summed before is scaled only if some row of the warp has a new largest score.
//   spans      where there are fewer blocks than multiprocessors, blocks share the positions, as in Flash-Decoding, and
//              `join_spans` joins what they leave.
//
// Rows of shared memory are what ldmatrix reads without bank conflicts: chunks of 16 bytes exchanged by the row's number
// (HEAD_DIM a multiple of 64), or rows 16 bytes longer. NaN or infinity of a query stays in its row; of a value, it
// reaches earlier tokens of its tile too, as 0 * NaN does by the other way (prompt.cu).
//
// Bytes and operations, 2,048 tokens of 32 heads of 128, 8 key heads, a layer: 34 GFLOP, 1.5 % of them for nothing; 67 MB
// of queries and results; 16,640 times 128 rows by 32 positions, 126 for each of an H100's 132 multiprocessors. Each reads
// 16 KB, 272 MB in all, from the second-level cache (about 5.5 TB/s: 49 us), and is 528 mma (about 430 cycles at 0.62 of
// wgmma's rate, what mma.sync gets on Hopper), 128 ldmatrix (512 cycles, 128 bytes each), 2,100 instructions in all (530),
// 4,096 exponentials (256): 45 us at 1.75 GHz if one of these is all that counts. Expected is half of that speed, 0.1 to
// 0.15 ms: 3 to 5 ms for 32 layers, where the way with the scores in memory takes about 12 (prompt.cu).
//
// Registers on sm_90 (sm_75): 64: 224 (252), 80: 223 (232), 96: 246 (254), 128: 255 and 48 bytes of stack, 15 loads a tile
// (175: 8 warps of 16 rows), 192: 251 (255), 256: 255 (255 and 48 bytes). Blocks a multiprocessor: 2 of 4 warps, 1 of 8.
// Static shared memory: 32 KB for 64, 128 and 256, 22.5 and 26.6 for 80 and 96, 48, which is the most, for 192.
//
// Considered: 16 rows a warp for heads of 128 read twice as much from shared memory, 1,024 cycles: what limits them on an
// H100 (Turing takes them, whose registers do not suffice otherwise). Queries in shared memory: half as much again to
// read. Keys and values by turns in three slots: room for tiles of 64, but two barriers a tile. More than 48 KB, or wgmma
// and bulk copies, which Hopper would need for its full rate: other kernels for other devices. Nothing is measured on a
// device.
#include "mma.cuh"

#define THREADS (32 * WARPS)
#define WARP_ROWS (16 * M_TILES)
#define ROWS (WARP_ROWS * WARPS)
#define N_COLUMNS (HEAD_DIM / 16)  // of 16 dimensions
#define N_STEPS (KEYS / 16)        // of 16 positions
#define CHUNKS (HEAD_DIM / 8)      // of 16 bytes, in a key
#define SWIZZLED (HEAD_DIM % 64 == 0)
#define ROW_BYTES (2 * HEAD_DIM + (SWIZZLED ? 0 : 16))
#define SLOT_BYTES (KEYS * ROW_BYTES)
#define COPIES ((KEYS * CHUNKS + THREADS - 1) / THREADS)  // a thread's, of a tile
#define PART (HEAD_DIM + 2)
#define LOG2_E 1.44269504f
#define MINUS_INFINITY __uint_as_float(0xff800000u)
#define ONES 0x3c003c00u  // two halves
#ifdef TURING
#define BY_REGISTERS true
#else
#define BY_REGISTERS false
#endif

// Where a chunk of a key lies in a slot: the eight rows of a matrix of ldmatrix in all 32 banks.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * ROW_BYTES + ((SWIZZLED ? chunk ^ (row & 7) : chunk) << 4);
}
// How far chunk 2 i + c lies from the row, where x = place(row, c) - row * ROW_BYTES for c = 0 or 1.
__device__ __forceinline__ int column(int i, int x) {
    return SWIZZLED ? ((32 * (i % 4)) ^ x) + 128 * (i / 4) : 32 * i + x;
}

// A thread's chunks of a tile, and where they lie. EVEN: its chunks are one above the other, so that one address is known
// from another.
#define FIRST_ROW ((int)threadIdx.x / CHUNKS)
#define FIRST_CHUNK ((int)threadIdx.x % CHUNKS)
#define ROWS_A_COPY (THREADS / CHUNKS)
#define EVEN (THREADS % CHUNKS == 0 && (!SWIZZLED || ROWS_A_COPY % 8 == 0))
__device__ __forceinline__ int row_of(int i) {
    return EVEN ? FIRST_ROW + i * ROWS_A_COPY : ((int)threadIdx.x + i * THREADS) / CHUNKS;
}
__device__ __forceinline__ int chunk_of(int i) { return EVEN ? FIRST_CHUNK : ((int)threadIdx.x + i * THREADS) % CHUNKS; }
__device__ __forceinline__ int place_of(int i) {
    return EVEN ? place(FIRST_ROW, FIRST_CHUNK) + i * ROWS_A_COPY * ROW_BYTES : place(row_of(i), chunk_of(i));
}

// Keys or values of a tile, on their way from global to shared memory. Positions behind `last` become zeros: their
// weights are zero, but zero times what happens to lie there need not be.
struct Tile {
#ifdef TURING
    uint4 held[COPIES];
#endif

    __device__ __forceinline__ void begin(const void* room, int slot, const u16* from, int first, int last) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            if (row_of(i) >= KEYS) break;
            const bool there = first + row_of(i) <= last;
            const u16* const at = from + (size_t)(there ? first + row_of(i) : last) * HEAD_DIM + 8 * chunk_of(i);
#ifdef TURING
            held[i].x = held[i].y = held[i].z = held[i].w = 0;
            if (there) held[i] = *(const uint4*)at;
#else
            copy_async(shared_address(room) + slot + place_of(i), at, there);
#endif
        }
    }

    // What is left for this thread to do where `begin` only asked for the numbers.
    __device__ __forceinline__ void finish(void* room, int slot) const {
#ifdef TURING
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            if (row_of(i) < KEYS) *(uint4*)((char*)room + slot + place_of(i)) = held[i];
        }
#endif
    }
};

// What all threads of the block began is there, and they are done with what they read before. All threads come.
__device__ __forceinline__ void arrived() {
#ifndef TURING
    copies_commit();
    copies_wait<0>();
#endif
    __syncthreads();
}

// A row of queries, times `scale`, as halves over a power of two, which is returned. A lane's part: see mma.cuh.
__device__ __forceinline__ float load_query(u32 (&a)[N_COLUMNS][4], int half, const float* row, float scale) {
    const float* const at = row + 2 * (threadIdx.x % 4);
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * N_COLUMNS; i++) {
        const float2 v = *(const float2*)(at + 8 * i);
        top = fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y)));
    }
    top *= fabsf(scale);
    for (int k = 1; k <= 2; k *= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, k));
    const float factor = __uint_as_float(max(__float_as_uint(top) & 0x7f800000u, 0x00800000u)), down = 1.0f / factor;
#pragma unroll
    for (int i = 0; i < 2 * N_COLUMNS; i++) {
        const float2 v = *(const float2*)(at + 8 * i);
        a[i / 2][half + 2 * (i % 2)] = pack_halves(v.x * scale * down, v.y * scale * down);
    }
    return factor;
}

// The row of queries that half h of tile m of a warp has in this lane; behind the last row, that one again.
__device__ __forceinline__ int own_row(int warp_row, int rows, int m, int h) {
    return min(warp_row + 16 * m + 8 * h + (int)threadIdx.x % 32 / 4, rows - 1);
}

// Scores of a warp's rows and a tile's keys.
__device__ __forceinline__ void tile_scores(float (&s)[M_TILES][2 * N_STEPS][4], const u32 (&query)[M_TILES][N_COLUMNS][4],
                                            Shared slot) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, x = place(row, lane / 8 % 2) - row * ROW_BYTES;
    const Shared at = slot + row * ROW_BYTES;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < 2 * N_STEPS; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < N_COLUMNS; i++) {
#pragma unroll
        for (int n = 0; n < N_STEPS; n++) {
            u32 b[4];
            ldmatrix(b, at + column(i, x) + 16 * n * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mma(s[m][2 * n], query[m][i], b[0], b[1]);
                mma(s[m][2 * n + 1], query[m][i], b[2], b[3]);
            }
        }
    }
}

// out += weights times a tile's values; sums += the weights' sums, by a product with ones.
__device__ __forceinline__ void add_values(float (&out)[M_TILES][2 * N_COLUMNS][4], float (&sums)[M_TILES][2],
                                           const u32 (&weights)[M_TILES][N_STEPS][4], Shared slot) {
    const int lane = threadIdx.x % 32, row = lane % 16, x = place(row, lane / 16) - row * ROW_BYTES;
    const Shared at = slot + row * ROW_BYTES;
    float here[M_TILES][4];  // this tile's sums, the same in all columns
#pragma unroll
    for (int m = 0; m < M_TILES; m++) here[m][0] = here[m][1] = here[m][2] = here[m][3] = 0.0f;
#pragma unroll
    for (int n = 0; n < N_STEPS; n++) {
#pragma unroll
        for (int m = 0; m < M_TILES; m++) mma(here[m], weights[m][n], ONES, ONES);
#pragma unroll
        for (int i = 0; i < N_COLUMNS; i++) {
            u32 b[4];
            ldmatrix_trans(b, at + column(i, x) + 16 * n * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mma(out[m][2 * i], weights[m][n], b[0], b[1]);
                mma(out[m][2 * i + 1], weights[m][n], b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M_TILES; m++) sums[m][0] += here[m][0], sums[m][1] += here[m][2];
}

// Scores become minus infinity where a row's position is before that of the key; `first`: of the tile's positions, as
// counted from the first token's.
__device__ __forceinline__ void mask(float (&s)[M_TILES][2 * N_STEPS][4], int first, int row, int rows, int group) {
    const int column = first + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int own = own_row(row, rows, m, h) / group;
#pragma unroll
            for (int n = 0; n < 2 * N_STEPS; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (column + 8 * n + e > own) s[m][n][2 * h + e] = MINUS_INFINITY;
                }
            }
        }
    }
}

// Scores become weights, 2^(factor (score - largest so far)), as halves; where the largest is a new one, what was summed
// before is scaled down. A row's scores are in four lanes.
__device__ __forceinline__ void tile_softmax(u32 (&weights)[M_TILES][N_STEPS][4], float (&out)[M_TILES][2 * N_COLUMNS][4],
                                             float (&sums)[M_TILES][2], float (&tops)[M_TILES][2],
                                             const float (&s)[M_TILES][2 * N_STEPS][4],
                                             const float (&factors)[M_TILES][2]) {
    float bases[M_TILES][2], scales[M_TILES][2];
    bool changed = false;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = tops[m][h];
#pragma unroll
            for (int n = 0; n < 2 * N_STEPS; n++) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            for (int k = 1; k <= 2; k *= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, k));
            // nothing but what is masked so far: 2^(-infinity - 0)
            bases[m][h] = top == MINUS_INFINITY ? 0.0f : top * factors[m][h];
            scales[m][h] = exp2_fast(tops[m][h] * factors[m][h] - bases[m][h]);
            changed |= top != tops[m][h];
            tops[m][h] = top;
        }
    }
    if (__any_sync(FULL_WARP, changed)) {  // the whole warp
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                sums[m][h] *= scales[m][h];
#pragma unroll
                for (int i = 0; i < 2 * N_COLUMNS; i++) {
                    out[m][i][2 * h] *= scales[m][h], out[m][i][2 * h + 1] *= scales[m][h];
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < 2 * N_STEPS; n++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float low = exp2_fast(s[m][n][2 * h] * factors[m][h] - bases[m][h]);
                const float high = exp2_fast(s[m][n][2 * h + 1] * factors[m][h] - bases[m][h]);
                weights[m][n / 2][h + 2 * (n % 2)] = pack_halves(low, high);
            }
        }
    }
}

// q (tokens, n_kv_heads * group, HEAD_DIM) float32, rotated; keys and values (n_kv_heads, positions, HEAD_DIM) float16 of
// one layer; the first token stands at *start. out: the shape of q; parts: null where gridDim.z is 1, else float32
// (gridDim.z, n_kv_heads, tokens * group, HEAD_DIM + 2), and out is not written. Grid (n_kv_heads, tiles of ROWS rows,
// spans of positions).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
flash(const float* q, const u16* keys, const u16* values, const int* start, float* out, float* parts, int tokens,
      int group, int positions, float scale) {
    __shared__ uint4 room[4 * SLOT_BYTES / 16];
    const int head = blockIdx.x, heads = gridDim.x, rows = tokens * group;
    const int block_row = (gridDim.y - 1 - blockIdx.y) * ROWS, row = block_row + threadIdx.x / 32 * WARP_ROWS;
    const int begin = *start, last = begin + (min(block_row + ROWS, rows) - 1) / group;
    const int span = (last / KEYS + (int)gridDim.z) / (int)gridDim.z;  // tiles, rounded up
    const int first_tile = blockIdx.z * span, end_tile = min(first_tile + span, last / KEYS + 1);
    const int warp_first = begin + min(row, rows - 1) / group, warp_last = begin + (min(row + WARP_ROWS, rows) - 1) / group;
    keys += (size_t)head * positions * HEAD_DIM;
    values += (size_t)head * positions * HEAD_DIM;

    // Two pairs of slots, for keys and values, take turns: what is read, and what is asked for.
    int here = 0, there = 2 * SLOT_BYTES;
    Tile tile;
    if (first_tile < end_tile) {
        tile.begin(room, here, keys, first_tile * KEYS, last);
        tile.finish(room, here);
        tile.begin(room, here + SLOT_BYTES, values, first_tile * KEYS, last);
        tile.finish(room, here + SLOT_BYTES);
    }
    u32 query[M_TILES][N_COLUMNS][4];
    float acc[M_TILES][2 * N_COLUMNS][4], sums[M_TILES][2], tops[M_TILES][2], factors[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = own_row(row, rows, m, h), token = r / group;
            const size_t at = (size_t)token * heads * group + head * group + r % group;
            factors[m][h] = load_query(query[m], h, q + at * HEAD_DIM, scale * LOG2_E);
            tops[m][h] = MINUS_INFINITY, sums[m][h] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 2 * N_COLUMNS; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.0f;
    }
    for (int k = first_tile; k < end_tile; k++) {
        const bool more = k + 1 < end_tile, busy = row < rows && k * KEYS <= warp_last;  // the whole warp
        u32 weights[M_TILES][N_STEPS][4];
        arrived();
        if (more) tile.begin(room, there, keys, (k + 1) * KEYS, last);
        if (more && !BY_REGISTERS) tile.begin(room, there + SLOT_BYTES, values, (k + 1) * KEYS, last);
        if (busy) {
            float s[M_TILES][2 * N_STEPS][4];
            tile_scores(s, query, shared_address(room) + here);
            if (k * KEYS + KEYS - 1 > warp_first) mask(s, k * KEYS - begin, row, rows, group);
            tile_softmax(weights, acc, sums, tops, s, factors);
        }
        if (more && BY_REGISTERS) {  // which suffice for one at a time
            tile.finish(room, there);
            tile.begin(room, there + SLOT_BYTES, values, (k + 1) * KEYS, last);
        }
        if (busy) add_values(acc, sums, weights, shared_address(room) + here + SLOT_BYTES);
        if (more && BY_REGISTERS) tile.finish(room, there + SLOT_BYTES);
        const int done = here;
        here = there, there = done;
    }
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = row + 16 * m + 8 * h + (int)threadIdx.x % 32 / 4;
            if (r >= rows) continue;
            const float sum = sums[m][h];
            const bool whole = gridDim.z == 1;
            const float over = whole ? 1.0f / sum : 1.0f;
            float* const part = parts + (((size_t)blockIdx.z * heads + head) * rows + r) * PART;
            float* const result = out + ((size_t)(r / group * heads + head) * group + r % group) * HEAD_DIM;
            float* const to = (whole ? result : part) + 2 * (threadIdx.x % 4);
#pragma unroll
            for (int i = 0; i < 2 * N_COLUMNS; i++) {
                *(float2*)(to + 8 * i) = make_float2(acc[m][i][2 * h] * over, acc[m][i][2 * h + 1] * over);
            }
            if (!whole && threadIdx.x % 4 == 0) {
                part[HEAD_DIM] = tops[m][h] * factors[m][h], part[HEAD_DIM + 1] = sum;
            }
        }
    }
}

// What the spans of positions left in `parts` (splits, n_kv_heads, rows = tokens * group, HEAD_DIM + 2) -> out (tokens,
// n_kv_heads * group, HEAD_DIM). A warp a row: grid (rows / 4, rounded up, n_kv_heads).
extern "C" __global__ void __launch_bounds__(128)
join_spans(const float* parts, float* out, int splits, int rows, int group) {
    const int lane = threadIdx.x % 32, row = 4 * blockIdx.x + threadIdx.x / 32, head = blockIdx.y, heads = gridDim.y;
    if (row >= rows) return;  // the whole warp
    const size_t step = (size_t)heads * rows * PART;
    const float* const from = parts + ((size_t)head * rows + row) * PART;
    float top = MINUS_INFINITY, total = 0.0f;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, from[s * step + HEAD_DIM]);
    top = warp_max(top);
    for (int s = lane; s < splits; s += 32) total += exp2f(from[s * step + HEAD_DIM] - top) * from[s * step + HEAD_DIM + 1];
    const float over = 1.0f / warp_sum(total);
    float* const to = out + ((size_t)(row / group * heads + head) * group + row % group) * HEAD_DIM;
    for (int d = 2 * lane; d < HEAD_DIM; d += 64) {
        float x = 0.0f, y = 0.0f;
        for (int s = 0; s < splits; s++) {
            const float weight = exp2f(from[s * step + HEAD_DIM] - top);
            const float2 v = *(const float2*)(from + s * step + d);
            x += weight * v.x, y += weight * v.y;
        }
        *(float2*)(to + d) = make_float2(x * over, y * over);
    }
}
