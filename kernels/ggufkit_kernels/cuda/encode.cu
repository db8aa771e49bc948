// Quantizing: the bytes of `TensorType.encode` without importance, for Q4_0, Q8_0, Q4_K, Q5_K and Q6_K.
//
// Every float32 operation is that of the definition (formats: legacy.py, k_search.py), in its order, rounded by itself:
// the module is compiled without contraction. Sums go over a group from the first weight to the last, so a group is one
// thread's: 32 weights in its registers (Q6_K: 16). The 8 or 16 groups of a K block are neighbouring lanes, which find
// the block's largest scale and put their bits together by shuffles. What is not a number counts as on a CPU: the bits of
// x86's and ARM's default NaN, of which the low 23 are 0x400000, so `nearest` gives 0.
//
// x float32 (n, block), out (n, bytes), both contiguous; threads beyond n blocks work on the last one and write nothing.
// *due becomes 1 where a weight or a scale may not be finite: the host then looks closer.
//
// Operations a weight: Q4_K and Q5_K 22 and 17 trials of about 18, Q6_K 19 of about 8, so about 400, 300 and 150; an H100's
// 67 TFLOP/s without fused products are 33 T operations a second, so 80 to 200 billion weights a second, where PCIe 5 brings
// 12 (4 bytes each, 50 GB/s): the copy decides. (Counted, not measured.)
#include "common.cuh"

#define MAGIC 12582912.0f  // 1.5 * 2^23: its sum with a number has the nearest integer in the low bits
#define SMALLEST 1e-15f

__device__ __forceinline__ int nearest(float x) {
    const float sum = x + MAGIC;
    return sum != sum ? 0 : (__float_as_int(sum) & 0x7fffff) - 0x400000;
}
__device__ __forceinline__ int between(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// C's cast to int, then its low byte: out of range and NaN give 0.
__device__ __forceinline__ u32 low_byte(float x) { return fabsf(x) < 2147483648.0f ? (u32)(int)x & 255u : 0u; }

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ bool finite_half(u16 h) { return (h & 0x7c00) != 0x7c00; }

template <int K>
__device__ __forceinline__ bool load(float (&x)[K], const float* from) {
    bool sound = true;
#pragma unroll
    for (int i = 0; i < K; i += 4) {
        const float4 v = *(const float4*)(from + i);
        x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        sound = sound && finite(v.x) && finite(v.y) && finite(v.z) && finite(v.w);
    }
    return sound;
}

// -- a block of 32 by itself -------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(256) encode_q4_0(const float* x, u8* out, int* due, int n) {
    const int block = blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= n) return;
    float v[32];
    bool sound = load(v, x + (size_t)block * 32);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) largest = fabsf(v[i]) > fabsf(largest) ? v[i] : largest;
    const float d = largest / -8.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
    const u16 half = float_to_half(d);
    if (!sound || !finite_half(half)) *due = 1;
    u16* to = (u16*)(out + (size_t)block * 18);
    to[0] = half;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {  // weights i, i + 16, i + 1, i + 17
            const int code = (signed char)low_byte(v[i + k / 2 + k % 2 * 16] * inverse + 8.5f);
            word |= (u32)((code < 15 ? code : 15) & 15) << 4 * k;
        }
        to[1 + i / 2] = (u16)word;
    }
}

extern "C" __global__ void __launch_bounds__(256) encode_q8_0(const float* x, u8* out, int* due, int n) {
    const int block = blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= n) return;
    float v[32];
    bool sound = load(v, x + (size_t)block * 32);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(v[i]));
    const float d = largest / 127.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
    const u16 half = float_to_half(d);
    if (!sound || !finite_half(half)) *due = 1;
    u16* to = (u16*)(out + (size_t)block * 34);
    to[0] = half;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float q = v[i + k] * inverse, whole = truncf(q);  // halves go away from zero
            word |= low_byte(whole + (fabsf(q - whole) >= 0.5f ? copysignf(1.0f, q) : 0.0f)) << 8 * k;
        }
        to[1 + i / 2] = (u16)word;
    }
}

// -- scale and minimum a group of 32 -----------------------------------------------------------------------

struct Ranged {
    float scale, minimum;   // w = scale * code + minimum, the minimum at most 0
    float inverse, start;   // codes are nearest(inverse * (x - start))
};

template <int TOP>
__device__ __forceinline__ float code_of(float x, float inverse, float start) {
    return (float)between(nearest(inverse * (x - start)), 0, TOP);
}

template <int TOP>
__device__ __forceinline__ float error_of(const float (&x)[32], const float (&w)[32], float inverse, float start, float scale,
                                          float minimum) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float diff = scale * code_of<TOP>(x[i], inverse, start) + minimum - x[i];
        sum += w[i] * (diff * diff);
    }
    return sum;
}

