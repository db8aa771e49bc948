// The k largest logits of one token with their numbers, k from 1 (greedy) to 64, so that a token costs a small copy.
//
// A logit becomes a key of 64 bits: its bits ordered as numbers are, then the complement of its index. So keys are
// distinct, and the largest key is the largest logit and of equal ones the first. NaN counts as the largest, as in
// NumPy's argmax; -0 equals 0. Key 0 is no logit.
//
// Two launches: blocks of 256 threads take 2048 logits each and write their k largest keys in order; one block of 1024
// threads takes the k largest of all of these, at most 16384. A thread holds its keys in registers. The largest key of
// the block is found k times: each warp knows its own largest key, all of them meet in shared memory (two places that
// take turns: one barrier a round), and only the warp that had it looks again.
//
// 128,256 logits are 0.5 MB, 0.2 us at an H100's 3.35 TB/s; what counts are the launches and k rounds of about 0.1 to
// 0.2 us in each of them: some 5 us for k = 1, 20 for 40 (estimated, not measured). Taken instead of a radix sort, which
// would sort what nobody asks for.
#include "common.cuh"

__device__ __forceinline__ u64 key_of(float logit, int index) {
    const u32 bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    const u32 ordered = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (u32)~index;
}
__device__ __forceinline__ int index_of(u64 key) { return key == 0 ? -1 : (int)~(u32)key; }
__device__ __forceinline__ float logit_of(u64 key) {
    const u32 ordered = (u32)(key >> 32);
    if (key == 0) return __uint_as_float(0xff800000u);         // -infinity
    if (ordered == 0xffffffffu) return __uint_as_float(0x7fc00000u);  // NaN
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }
__device__ __forceinline__ u64 warp_largest(u64 key) {
    for (int k = 16; k > 0; k >>= 1) key = larger(key, __shfl_xor_sync(FULL_WARP, key, k));
    return key;
}

// The k largest of the keys of all threads, ITEMS each, in order: each of them is handed to `take(round, key)` in all
// threads. Uses its keys up.
template <int ITEMS, class Take>
__device__ __forceinline__ void select_largest(u64 (&keys)[ITEMS], int k, Take take) {
    __shared__ u64 of_warp[2][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u64 own = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) own = larger(own, keys[i]);
    u64 best = warp_largest(own);
    for (int round = 0; round < k; round++) {
        u64* place = of_warp[round & 1];
        if (lane == 0) place[warp] = best;
        __syncthreads();
        const u64 winner = warp_largest(lane < warps ? place[lane] : 0);
        take(round, winner);
        if (best == winner && winner != 0) {  // the whole warp, and no other
            if (own == winner) {
                own = 0;
#pragma unroll
                for (int i = 0; i < ITEMS; i++) {
                    if (keys[i] == winner) keys[i] = 0;
                    own = larger(own, keys[i]);
                }
            }
            best = warp_largest(own);
        }
    }
}

// parts (blocks, k) of logits (n,): a block of 256 threads for each 2048 of them.
extern "C" __global__ void __launch_bounds__(256) top_parts(const float* logits, u64* parts, int n, int k) {
    u64 keys[8];
    const int first = blockIdx.x * 2048 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at = first + 256 * i;
        keys[i] = at < n ? key_of(logits[at], at) : 0;
    }
    u64* out = parts + (size_t)blockIdx.x * k;
    select_largest(keys, k, [&](int round, u64 key) {
        if (threadIdx.x == 0) out[round] = key;
    });
}

// out (2, k): indices, then the bits of the logits, of the k largest of parts (n,), n at most 16384. Where there are
// fewer than k, index -1 and -infinity.
extern "C" __global__ void __launch_bounds__(1024) top_join(const u64* parts, int* out, int n, int k) {
    u64 keys[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int at = threadIdx.x + 1024 * i;
        keys[i] = at < n ? parts[at] : 0;
    }
    select_largest(keys, k, [&](int round, u64 key) {
        if (threadIdx.x == 0) {
            out[round] = index_of(key);
            out[k + round] = __float_as_int(logit_of(key));
        }
    });
}
