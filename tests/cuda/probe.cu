// Kernels that test_shim.py asks what the shim does; right ones and wrong ones.
#include "mma.cuh"

extern "C" __global__ void halves(const u16* h, float* f, u16* back, int n) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= n) return;
    f[k] = half_to_float(h[k]);
    back[k] = float_to_half(f[k]);
}

extern "C" __global__ void to_half(const float* f, u16* h, int n) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k < n) h[k] = float_to_half(f[k]);
}

extern "C" __global__ void __launch_bounds__(256) sums(const float* x, float* out) {
    const float total = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

// Each thread writes its number; all read their neighbour's. `wait`: with the barrier in between.
extern "C" __global__ void neighbours(int* out, int wait) {
    __shared__ int numbers[1024];
    numbers[threadIdx.x] = threadIdx.x;
    if (wait) __syncthreads();
    out[threadIdx.x] = numbers[(threadIdx.x + blockDim.x + (wait == 2 ? -1 : 1)) % blockDim.x];
}

extern "C" __global__ void unwritten(float* out) {
    __shared__ float numbers[64];
    out[threadIdx.x] = numbers[threadIdx.x];
    numbers[threadIdx.x] = 0.0f;
}

extern "C" __global__ void beyond_shared(int* out, int k) {
    __shared__ int numbers[40];
    numbers[threadIdx.x] = 1;
    out[threadIdx.x] = numbers[k];
}

extern "C" __global__ void beyond_global(int* x, int k) { x[k + threadIdx.x] = 1; }

extern "C" __global__ void lonely_barrier(int kind, int one) {
    if (kind == 0 && (int)threadIdx.x == one) return;  // one has ended
    if (kind == 1 && (int)threadIdx.x == one)
        __syncthreads();  // another line than the rest's
    else
        __syncthreads();
    if (kind == 2 && (int)threadIdx.x != one) __shfl_xor_sync(FULL_WARP, 1, 1);
    if (kind == 3) __shfl_sync(1u << one % 32, 1, one);
    if (kind == 4 && (int)threadIdx.x == one) __trap();
}

extern "C" __global__ void deep(int* out, int k) {
    volatile int numbers[100000];
    numbers[0] = k;
    numbers[k] = 7;
    out[threadIdx.x] = numbers[0];
}

// Ten results of warp instructions a lane.
extern "C" __global__ void warp(const int* x, int* out) {
    const int v = x[threadIdx.x];
    int* at = out + 10 * threadIdx.x;
    at[0] = __shfl_sync(FULL_WARP, v, v);
    at[1] = __shfl_xor_sync(FULL_WARP, v, 5);
    at[2] = __shfl_up_sync(FULL_WARP, v, 3);
    at[3] = __shfl_down_sync(FULL_WARP, v, 3);
    at[4] = __shfl_down_sync(FULL_WARP, v, 3, 8);
    at[5] = __ballot_sync(FULL_WARP, v & 1);
    at[6] = __any_sync(FULL_WARP, v == 77);
    at[7] = __all_sync(FULL_WARP, v >= 0);
    at[8] = __syncthreads_count(v & 1);
    __syncwarp();
    const u32 half = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
    at[9] = __shfl_xor_sync(half, v, 1);
}

extern "C" __global__ void integers(const u32* a, const u32* b, const u32* c, u32* out, int n) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= n) return;
    out[k] = __byte_perm(a[k], b[k], c[k]);
    out[n + k] = (u32)__dp4a((int)a[k], (int)b[k], (int)c[k]);
    out[2 * n + k] = __vsub4(a[k], b[k]);
    out[3 * n + k] = __vadd4(a[k], b[k]);
    out[4 * n + k] = __funnelshift_r(a[k], b[k], c[k]);
    out[5 * n + k] = __funnelshift_l(a[k], b[k], c[k]);
    out[6 * n + k] = __brev(a[k]);
    out[7 * n + k] = __clz((int)a[k]);
    out[8 * n + k] = __popc(a[k]);
    out[9 * n + k] = __umulhi(a[k], b[k]);
}

extern "C" __global__ void to_int(const float* x, int* rn, int* rz, int n) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= n) return;
    rn[k] = __float2int_rn(x[k]);
    rz[k] = __float2int_rz(x[k]);
}

extern "C" __global__ void tickets(u32* ticket, int* order, u64* best, float* total) {
    __shared__ u32 mine;
    if (threadIdx.x == 0) {
        mine = atomicInc(ticket, gridDim.x - 1);
        order[mine] = blockIdx.x;
    }
    __syncthreads();
    atomicMax(best, (u64)(blockIdx.x * 1000 + threadIdx.x));
    atomicAdd(total, 1.0f);
    __threadfence();
}

