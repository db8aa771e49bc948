// How weights are read, and rounded to halves. They are read once and need no place in the first-level cache, where
// inputs are to stay. `volatile` keeps their order, so that the compiler does not move a load down to where its result
// is used.
#pragma once
#include "common.cuh"

#ifdef EMULATED
__device__ __forceinline__ void load_words(u32 (&to)[4], const u8* from) {
    const uint4 v = *(const uint4*)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_words(u32 (&to)[2], const u8* from) {
    const uint2 v = *(const uint2*)from;
    to[0] = v.x, to[1] = v.y;
}
__device__ __forceinline__ void load_words(u32 (&to)[1], const u8* from) { to[0] = *(const u32*)from; }
#else
#define STREAM "ld.global.nc.L1::no_allocate.L2::128B"
__device__ __forceinline__ void load_words(u32 (&to)[4], const u8* from) {
    asm volatile(STREAM ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
}
__device__ __forceinline__ void load_words(u32 (&to)[2], const u8* from) {
    asm volatile(STREAM ".v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}
__device__ __forceinline__ void load_words(u32 (&to)[1], const u8* from) {
    asm volatile(STREAM ".u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}
#endif

// A weight as float16, to nearest even. What is finite stays so: beyond 65,504 it becomes 65,504.
__device__ __forceinline__ u16 half_of_weight(float w) {
    const u16 h = float_to_half(w);
    const bool beyond = (h & 0x7fff) == 0x7c00 && (__float_as_uint(w) & 0x7fffffffu) != 0x7f800000u;
    return beyond ? (u16)(h - 1) : h;
}
