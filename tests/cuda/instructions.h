// The device's instructions and functions that kernels use, for shim.h, which includes this: barriers and warp
// instructions by its fibers, the rest in plain C++. What rounds on the device rounds here.
#pragma once

// -- instructions ------------------------------------------------------------------------------------------

#define __syncthreads() shim::barrier("__syncthreads", __LINE__, 0)
#define __syncthreads_count(value) (shim::barrier("__syncthreads_count", __LINE__, !!(value)), shim::barrier_count)
#define __syncthreads_or(value) (shim::barrier("__syncthreads_or", __LINE__, !!(value)), shim::barrier_count != 0)
#define __syncthreads_and(value) \
    (shim::barrier("__syncthreads_and", __LINE__, !!(value)), shim::barrier_count == (int)blockDim.x)
#define __syncwarp(...) shim::sync_warp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) shim::shuffle("__shfl_sync", __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) shim::shuffle_xor("__shfl_xor_sync", __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) shim::shuffle_up("__shfl_up_sync", __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) shim::shuffle_down("__shfl_down_sync", __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, value) shim::ballot("__ballot_sync", __LINE__, mask, !!(value))
#define __any_sync(mask, value) (shim::ballot("__any_sync", __LINE__, mask, !!(value)) != 0)
#define __all_sync(mask, value) (shim::ballot("__all_sync", __LINE__, mask, !!(value)) == (unsigned)(mask))
#define __trap() shim::fail("__trap", __LINE__)
#define __builtin_assume(condition) ((condition) ? (void)0 : shim::fail("assumed in vain: " #condition, __LINE__))

namespace shim {

inline void sync_warp(int line, unsigned mask = ~0u) { in_warp("__syncwarp", line, mask, 0); }

// What lane `source` of this lane's warp brought, who must be one of the mask.
template <class T>
inline T exchange(const char* what, int line, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    in_warp(what, line, mask, bits);
    if (!(mask >> source & 1)) fail("a shuffle from a lane that the mask does not name", line);
    memcpy(&value, &given[current / 32 * 32 + source], sizeof value);
    return value;
}
template <class T>
inline T shuffle(const char* what, int line, unsigned mask, T value, int lane, int width = 32) {
    const int own = current % 32;
    return exchange(what, line, mask, value, own / width * width + (unsigned)lane % width);
}
template <class T>
inline T shuffle_xor(const char* what, int line, unsigned mask, T value, int bits, int width = 32) {
    const int own = current % 32, source = own ^ bits;
    return exchange(what, line, mask, value, source / width > own / width ? own : source);
}
template <class T>
inline T shuffle_up(const char* what, int line, unsigned mask, T value, unsigned by, int width = 32) {
    const int own = current % 32;
    return exchange(what, line, mask, value, own % width >= (int)by ? own - (int)by : own);
}
template <class T>
inline T shuffle_down(const char* what, int line, unsigned mask, T value, unsigned by, int width = 32) {
    const int own = current % 32;
    return exchange(what, line, mask, value, own % width + (int)by < width ? own + (int)by : own);
}
inline unsigned ballot(const char* what, int line, unsigned mask, bool value) {
    in_warp(what, line, mask, value);
    unsigned bits = 0;
    for (int k = 0; k < 32; k++)
        if (mask >> k & 1) bits |= (unsigned)given[current / 32 * 32 + k] << k;
    return bits;
}

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace shim

inline void __threadfence() {}
inline void __threadfence_block() {}

#define SHIM_ATOMIC(name, T, change)          \
    inline T name(T* at, T value) {           \
        const T old = *at;                    \
        *at = change;                         \
        return old;                           \
    }
#define SHIM_ATOMICS(T)                                          \
    SHIM_ATOMIC(atomicAdd, T, (T)((unsigned long long)old + (unsigned long long)value)) \
    SHIM_ATOMIC(atomicMax, T, old > value ? old : value)         \
    SHIM_ATOMIC(atomicMin, T, old < value ? old : value)         \
    SHIM_ATOMIC(atomicExch, T, value)                            \
    SHIM_ATOMIC(atomicOr, T, old | value)                        \
    SHIM_ATOMIC(atomicAnd, T, old & value)                       \
    inline T atomicCAS(T* at, T expected, T value) {             \
        const T old = *at;                                       \
        if (old == expected) *at = value;                        \
        return old;                                              \
    }
SHIM_ATOMICS(int)
SHIM_ATOMICS(unsigned)
SHIM_ATOMICS(unsigned long long)
SHIM_ATOMIC(atomicAdd, float, old + value)
SHIM_ATOMIC(atomicExch, float, value)
SHIM_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)

