// CUDA C++ kernels as C++ for the CPU. A grid runs block by block; a block's threads are fibers that take turns: each
// runs until it ends, or waits at a barrier or a warp instruction for the others, warp after warp.
//
// What a device would forgive now and then is an error here: a barrier that not all threads reach, a warp instruction
// without all lanes that its mask names, lanes or threads that wait at different lines. Shared memory is filled with
// NaN patterns before each block. No two fibers ever run at once, so a missing barrier shows by the order: forward,
// thread 0 is first to get anywhere; reversed, the last one (and the last block). Compiled with the address sanitizer,
// shared arrays have red zones (-fsanitize-sections=shared_memory) and the switches of stacks are announced to it.
//
// Only what kernels use and no more: an instruction that is missing here does not compile.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if !defined(__x86_64__)
#define SHIM_UCONTEXT
#endif
#ifdef SHIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define EMULATED 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))

// -- vectors -----------------------------------------------------------------------------------------------

#define SHIM_VECTOR2(name, T, bytes)         \
    struct alignas(bytes) name {             \
        T x, y;                              \
    };                                       \
    inline name make_##name(T x, T y) { return {x, y}; }
#define SHIM_VECTOR4(name, T, bytes)         \
    struct alignas(bytes) name {             \
        T x, y, z, w;                        \
    };                                       \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

SHIM_VECTOR2(char2, signed char, 2)
SHIM_VECTOR2(uchar2, unsigned char, 2)
SHIM_VECTOR2(short2, short, 4)
SHIM_VECTOR2(ushort2, unsigned short, 4)
SHIM_VECTOR2(int2, int, 8)
SHIM_VECTOR2(uint2, unsigned, 8)
SHIM_VECTOR2(float2, float, 8)
SHIM_VECTOR2(longlong2, long long, 16)
SHIM_VECTOR2(ulonglong2, unsigned long long, 16)
SHIM_VECTOR4(char4, signed char, 4)
SHIM_VECTOR4(uchar4, unsigned char, 4)
SHIM_VECTOR4(short4, short, 8)
SHIM_VECTOR4(ushort4, unsigned short, 8)
SHIM_VECTOR4(int4, int, 16)
SHIM_VECTOR4(uint4, unsigned, 16)
SHIM_VECTOR4(float4, float, 16)

struct dim3 {
    unsigned x, y, z;
};

// -- fibers ------------------------------------------------------------------------------------------------

// Not static: whoever switches fibers changes them, and the compiler must not think otherwise.
dim3 threadIdx, blockIdx, blockDim, gridDim;

extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));

namespace shim {

enum Wait { RUNS, AT_BARRIER, IN_WARP, ENDED };

struct Fiber {
#ifdef SHIM_UCONTEXT
    ucontext_t context;
#else
    void* stack;  // its top, while it waits
#endif
    void* fake_stack;     // the sanitizer's
    Wait wait;
    const char* what;     // the instruction it waits at
    int line;
    unsigned mask;        // the lanes it waits for
    uint64_t value;       // what it brought
};

const int MOST = 1024;  // threads a block
const uint64_t CANARY = 0x5afe57ac5afe57acull;

Fiber fibers[MOST], host;
uint64_t given[MOST];         // what lanes brought to the last warp instruction
int barrier_count;            // threads that brought a value other than 0 to the last barrier
int current;                  // the fiber that runs
void (*body)(void**);         // the kernel, with its arguments unpacked
void** arguments;
char* stacks;                 // MOST of them, one after the other
size_t stack_bytes;
char message[512];            // what went wrong; empty: nothing
const void* host_stack;
size_t host_stack_bytes;

#ifndef SHIM_UCONTEXT
extern "C" __attribute__((visibility("hidden"))) void shim_switch(void** from, void* to);
asm(R"(
    .text
    .hidden shim_switch
    .globl shim_switch
    .type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size shim_switch, .-shim_switch
)");
#endif

inline void exchange(Fiber& from, Fiber& to) {
#ifdef SHIM_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    shim_switch(&from.stack, to.stack);
#endif
}

// From a fiber to the scheduler; comes back when the scheduler says so, unless the fiber ended.
inline void leave(Wait wait) {
    Fiber& fiber = fibers[current];
    fiber.wait = wait;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(wait == ENDED ? nullptr : &fiber.fake_stack, host_stack, host_stack_bytes);
#endif
    exchange(fiber, host);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &host_stack, &host_stack_bytes);
#endif
}