// Each block writes the numbers of its threads; the last one to be done sums up what all wrote, 32 threads a block.
// kind 0: right; 1: no fence in front of the ticket; 2: none behind it; 3: each thread has its own, and not the one who
// takes the ticket behind the barrier; 4: no barrier in front of the ticket.
extern "C" __global__ void handed_over(u32* ticket, int* data, int* out, int kind) {
    __shared__ int last;
    data[blockIdx.x * 32 + threadIdx.x] = blockIdx.x + threadIdx.x;
    if (kind == 3) __threadfence();
    if (kind != 4) __syncthreads();
    if (threadIdx.x == 0) {
        if (kind != 1 && kind != 3) __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        if (kind != 2 && kind != 3) __threadfence();
    }
    __syncthreads();
    if (!last) return;
    if (kind == 3) __threadfence();
    int sum = 0;
    for (int b = 0; b < (int)gridDim.x; b++) sum += ((volatile int*)data)[b * 32 + threadIdx.x];
    out[threadIdx.x] = sum;
    if (threadIdx.x == 0) *ticket = 0;
}

// Lanes read what their neighbours wrote; `wait`: behind __syncwarp.
extern "C" __global__ void neighbours_of_a_warp(int* out, int wait) {
    __shared__ int numbers[32];
    numbers[threadIdx.x] = threadIdx.x;
    if (wait) __syncwarp();
    out[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

// Every thread writes the same place: its own number or, where `same`, the same one.
extern "C" __global__ void one_place(int* out, int same) { out[0] = same ? 7 : (int)(blockIdx.x * 32 + threadIdx.x); }

extern "C" __global__ void constants(int* x, int* out, int change) {
    if (change) x[threadIdx.x] = 5;
    out[threadIdx.x] = __ldg(x + threadIdx.x);
}

extern "C" __global__ void arguments(const float* x, const uint4* y, const u16* z, int i, float f, void* any, float* out) {
    out[0] = x[0] + (float)y[0].w + half_to_float(z[0]) + (float)i + f;
    out[1] = any == nullptr;
}

// What a lane holds of A, B and D, given and taken as it is: a (32, 4), b (32, 2), d (32, 4); `eights` of 8 columns of A.
extern "C" __global__ void products(const u32* a, const u32* b, float* d, int eights) {
    const u32* const own_a = a + 4 * threadIdx.x;
    float sums[4];
    for (int i = 0; i < 4; i++) sums[i] = d[4 * threadIdx.x + i];
    const u32 whole[4] = {own_a[0], own_a[1], own_a[2], own_a[3]};
    if (eights == 2)
        mma(sums, whole, b[2 * threadIdx.x], b[2 * threadIdx.x + 1]);
    else
        mma_k8(sums, own_a[0], own_a[1], b[2 * threadIdx.x]);
    for (int i = 0; i < 4; i++) d[4 * threadIdx.x + i] = sums[i];
}

// Rows of 8 halves, x (40, 8), go to shared memory; lane k asks for row rows[k]. `conflicts`: whether banks may.
extern "C" __global__ void matrices(const u32* x, const int* rows, u32* plain, u32* transposed, int conflicts) {
    __shared__ uint4 room[40];
#ifdef EMULATED
    shim::conflicts_allowed = conflicts;
#endif
    for (int i = threadIdx.x; i < 160; i += 32) ((u32*)room)[i] = x[i];
    __syncthreads();
    u32 r[4];
    const Shared row = shared_address(room + rows[threadIdx.x]);
    ldmatrix(r, row);
    for (int i = 0; i < 4; i++) plain[4 * threadIdx.x + i] = r[i];
    ldmatrix_trans(r, row);
    for (int i = 0; i < 4; i++) transposed[4 * threadIdx.x + i] = r[i];
}

// x (2 * 64, 4) by way of shared memory, in two groups, to out (64, 4): each thread takes what its neighbour copied. The
// last `absent` threads' copies bring nothing. kind 0: right; 1: the second group is not waited for; 2: no barrier; 3: no
// group is closed; 4: they end without having waited.
extern "C" __global__ void copies(const uint4* x, uint4* out, int kind, int absent) {
    __shared__ uint4 room[2][64];
    const int k = threadIdx.x;
#ifdef TURING
    room[1][k] = x[64 + k];
    __syncthreads();
#else
    for (int group = 0; group < 2; group++) {
        copy_async(shared_address(&room[group][k]), x + 64 * group + k, k < 64 - absent);
        if (kind != 3) copies_commit();
    }
    if (kind == 4) return;
    if (kind == 1)
        copies_wait<1>();
    else
        copies_wait<0>();
    if (kind != 2) __syncthreads();
#endif
    out[k] = room[1][(k + 1) % 64];
#ifndef TURING
    copies_commit();
    copies_wait<0>();
#endif
}