template <class T>
inline T __ldg(const T* at) { return *at; }
template <class T>
inline T __ldcg(const T* at) { return *at; }
template <class T>
inline T __ldcs(const T* at) { return *at; }
template <class T>
inline void __stcg(T* at, T value) { *at = value; }
template <class T>
inline void __stcs(T* at, T value) { *at = value; }

inline float __uint_as_float(unsigned x) { return shim::bits_as<float>(x); }
inline float __int_as_float(int x) { return shim::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return shim::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return shim::bits_as<int>(x); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
#define __expf(x) expf(x)  // the C library declares functions of these names
#define __logf(x) logf(x)

// To an integer as the device does it: NaN is 0, what is too large is the largest.
inline int __float2int_rz(float x) {
    return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : (int)x;
}
inline int __float2int_rn(float x) { return __float2int_rz(rintf(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
inline unsigned __float2uint_rz(float x) { return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? ~0u : (unsigned)x; }
inline unsigned __float2uint_rn(float x) { return __float2uint_rz(rintf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int k = 0; k < 32; k++) y |= (x >> k & 1) << (31 - k);
    return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)((((uint64_t)hi << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)(((uint64_t)hi << 32 | lo) >> (n & 31));
}
// Four bytes of the eight in y:x, chosen by the low three bits of each nibble; the fourth is ignored.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const uint64_t both = (uint64_t)y << 32 | x;
    unsigned out = 0;
    for (int k = 0; k < 4; k++) out |= (unsigned)(both >> 8 * (s >> 4 * k & 7) & 255) << 8 * k;
    return out;
}
inline int __dp4a(int a, int b, int c) {
    unsigned sum = (unsigned)c;  // wraps
    for (int k = 0; k < 4; k++) sum += (unsigned)((signed char)((unsigned)a >> 8 * k) * (signed char)((unsigned)b >> 8 * k));
    return (int)sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int k = 0; k < 4; k++) c += (a >> 8 * k & 255) * (b >> 8 * k & 255);
    return c;
}
// Byte by byte, wrapping.
inline unsigned __vadd4(unsigned a, unsigned b) {
    return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}
inline unsigned __vsub4(unsigned a, unsigned b) {
    return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}

// -- half precision, what common.cuh does with PTX ---------------------------------------------------------

inline float half_to_float(unsigned short h) {
    const unsigned sign = (unsigned)(h & 0x8000) << 16, rest = (unsigned)(h & 0x7fff) << 13;
    if (rest >= 0x0f800000u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x7fffffu ? 0x400000u | rest : 0));
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));  // exact, subnormals too
}
inline unsigned short float_to_half(float f) {
    const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000;
    const float x = fabsf(f);
    if (x != x) return 0x7fff;
    if (x >= 65520.0f) return sign | 0x7c00;
    if (x < 0x1p-14f) return sign | (unsigned)(x * 0x1p24f + 0x1p23f - 0x1p23f);  // the addition rounds
    const unsigned rest = __float_as_uint(x) - 0x38000000u;  // exponent 127 becomes 15
    return sign | ((rest + 0xfff + (rest >> 13 & 1)) >> 13);
}