inline void fail(const char* what, int line) {
    if (!message[0])
        snprintf(message, sizeof message, "%s (line %d, block %u %u %u, thread %u)", what, line, blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x);
    for (;;) leave(ENDED);
}

inline void begin() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
    body(arguments);
    for (;;) leave(ENDED);
}

inline void create(int index) {
    Fiber& fiber = fibers[index];
    char* low = stacks + index * stack_bytes;
    *(uint64_t*)low = CANARY;
    fiber.wait = RUNS;
    fiber.fake_stack = nullptr;
#ifdef SHIM_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = low;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
#else
    void** top = (void**)(low + stack_bytes - 16);  // where `begin` finds the stack as after a call
    *top = (void*)begin;
    fiber.stack = top - 6;
    memset(fiber.stack, 0, 48);
#endif
}

inline void resume(int index) {
    current = index;
    threadIdx = {(unsigned)index, 0, 0};
    Fiber& fiber = fibers[index];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&host.fake_stack, stacks + index * stack_bytes, stack_bytes);
#endif
    exchange(host, fiber);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
#endif
}

// -- waiting -----------------------------------------------------------------------------------------------

inline void barrier(const char* what, int line, int value) {
    Fiber& fiber = fibers[current];
    fiber.what = what;
    fiber.line = line;
    fiber.value = value;
    leave(AT_BARRIER);
}

// Wait for the lanes of the mask; then given[] has what each of them brought.
inline void in_warp(const char* what, int line, unsigned mask, uint64_t value) {
    if (!(mask >> current % 32 & 1)) fail("a lane that its own mask does not name", line);
    Fiber& fiber = fibers[current];
    fiber.what = what;
    fiber.line = line;
    fiber.mask = mask;
    fiber.value = value;
    leave(IN_WARP);
}

inline bool together(const Fiber& a, const Fiber& b) { return a.wait == b.wait && a.what == b.what && a.line == b.line; }

// Lets the lanes go on that have all that they wait for. Whether there were any.
inline bool release_warp(int first) {
    bool any = false;
    for (int lane = 0; lane < 32; lane++) {
        const Fiber& one = fibers[first + lane];
        if (one.wait != IN_WARP) continue;
        const unsigned mask = one.mask;
        bool complete = true;
        for (int k = 0; k < 32; k++)
            if (mask >> k & 1) complete &= together(fibers[first + k], one) && fibers[first + k].mask == mask;
        if (!complete) continue;
        for (int k = 0; k < 32; k++)
            if (mask >> k & 1) {
                given[first + k] = fibers[first + k].value;
                fibers[first + k].wait = RUNS;
            }
        any = true;
    }
    return any;
}

inline void describe(int index, char* text, size_t size) {
    const Fiber& fiber = fibers[index];
    if (fiber.wait == ENDED)
        snprintf(text, size, "thread %d has ended", index);
    else
        snprintf(text, size, "thread %d waits at %s in line %d", index, fiber.what, fiber.line);
}

// Says that two threads do not fit together.
inline bool misfits(int one, int other) {
    char a[160], b[160];
    describe(one, a, sizeof a);
    describe(other, b, sizeof b);
    snprintf(message, sizeof message, "block %u %u %u: %s, but %s", blockIdx.x, blockIdx.y, blockIdx.z, a, b);
    return false;
}

// All threads wait or have ended. Whether they may go on: all at one barrier.
inline bool release_block(int threads) {
    for (int k = 0; k < threads; k++) {
        if (fibers[k].wait != IN_WARP) continue;
        for (int lane = k & ~31; lane < (k | 31) + 1; lane++)
            if (fibers[k].mask >> lane % 32 & 1 && (!together(fibers[lane], fibers[k]) || fibers[lane].mask != fibers[k].mask))
                return misfits(k, lane);
    }
    barrier_count = 0;
    for (int k = 0; k < threads; k++) {
        if (!together(fibers[k], fibers[0])) return misfits(0, k);
        barrier_count += fibers[k].value != 0;
    }
    for (int k = 0; k < threads; k++) fibers[k].wait = RUNS;
    return true;
}

// The NaN pattern 0x7fd5 in shared memory. Byte by byte, red zones and all: the sanitizer must not look.
__attribute__((no_sanitize("address", "undefined"))) inline void spoil_shared() {
    volatile char* at = __start_shared_memory;
    for (ptrdiff_t k = 0, n = __stop_shared_memory - __start_shared_memory; k < n; k++) at[k] = k & 1 ? 0x7f : (char)0xd5;
}