// k_search.ranged, squared errors.
template <int TOP, int STEPS>
__device__ __forceinline__ Ranged ranged(const float (&x)[32], const float (&w)[32], float r_min) {
    float low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
#pragma unroll
    for (int i = 1; i < 32; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    low = low > 0.0f ? 0.0f : low;
    Ranged found;
    found.inverse = (float)TOP / (high - low);
    found.start = found.minimum = low;
    found.scale = 1.0f / found.inverse;
    if (high == low) {  // one value: all codes 0
        found.scale = 0.0f;
        found.inverse = 0.0f;
        return found;
    }
    float best = error_of<TOP>(x, w, found.inverse, low, found.scale, low);
    for (int step = 0; step <= STEPS; step++) {
        const float start = found.minimum;
        const float inverse = (r_min + 0.1f * (float)step + (float)TOP) / (high - start);
        float sum_l = 0.0f, sum_l2 = 0.0f, sum_xl = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const float code = code_of<TOP>(x[i], inverse, start), wl = w[i] * code;
            sum_l += wl;
            sum_l2 += wl * code;
            sum_xl += wl * x[i];
        }
        const float det = sum_w * sum_l2 - sum_l * sum_l;
        float scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        float minimum = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        if (minimum > 0.0f) {
            minimum = 0.0f;
            scale = sum_xl / sum_l2;
        }
        if (!(det > 0.0f)) continue;
        const float error = error_of<TOP>(x, w, inverse, start, scale, minimum);
        if (error < best) {
            best = error;
            found.scale = scale;
            found.minimum = minimum;
            found.inverse = inverse;
            found.start = start;
        }
    }
    return found;
}

// The largest of eight lanes, at least 0; NaN if one is.
__device__ __forceinline__ float largest_of_eight(float x) {
    float most = fmaxf(x, 0.0f);
    int odd = x != x;
    for (int k = 4; k > 0; k >>= 1) {
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, k));
        odd |= __shfl_xor_sync(FULL_WARP, odd, k);
    }
    return odd ? __uint_as_float(0x7fc00000u) : most;
}

// Q4_K: 144 bytes, Q5_K: 176. A lane a group, eight lanes a block, grid (blocks of 8 * n threads).
template <int BITS, int STEPS>
__device__ __forceinline__ void encode_ranged(const float* x, u8* out, int* due, int n, float r_min) {
    const int TOP = (1 << BITS) - 1;
    const int at = blockIdx.x * (blockDim.x / 8) + threadIdx.x / 8, group = threadIdx.x % 8;
    const int block = at < n ? at : n - 1;
    float v[32], w[32];
    bool sound = load(v, x + (size_t)block * 256 + 32 * group);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) square += v[i] * v[i];
    const float mean = sqrtf(square / 32.0f);
#pragma unroll
    for (int i = 0; i < 32; i++) w[i] = mean + fabsf(v[i]);
    const Ranged found = ranged<TOP, STEPS>(v, w, r_min);

    const float most = largest_of_eight(found.scale), most_minimum = largest_of_eight(-found.minimum);
    const u16 d = float_to_half(most > 0.0f ? most / 63.0f : 0.0f);
    const u16 dmin = float_to_half(most_minimum > 0.0f ? most_minimum / 63.0f : 0.0f);
    sound = sound && finite_half(d) && finite_half(dmin);
    const int scale = min(nearest((most > 0.0f ? 63.0f / most : 0.0f) * found.scale) & 255, 63);
    const int minimum = min(nearest((most_minimum > 0.0f ? 63.0f / most_minimum : 0.0f) * -found.minimum) & 255, 63);
    const float group_d = half_to_float(d) * (float)scale, group_m = half_to_float(dmin) * (float)minimum;

    u32 words[8];  // four codes each
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int code = group_d != 0.0f ? between(nearest((v[i] + group_m) / group_d), 0, TOP)
                                         : (int)code_of<TOP>(v[i], found.inverse, found.start);
        words[i / 4] = (i % 4 ? words[i / 4] : 0) | (u32)code << 8 * (i % 4);
    }
    u8* to = out + (size_t)block * (BITS == 5 ? 176 : 144);
    const bool writes = at < n;
    if (writes && !sound) *due = 1;
    if (writes && group == 0) *(u32*)to = d | (u32)dmin << 16;
    const int far_scale = __shfl_xor_sync(FULL_WARP, scale, 4), far_minimum = __shfl_xor_sync(FULL_WARP, minimum, 4);
    if (writes && group < 4) {
        to[4 + group] = (u8)(scale | far_scale >> 4 << 6);
        to[8 + group] = (u8)(minimum | far_minimum >> 4 << 6);
        to[12 + group] = (u8)((far_scale & 15) | (far_minimum & 15) << 4);
    }
    u32* qs = (u32*)(to + (BITS == 5 ? 48 : 16)) + 8 * (group / 2);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        if (BITS == 5) {
            u32 high = (words[k] >> 4 & 0x01010101u) << group;
            for (int far = 4; far > 0; far >>= 1) high |= __shfl_xor_sync(FULL_WARP, high, far);
            if (writes && group == k) ((u32*)(to + 16))[k] = high;
        }
        const u32 low = words[k] & 0x0f0f0f0fu, other = __shfl_xor_sync(FULL_WARP, low, 1);
        if (writes && k / 4 == group % 2) qs[k] = group % 2 ? other | low << 4 : low | other << 4;
    }
}

