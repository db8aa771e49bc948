// Plain numbers in strips of columns (strips, cols, LANES): what a thread takes of them, 16 bytes at a time. NUMBER
// says what they are.
#pragma once
#include "common.cuh"
#include "stream.cuh"

#define N_F32 0
#define N_F16 1
#define N_BF16 2
#define NUMBER_NBYTES (NUMBER == N_F32 ? 4 : 2)
#define ROWS (16 / NUMBER_NBYTES)          // of a thread, side by side
#define PARTS (LANES / ROWS)               // threads that share a column
#define COLUMN_NBYTES (LANES * NUMBER_NBYTES)

// Row r of a thread's.
__device__ __forceinline__ float plain_at(const u32 (&words)[4], int r) {
    if (NUMBER == N_F32) return __uint_as_float(words[r % 4]);
    const u32 word = words[r / 2 % 4];
    if (NUMBER == N_BF16) return __uint_as_float(r % 2 ? word & 0xffff0000u : word << 16);
    return half_to_float((u16)(r % 2 ? word >> 16 : word & 0xffffu));
}
