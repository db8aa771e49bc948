// Attention of one token over the cache: norms of q and k, rotation, storing k and v, softmax(scale q k) v; one launch.
//
// Compiled for a HEAD_DIM (even, at most 256) and a GROUP (queries that read one key head, at most 16).
//
//   keys, values   float16 (n_kv_heads, positions, HEAD_DIM), of one layer
//   grid           (n_kv_heads * shared, splits): more than 16 queries of a key head go to `shared` blocks. A block takes
//                  a span of positions for all queries of a key head, so that keys and values are read once. The span is length / splits, rounded up to tiles of TILE positions: the
//                  grid does not depend on the length, so that a captured graph can be replayed, and blocks beyond the
//                  length leave at once. The span that holds the own position also stores k and v there.
//   a tile         scores: LANES_PER_KEY lanes share a key, 16 bytes of it at a time, PER_LANE loads each, and two keys
//                  at a time; softmax: a warp a query, online (Milakov and Gimelshein, arXiv 1805.02867); values:
//                  a thread holds 8 dimensions of all queries and goes over every (THREADS / N_VECTORS)-th position.
//                  The first 8 loads of values are issued before the scores are computed.
//   parts          float32 (n_kv_heads * shared, splits, GROUP * (HEAD_DIM + 2)): weighted values, maxima, sums of a
//                  span. The last block of a key head to be done (an atomic ticket, set back for the next launch) joins
//                  them, as Flash-Decoding's second kernel does. Up to TILE positions there is nothing to join.
//   results        gathered in shared memory, from where they go as float32, as int8 inputs of the output matrix (chunks
//                  of 32; a block's queries have to be whole chunks), or as both: 4,096 numbers are then no launch of
//                  their own, which would be waited for and wait.
//
// Bytes and operations. A position costs 4 HEAD_DIM bytes a key head; 8 heads of 128 at 8,192 positions are 33.5 MB a
// layer, 10 us on an H100 (3.35 TB/s). With 4 queries a key head a position costs 1,024 fma and 256 conversions to
// float: 8 + 4 cycles of a multiprocessor, for 62 * 8 positions each: 6,000 cycles, 3.5 us. Bytes in flight: a block
// issues 16 loads of 16 bytes a thread, 64 KB; a multiprocessor needs about 18 KB (700 ns of 25 GB/s).
// 4 queries of 128 take 128 registers on sm_90 (two blocks a multiprocessor), 142 on sm_75; ptxas spills 4 bytes for
// them, and 52 for 16 queries of 256 (sm_90).
// Not measured on a device: TILE, THREADS, the splits (ops.py: two blocks a multiprocessor).
#include "chunk.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define TILE 128        // positions; also the most splits there may be
#define AHEAD 8         // loads of values in flight
#define TILES_ASKED_FOR 2  // that the second-level cache is asked for before q, k and v are there
#define LOG2_E 1.44269504f

#if HEAD_DIM % 8 == 0
#define VEC 8
typedef uint4 Vector;
#else
#define VEC 2
typedef u32 Vector;
#endif
#define N_VECTORS (HEAD_DIM / VEC)
#define LANES_PER_KEY \
    (N_VECTORS <= 4 ? 1 : N_VECTORS <= 8 ? 2 : N_VECTORS <= 16 ? 4 : N_VECTORS <= 32 ? 8 : N_VECTORS <= 64 ? 16 : 32)
#define PER_LANE ((N_VECTORS + LANES_PER_KEY - 1) / LANES_PER_KEY)
#define PADDED (PER_LANE * LANES_PER_KEY * VEC)
#define KEYS_A_STEP (THREADS / LANES_PER_KEY)
#define SHARES (THREADS / N_VECTORS)  // threads that hold the same dimensions
#define PER_SHARE ((TILE + SHARES - 1) / SHARES)
#define PART (GROUP * (HEAD_DIM + 2))
#define HEADS_A_PASS 2
#define N_CHUNKS (GROUP * HEAD_DIM / 32)  // of int8 inputs, where they are whole