extern "C" __global__ void __launch_bounds__(128) encode_q4_k(const float* x, u8* out, int* due, int n) {
    encode_ranged<4, 20>(x, out, due, n, -1.0f);
}

extern "C" __global__ void __launch_bounds__(128) encode_q5_k(const float* x, u8* out, int* due, int n) {
    encode_ranged<5, 15>(x, out, due, n, -0.5f);
}

// -- a signed scale a group of 16 --------------------------------------------------------------------------

struct Signed {
    float scale, inverse;
    bool zero;
};

__device__ __forceinline__ int signed_code(float x) { return between(nearest(x), -32, 31); }

// k_search.signed for codes -32...31.
__device__ __forceinline__ Signed search_signed(const float (&x)[16]) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < 16; i++) largest = fabsf(x[i]) > fabsf(largest) ? x[i] : largest;
    Signed found;
    found.zero = fabsf(largest) < SMALLEST;
    found.scale = found.inverse = 0.0f;
    if (found.zero) return found;
    float best = 0.0f;
    for (int trial = -10; trial < 10; trial++) {  // -10: the first one, with 32 itself
        if (trial == 0) continue;
        const float inverse = trial == -10 ? -32.0f / largest : -(32.0f + 0.1f * (float)trial) / largest;
        float lx = 0.0f, l2 = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float code = (float)signed_code(inverse * x[i]), w = x[i] * x[i];
            lx += w * x[i] * code;
            l2 += w * code * code;
        }
        if (trial == -10) {
            found.scale = finite(l2) ? l2 > 0.0f ? lx / l2 : 0.0f : __uint_as_float(0x7fc00000u);
        } else {
            if (!(l2 > 0.0f && lx * lx > best * l2)) continue;
            found.scale = lx / l2;
        }
        best = found.scale * lx;
        found.inverse = inverse;
    }
    return found;
}

// 210 bytes. A lane a group, sixteen lanes a block.
extern "C" __global__ void __launch_bounds__(128) encode_q6_k(const float* x, u8* out, int* due, int n) {
    const int at = blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16, group = threadIdx.x % 16;
    const int block = at < n ? at : n - 1;
    float v[16];
    bool sound = load(v, x + (size_t)block * 256 + 16 * group);
    const Signed found = search_signed(v);

    // the scale of largest magnitude, the first of equals; NaN counts as the largest
    u64 key = (u64)(__float_as_uint(found.scale) & 0x7fffffffu) << 32 | (u32)(15 - group);
    for (int k = 8; k > 0; k >>= 1) {
        const u64 other = __shfl_xor_sync(FULL_WARP, key, k);
        key = other > key ? other : key;
    }
    const float most = __shfl_sync(FULL_WARP, found.scale, 15 - (int)(u32)key, 16);
    const bool zero = fabsf(most) < SMALLEST;
    const float inverse = -128.0f / most;
    const u16 d = float_to_half(zero ? 0.0f : 1.0f / inverse);
    sound = sound && finite_half(d);
    const int scale = zero ? 0 : (signed char)min(nearest(inverse * found.scale), 127);
    const float group_d = half_to_float(d) * (float)scale;

    u32 words[4];  // four codes each
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int code = group_d != 0.0f ? signed_code(v[i] / group_d) + 32
                                   : found.zero ? 0 : signed_code(found.inverse * v[i]) + 32;
        code = zero ? 0 : code;
        words[i / 4] = (i % 4 ? words[i / 4] : 0) | (u32)code << 8 * (i % 4);
    }
    u8* to = out + (size_t)block * 210;
    const bool writes = at < n;
    if (writes && !sound) *due = 1;
    const int half = group / 8, within = group % 8;
    u16* ql = (u16*)(to + 64 * half + 16 * (within % 4));
    u16* qh = (u16*)(to + 128 + 32 * half + 16 * (within % 2));
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const u32 low = words[k] & 0x0f0f0f0fu, other = __shfl_xor_sync(FULL_WARP, low, 4);
        u32 high = (words[k] >> 4 & 0x03030303u) << within / 2 * 2;
        high |= __shfl_xor_sync(FULL_WARP, high, 2);
        high |= __shfl_xor_sync(FULL_WARP, high, 4);
        if (writes && within < 4) {
            const u32 both = low | other << 4;
            ql[2 * k] = (u16)both;
            ql[2 * k + 1] = (u16)(both >> 16);
        }
        if (writes && within < 2) {
            qh[2 * k] = (u16)high;
            qh[2 * k + 1] = (u16)(high >> 16);
        }
    }
    if (writes) to[192 + group] = (u8)scale;
    if (writes && group == 0) *(u16*)(to + 208) = d;
}
