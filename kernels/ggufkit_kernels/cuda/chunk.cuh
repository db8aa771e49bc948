// A chunk of the int8 inputs that a matvec reads, made by the warp that has its numbers: see inputs.cu for what it is.
#pragma once
#include "common.cuh"

// A warp's 32 numbers, one a lane, as chunk `chunk` of int8 inputs.
__device__ __forceinline__ void quantize_lanes(float x, int chunk, i8* q, uint2* a) {
    const int lane = threadIdx.x % 32;
    u32 largest = __float_as_uint(x) & 0x7fffffffu;
    for (int k = 16; k > 0; k >>= 1) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, k));
    const bool finite = largest < 0x7f800000u;
    const float most = __uint_as_float(largest);
    const float inverse = finite && most > 1e-30f ? __fdiv_rn(127.0f, most) : 0.0f;
    const float scale = finite ? __fdiv_rn(most, 127.0f) : __uint_as_float(0x7fc00000u);
    const int code = finite ? __float2int_rn(__fmul_rn(x, inverse)) : 0;
    int half = code;
    for (int k = 8; k > 0; k >>= 1) half += __shfl_xor_sync(FULL_WARP, half, k);
    const int all = half + __shfl_xor_sync(FULL_WARP, half, 16);
    q[32 * chunk + lane] = (i8)code;
    if (lane == 0) a[chunk] = make_uint2(__float_as_uint(scale), (u32)all << 16 | ((u32)half & 0xffffu));
}