__device__ __forceinline__ void to_floats(const uint4& v, float* out) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) {
        out[2 * i] = half_to_float((u16)(words[i] & 0xffff));
        out[2 * i + 1] = half_to_float((u16)(words[i] >> 16));
    }
}
__device__ __forceinline__ void to_floats(const u32& v, float* out) {
    out[0] = half_to_float((u16)(v & 0xffff));
    out[1] = half_to_float((u16)(v >> 16));
}
__device__ __forceinline__ void set_zero(uint4& v) { v.x = v.y = v.z = v.w = 0; }
__device__ __forceinline__ void set_zero(u32& v) { v = 0; }

// N floats of shared memory, by as few loads as N (and so the alignment of rows of N) allows.
template <int N>
__device__ __forceinline__ void read_floats(const float* at, float* out) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 v = *(const float4*)(at + i);
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = at[i];
    }
}

// What another block wrote in this launch: past the L1 cache.
__device__ __forceinline__ float2 load_fresh(const float* at) {
    float2 v;
#ifdef EMULATED
    v.x = at[0], v.y = at[1];
#else
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(at));
#endif
    return v;
}

// One row of HEAD_DIM floats, normed by a warp, in the order of rmsnorm_short (elementwise.cu).
__device__ void norm_row(float* x, const float* norm, float eps, int lane) {
    float total = 0.0f;
    for (int i = lane; i < HEAD_DIM; i += 32) total += x[i] * x[i];
    const float factor = 1.0f / sqrtf(warp_sum(total) / (float)HEAD_DIM + eps);
    for (int i = lane; i < HEAD_DIM; i += 32) x[i] = x[i] * factor * norm[i];
}

// The joined result of all parts of a key head, in shared memory. All threads come.
__device__ void join(const float* parts, int active, float (*weights)[GROUP], float* inverse, float* made) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int g = warp; g < GROUP; g += WARPS) {
        float top = __uint_as_float(0xff800000u), total = 0.0f;  // -infinity
        for (int s = lane; s < active; s += 32) {
            top = fmaxf(top, load_fresh(parts + (size_t)s * PART + GROUP * HEAD_DIM + 2 * g).x);
        }
        top = warp_max(top);
        for (int s = lane; s < active; s += 32) {
            const float2 both = load_fresh(parts + (size_t)s * PART + GROUP * HEAD_DIM + 2 * g);
            const float weight = exp2f(both.x - top);
            weights[s][g] = weight;
            total += weight * both.y;
        }
        total = warp_sum(total);
        if (lane == 0) inverse[g] = 1.0f / total;
    }
    __syncthreads();
    for (int i = 2 * threadIdx.x; i < GROUP * HEAD_DIM; i += 2 * THREADS) {
        const int g = i / HEAD_DIM;
        float x = 0.0f, y = 0.0f;
#pragma unroll 8
        for (int s = 0; s < active; s++) {
            const float2 v = load_fresh(parts + (size_t)s * PART + i);
            x += weights[s][g] * v.x, y += weights[s][g] * v.y;
        }
        made[i] = x * inverse[g], made[i + 1] = y * inverse[g];
    }
}

// A block's results: as float32 `out` (GROUP * HEAD_DIM), and as int8 q with a; either may be null. All threads come.
__device__ __forceinline__ void deliver(const float* made, float* out, i8* q, uint2* a) {
    __syncthreads();
    if (out != nullptr) {
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) out[i] = made[i];
    }
    if (q != nullptr) {
        for (int i = threadIdx.x / 32; i < N_CHUNKS; i += WARPS) quantize_lanes(made[32 * i + threadIdx.x % 32], i, q, a);
    }
}

#define SHARE (threadIdx.x / N_VECTORS)   // which of the threads with the same dimensions
#define COLUMN (threadIdx.x % N_VECTORS)  // which vector of them

