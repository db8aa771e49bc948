// How the threads of a block, which has at most MOST_WARPS warps, join their sums of one strip's rows, and what is
// made of them.
#pragma once
#include "common.cuh"

#define MOST_THREADS (32 * MOST_WARPS)

// Sums of the first LEFT values over the lanes that have the same rows: those whose numbers are alike below SHARE. At
// each step a lane hands half of its sums over and takes up the other half, so that about LEFT shuffles do. Afterwards
// a lane has LEFT * SHARE / 32 sums, at least one, from number `first` on; where several have the same ones, `writes`
// is true in one.
template <int LEFT, int BIT, int SHARE, int N>
__device__ __forceinline__ void reduce(float (&acc)[N], int lane, int& first, bool& writes) {
    if constexpr (BIT >= SHARE) {
        const bool upper = lane & BIT;
        if constexpr (LEFT > 1) {
#pragma unroll
            for (int i = 0; i < LEFT / 2; i++) {
                const float given = upper ? acc[i] : acc[i + LEFT / 2], kept = upper ? acc[i + LEFT / 2] : acc[i];
                acc[i] = kept + __shfl_xor_sync(FULL_WARP, given, BIT);
            }
            if (upper) first += LEFT / 2;
        } else {
            acc[0] += __shfl_xor_sync(FULL_WARP, acc[0], BIT);
            writes = writes && !upper;
        }
        reduce<(LEFT > 1 ? LEFT / 2 : 1), BIT / 2, SHARE>(acc, lane, first, writes);
    }
}

__device__ __forceinline__ float extra_of(const float* bias, const float* residual, int row, int token, int rows) {
    return (bias ? bias[row] : 0.0f) + (residual ? residual[(size_t)token * rows + row] : 0.0f);
}

// acc: sums of R rows (from R * (lane % SHARE) of the strip on) of T tokens each, in every thread of a block of at most
// MOST_WARPS warps. out (n, rows) = *factor (in shared memory) * their sums over the block (+ bias (rows,)) (+ residual
// (n, rows)). `residual` may be `out`.
template <int T, int R, int SHARE>
__device__ __forceinline__ void finish(float (&acc)[T * R], int strip, int first_token, int rows, int n,
                                       const float* factor, const float* bias, const float* residual, float* out) {
    __shared__ float partial[MOST_WARPS][T * R * SHARE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int i0 = threadIdx.x, row0 = strip * (R * SHARE) + i0 % (R * SHARE), token0 = first_token + i0 / (R * SHARE);
    float extra0 = 0.0f;  // asked for now, so that it is there when the sums are
    if (i0 < T * R * SHARE && row0 < rows && token0 < n) extra0 = extra_of(bias, residual, row0, token0, rows);
    constexpr int left = T * R * SHARE > 32 ? T * R * SHARE / 32 : 1;
    int first = 0;
    bool writes = true;
    reduce<T * R, 16, SHARE>(acc, lane, first, writes);
    if (writes) {
#pragma unroll
        for (int i = 0; i < left; i++) {
            const int token = (first + i) / R, row = R * (lane % SHARE) + (first + i) % R;
            partial[warp][token * (R * SHARE) + row] = acc[i];
        }
    }
    __syncthreads();
    for (int i = i0; i < T * R * SHARE; i += blockDim.x) {
        const int row = strip * (R * SHARE) + i % (R * SHARE), token = first_token + i / (R * SHARE);
        if (row >= rows || token >= n) continue;
        float sum = 0.0f;
        for (int w = 0; w < warps; w++) sum += partial[w][i];
        const float extra = i == i0 ? extra0 : extra_of(bias, residual, row, token, rows);
        out[(size_t)token * rows + row] = sum * *factor + extra;
    }
}