inline bool run_block(int threads, bool reversed) {
    const int warps = threads / 32;
    for (int k = 0; k < threads; k++) create(k);
    spoil_shared();
    for (;;) {
        for (int w = 0; w < warps; w++) {
            const int first = 32 * (reversed ? warps - 1 - w : w);
            do {
                for (int lane = 0; lane < 32 && !message[0]; lane++) {
                    const int index = first + (reversed ? 31 - lane : lane);
                    if (fibers[index].wait == RUNS) resume(index);
                }
            } while (!message[0] && release_warp(first));
        }
        if (message[0]) return false;
        int ended = 0;
        for (int k = 0; k < threads; k++) ended += fibers[k].wait == ENDED;
        if (ended == threads) break;
        if (!release_block(threads)) return false;
    }
    for (int k = 0; k < threads; k++)
        if (*(uint64_t*)(stacks + k * stack_bytes) != CANARY) {
            snprintf(message, sizeof message, "thread %d needs more than %zu bytes of stack", k, stack_bytes);
            return false;
        }
    return true;
}

// -- launching ---------------------------------------------------------------------------------------------

template <class... P, size_t... I>
inline void unpack(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*(P*)args[I]...);
}

template <auto kernel>
struct Entry;

template <class... P, void (*kernel)(P...)>
struct Entry<kernel> {
    static void call(void** args) { unpack(kernel, args, std::index_sequence_for<P...>()); }

    // "i", "f", or for a pointer "*", what it points to ("f", "i" or "b" for anything else) and that one's bytes
    template <class T>
    static void describe_parameter(char*& at) {
        if constexpr (std::is_pointer_v<T>) {
            using E = std::remove_cv_t<std::remove_pointer_t<T>>;
            if constexpr (std::is_void_v<E>)
                at += sprintf(at, "*b1 ");
            else
                at += sprintf(at, "*%c%d ", std::is_same_v<E, float> ? 'f' : std::is_integral_v<E> ? 'i' : 'b', (int)sizeof(E));
        } else {
            static_assert(std::is_same_v<T, int> || std::is_same_v<T, float>, "a parameter is a pointer, an int or a float");
            at += sprintf(at, "%c ", std::is_same_v<T, int> ? 'i' : 'f');
        }
    }
    static const char* signature() {
        static char text[8 * sizeof...(P) + 1];
        char* at = text;
        (describe_parameter<P>(at), ...);
        return text;
    }
};

inline const char* launch(void (*call)(void**), const int* grid, int block, void** args, char* memory, size_t bytes,
                          int reversed) {
    body = call;
    arguments = args;
    stacks = memory;
    stack_bytes = bytes;
    message[0] = 0;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)block, 1, 1};
    const size_t n = (size_t)grid[0] * grid[1] * grid[2];
    for (size_t k = 0; k < n; k++) {
        const size_t at = reversed ? n - 1 - k : k;
        blockIdx = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]), (unsigned)(at / grid[0] / grid[1])};
        if (!run_block(block, reversed)) {
#ifdef __SANITIZE_ADDRESS__
            __asan_unpoison_memory_region(memory, MOST * bytes);  // frames that nobody returned from
#endif
            return message;
        }
    }
    return nullptr;
}

}  // namespace shim

// The entry points of a kernel: its parameters, and a launch that returns null or what went wrong.
#define SHIM_KERNEL(name)                                                                                              \
    extern "C" __attribute__((visibility("default"))) const char* signature_##name() {                                 \
        return shim::Entry<name>::signature();                                                                         \
    }                                                                                                                  \
    extern "C" __attribute__((visibility("default"))) const char* launch_##name(                                       \
        const int* grid, int block, void** args, char* stacks, size_t stack_bytes, int reversed) {                     \
        return shim::launch(shim::Entry<name>::call, grid, block, args, stacks, stack_bytes, reversed);                \
    }

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
// Four bytes of the eight in y:x, chosen by the low four bits of each nibble; bit 3 spreads the byte's sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const uint64_t both = (uint64_t)y << 32 | x;
    unsigned out = 0;
    for (int k = 0; k < 4; k++) {
        unsigned byte = both >> 8 * (s >> 4 * k & 7) & 255;
        if (s >> 4 * k & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * k;
    }
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
