// Matrix instructions of a warp and copies that nobody waits for, as PTX has them; one meaning each. Compiled as C++ for
// the CPU (tests), the shim brings their twins (tests/cuda/matrices.h), which do by the layouts of the PTX manual
// ("Matrix Fragments for mma.m16n8k16", "ldmatrix", "cp.async") what is said here.
//
// All lanes of a warp must come to ldmatrix and mma. With g = lane / 4 and t = lane % 4, a register of two halves, the
// lower first, is of
//   A (16 x 16)   a[0]: row g, columns 2t and 2t + 1; a[1]: row g + 8; a[2]: row g, columns 2t + 8 and 2t + 9; a[3]: both
//   B (16 x 8)    b0: rows 2t and 2t + 1, column g; b1: rows 2t + 8 and 2t + 9
//   D (16 x 8)    d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8; float32
// so that two neighbouring tiles of D, rounded, are the A of a product to follow.
//
// sm_75 has neither mma.m16n8k16 nor cp.async: TURING is defined there (and by tests that run its way on the CPU).
#pragma once
#include "common.cuh"

#if !defined(TURING) && defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ < 800
#define TURING
#endif
#endif

#ifndef EMULATED
typedef u32 Shared;  // an address in shared memory

__device__ __forceinline__ Shared shared_address(const void* at) {
    Shared address;
    asm("{ .reg .u64 x; cvta.to.shared.u64 x, %1; cvt.u32.u64 %0, x; }" : "=r"(address) : "l"(at));
    return address;
}

// Four matrices of 8 x 8 halves: lane 8 m + r gives the address of row r of matrix m, 16 bytes. r[m]: of matrix m, row g,
// columns 2t and 2t + 1.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// The same, transposed. r[m]: of matrix m, rows 2t and 2t + 1, column g.
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// D += A B with the first 8 columns of A, the first 8 rows of B: a0 and a1 are rows g and g + 8.
__device__ __forceinline__ void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

#ifndef TURING
// D += A B.
__device__ __forceinline__ void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begin to copy 16 bytes from global to shared memory, past the L1 cache; zeros where not `there`, and nothing is read.
// Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(Shared to, const void* from, bool there) {
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// The copies that this thread began since the last call are a group.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for this thread's groups but the last N. Other threads' copies are seen behind a barrier.
template <int N>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

// 2^x, within 2 units of the last place; 0 where that is subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers as halves, to nearest even; `low` in the lower half.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 both;
#ifdef TURING
    both = (u32)float_to_half(low) | (u32)float_to_half(high) << 16;
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}
#endif

// D += A B.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef TURING
    mma_k8(d, a[0], a[1], b0);
    mma_k8(d, a[2], a[3], b1);
#else
    mma_k16(d, a, b0, b1);
#endif
}