// The queries of a block and, for the span that holds the own position, its key: normed, rotated, queries scaled; key and
// value go to the cache. All threads come.
__device__ void load_queries(const float* q, const float* k, const float* v, const float* q_norm, const float* k_norm,
                             const float* angles, float (*query)[PADDED], u16* key_to, u16* value_to, bool owner,
                             int pairs, int interleaved, float eps, float scale) {
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, rows = owner ? GROUP + 1 : GROUP;
    for (int i = tid; i < (GROUP + 1) * PADDED; i += THREADS) {
        const int g = i / PADDED, d = i % PADDED;
        float x = 0.0f;
        if (d < HEAD_DIM) x = g < GROUP ? q[g * HEAD_DIM + d] : k[d];
        query[g][d] = x;
    }
    __syncthreads();
    if (q_norm != nullptr) {
        for (int g = warp; g < rows; g += WARPS) norm_row(query[g], g < GROUP ? q_norm : k_norm, eps, lane);
    }
    __syncthreads();
    for (int i = tid; i < rows * pairs; i += THREADS) {
        const int g = i / pairs, pair = i % pairs;
        const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : first + pairs;
        const float cosine = angles[pair], sine = angles[pairs + pair], a = query[g][first], b = query[g][second];
        query[g][first] = a * cosine - b * sine;
        query[g][second] = a * sine + b * cosine;
    }
    __syncthreads();
    if (owner) {
        for (int d = tid; d < HEAD_DIM; d += THREADS) {
            key_to[d] = float_to_half(query[GROUP][d]);
            value_to[d] = float_to_half(v[d]);
        }
    }
    for (int i = tid; i < GROUP * PADDED; i += THREADS) query[i / PADDED][i % PADDED] *= scale * LOG2_E;
}

// AHEAD of a thread's values of a tile at `values`, from its `first`-th position on, of `count` positions.
__device__ __forceinline__ void load_values(Vector (&ahead)[AHEAD], const u16* values, int first, int count) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int p = SHARE + (first + i) * SHARES;
        set_zero(ahead[i]);
        if (SHARE < SHARES && p < count) ahead[i] = *(const Vector*)(values + (size_t)p * HEAD_DIM + COLUMN * VEC);
    }
}

// The second-level cache shall have rows first … last - 1 of keys or values.
__device__ __forceinline__ void ask_for_rows(const u16* from, int first, int last) {
    const int bytes = 2 * HEAD_DIM * (last - first);
    const u8* const at = (const u8*)(from + (size_t)first * HEAD_DIM);
    for (int i = 128 * threadIdx.x; i < bytes; i += 128 * THREADS) ask_for(at + i);
}

// Scores of a tile at `keys` (count, HEAD_DIM). Which key: threadIdx.x / LANES_PER_KEY; which of its vectors: sub,
// sub + LANES_PER_KEY, … All threads come.
__device__ __forceinline__ void tile_scores(const u16* keys, int count, const float (*query)[PADDED],
                                            float (*scores)[GROUP]) {
    const int sub = threadIdx.x % LANES_PER_KEY, own = threadIdx.x / LANES_PER_KEY;
    for (int p = own; p - own < count; p += 2 * KEYS_A_STEP) {
        Vector held[2][PER_LANE];
        float dot[2][GROUP];
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                const int at = sub + i * LANES_PER_KEY, position = p + j * KEYS_A_STEP;
                set_zero(held[j][i]);
                if (at < N_VECTORS && position < count) {
                    held[j][i] = *(const Vector*)(keys + (size_t)position * HEAD_DIM + at * VEC);
                }
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) dot[j][g] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            float x[2][VEC];
            to_floats(held[0][i], x[0]);
            to_floats(held[1][i], x[1]);
            const int at = (sub + i * LANES_PER_KEY) * VEC;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float y[VEC];
                read_floats<VEC>(query[g] + at, y);
#pragma unroll
                for (int e = 0; e < VEC; e++) dot[0][g] += y[e] * x[0][e], dot[1][g] += y[e] * x[1][e];
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                for (int m = LANES_PER_KEY / 2; m > 0; m >>= 1) dot[j][g] += __shfl_xor_sync(FULL_WARP, dot[j][g], m);
                const int position = p + j * KEYS_A_STEP;
                if (sub == 0 && position < count) scores[position][g] = dot[j][g];
            }
        }
    }
}

