// What every kernel file needs: fixed-width names, half precision without the toolkit's headers, sums over a warp and
// over a block. Compiled as C++ for the CPU (tests), EMULATED is defined and the shim brings these instructions.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_WARP 0xffffffffu

// Programmatic dependent launch ("Programmatic Dependent Launch and Synchronization" of the CUDA programming guide,
// griddepcontrol of the PTX manual), of sm_90 on: a kernel of a token's graph may begin when all blocks of the one before
// it have begun. It asks for what nobody computes, its weights, and waits for the rest:
//   let_next_begin    by any thread, as soon as may be: the next kernel waits by itself for what it needs
//   wait_for_earlier  by all threads that read what a kernel wrote, or write anything, before they do. All kernels before
//                     are done then, since each of them waited too, and what they wrote is seen
// A kernel of a graph that does not wait is not begun early (loader.py: `waits`). Without an early begin both do nothing.
#if defined(EMULATED) || __CUDA_ARCH__ >= 900
#define BEGINS_EARLY 1
#else
#define BEGINS_EARLY 0
#endif
#if !defined(EMULATED) && BEGINS_EARLY
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void wait_for_earlier() {}
#endif

// The second-level cache shall have a line of 128 bytes. Nobody waits for it.
#ifdef EMULATED
// So that tests see where it is.
__device__ __forceinline__ void ask_for(const void* at) { (void)*(const volatile u8*)at; }
#else
__device__ __forceinline__ void ask_for(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

#ifndef EMULATED
// float16 bits to float, exact; float to float16 bits, to nearest even, infinity where it is too large.
__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
#endif

__device__ __forceinline__ float bf16_to_float(u16 b) { return __uint_as_float((u32)b << 16); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int k = 16; k > 0; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int k = 16; k > 0; k >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, k));
    return x;
}

// The sum over all threads of a block (a multiple of 32, at most 1024), in every thread. All threads must come.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    __syncthreads();  // a call before may still be reading
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f);
}