// Scores become exp2(score - maximum); maxima, sums, and what earlier sums and values are multiplied with. All come.
__device__ __forceinline__ void tile_softmax(float (*scores)[GROUP], int count, float* maxima, float* sums,
                                             float* factors) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int g = warp; g < GROUP; g += WARPS) {
        const float before = maxima[g];
        float top = before, total = 0.0f;
        for (int p = lane; p < count; p += 32) top = fmaxf(top, scores[p][g]);
        top = warp_max(top);
        for (int p = lane; p < count; p += 32) {
            const float e = exp2f(scores[p][g] - top);
            scores[p][g] = e;
            total += e;
        }
        total = warp_sum(total);
        __syncwarp();  // all have read the maximum
        if (lane == 0) {
            const float factor = exp2f(before - top);
            maxima[g] = top, factors[g] = factor, sums[g] = sums[g] * factor + total;
        }
    }
}

// acc = acc * factor + weights * values of a tile; `ahead` has the first values.
__device__ __forceinline__ void add_values(float (&acc)[GROUP][VEC], Vector (&ahead)[AHEAD], const u16* values, int count,
                                           const float (*scores)[GROUP], const float* factors) {
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        for (int e = 0; e < VEC; e++) acc[g][e] *= factors[g];
    }
    for (int first = 0; first < PER_SHARE; first += AHEAD) {
        if (first) load_values(ahead, values, first, count);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int p = SHARE + (first + i) * SHARES;
            if (SHARE < SHARES && p < count) {
                float x[VEC], weights[GROUP];
                to_floats(ahead[i], x);
                read_floats<GROUP>(scores[p], weights);
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
#pragma unroll
                    for (int e = 0; e < VEC; e++) acc[g][e] += weights[g] * x[e];
                }
            }
        }
    }
}

// The sum of acc over the shares, HEADS_A_PASS queries at a time: to `part`, or over the sums to `made` where the span is
// the only one. All threads come.
__device__ __forceinline__ void leave(const float (&acc)[GROUP][VEC], float* pool, const float* sums, bool only,
                                      float* part, float* made) {
    const int tid = threadIdx.x;
#pragma unroll
    for (int g0 = 0; g0 < GROUP; g0 += HEADS_A_PASS) {
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS_A_PASS; h++) {
            if (SHARE < SHARES && g0 + h < GROUP) {
#pragma unroll
                for (int e = 0; e < VEC; e++) {
                    pool[(h * SHARES + SHARE) * HEAD_DIM + COLUMN * VEC + e] = acc[g0 + h < GROUP ? g0 + h : 0][e];
                }
            }
        }
        __syncthreads();
        for (int i = tid; i < HEADS_A_PASS * HEAD_DIM; i += THREADS) {
            const int h = i / HEAD_DIM, d = i % HEAD_DIM, g = g0 + h;
            if (g >= GROUP) continue;
            float total = 0.0f;
            for (int s = 0; s < SHARES; s++) total += pool[(h * SHARES + s) * HEAD_DIM + d];
            if (only) {
                made[g * HEAD_DIM + d] = total / sums[g];
            } else {
                part[g * HEAD_DIM + d] = total;
            }
        }
    }
}

// q (n_kv_heads * shared * GROUP, HEAD_DIM), k and v (n_kv_heads, HEAD_DIM), float32; q_norm, k_norm (HEAD_DIM,) or null; table
// (…, 2 pairs): cosines, then sines of a position; pairs 0: q and k are rotated already. tickets int, one a head of the
// grid, zero. Results: out, and next_q, next_a where GROUP * HEAD_DIM are whole chunks; either may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const float* q, const float* k, const float* v, const float* q_norm, const float* k_norm, const float* table,
       const int* start, u16* keys, u16* values, float* parts, int* tickets, float* out, i8* next_q, uint2* next_a,
       int positions, int shared, int pairs, int interleaved, float eps, float scale) {
    __shared__ float4 query_room[((GROUP + 1) * PADDED + 3) / 4], score_room[TILE * GROUP / 4];
    __shared__ float pool[HEADS_A_PASS * THREADS * VEC];
    __shared__ float maxima[GROUP], sums[GROUP], factors[GROUP];
    __shared__ int last;

    float(*const query)[PADDED] = (float(*)[PADDED])query_room;  // the last one is the key of the own position
    float* const made = (float*)query_room;                      // in the end
    float(*const scores)[GROUP] = (float(*)[GROUP])score_room;   // (TILE, GROUP)
    let_next_begin();
    const int head = blockIdx.x, key_head = head / shared, split = blockIdx.y, own = *start, length = own + 1;
    const int span = ((length + (int)gridDim.y - 1) / (int)gridDim.y + TILE - 1) / TILE * TILE;
    const int begin = split * span, end = min(begin + span, length), active = (length + span - 1) / span;
    if (begin >= length) return;  // all threads of the block, which makes room for the next kernel's
    const int tid = threadIdx.x;
    u16* const head_keys = keys + (size_t)key_head * positions * HEAD_DIM;
    u16* const head_values = values + (size_t)key_head * positions * HEAD_DIM;
    if (BEGINS_EARLY) {  // earlier tokens' keys and values are there, while q, k and v are still computed
        ask_for_rows(head_keys, begin, min(begin + TILES_ASKED_FOR * TILE, min(end, own)));
        ask_for_rows(head_values, begin, min(begin + TILES_ASKED_FOR * TILE, min(end, own)));
    }
    wait_for_earlier();
    const size_t at = (size_t)own * HEAD_DIM;
    load_queries(q + (size_t)head * GROUP * HEAD_DIM, k + key_head * HEAD_DIM, v + key_head * HEAD_DIM, q_norm, k_norm,
                 table + (size_t)own * 2 * pairs, query, head_keys + at, head_values + at, end == length, pairs,
                 interleaved, eps, scale);
    if (tid < GROUP) maxima[tid] = __uint_as_float(0xff800000u), sums[tid] = 0.0f;
    __syncthreads();  // what was written to the cache is seen by this block

    float acc[GROUP][VEC];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        for (int e = 0; e < VEC; e++) acc[g][e] = 0.0f;
    }
    for (int tile = begin; tile < end; tile += TILE) {
        const int count = min(TILE, end - tile);
        const u16* const values_here = head_values + (size_t)tile * HEAD_DIM;
        Vector ahead[AHEAD];
        load_values(ahead, values_here, 0, count);
        tile_scores(head_keys + (size_t)tile * HEAD_DIM, count, query, scores);
        __syncthreads();
        tile_softmax(scores, count, maxima, sums, factors);
        __syncthreads();
        add_values(acc, ahead, values_here, count, scores, factors);
        __syncthreads();  // before the next tile's scores
    }

    float* const part = parts + ((size_t)head * gridDim.y + split) * PART;
    if (out != nullptr) out += (size_t)head * GROUP * HEAD_DIM;
    if (next_q != nullptr) next_q += (size_t)head * N_CHUNKS * 32, next_a += (size_t)head * N_CHUNKS;
    leave(acc, pool, sums, active == 1, part, made);
    if (active > 1) {
        if (tid < GROUP) {
            part[GROUP * HEAD_DIM + 2 * tid] = maxima[tid], part[GROUP * HEAD_DIM + 2 * tid + 1] = sums[tid];
        }
        __syncthreads();
        if (tid == 0) {  // one thread's fences serve all: what came before a barrier comes along
            __threadfence();
            last = atomicAdd(tickets + head, 1) == active - 1;
            __threadfence();
        }
        __syncthreads();
        if (!last) return;  // all threads of the block
        join(parts + (size_t)head * gridDim.y * PART, active, scores, factors, made);
        if (tid == 0) tickets[head] = 0;
    }
    deliver(made, out, next_q, next_a);
}
