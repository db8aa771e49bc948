// CUDA C++ kernels as C++ for the CPU. A grid runs block by block; a block's threads are fibers that take turns: each
// runs until it ends, or waits at a barrier or a warp instruction for the others, warp after warp.
//
// What a device would forgive now and then is an error here: a barrier that not all threads reach, a warp instruction
// without all lanes that its mask names, lanes or threads that wait at different lines. Shared memory is filled with
// NaN patterns before each block. No two fibers ever run at once, so a missing barrier shows by the order: forward,
// thread 0 is first to get anywhere; reversed, the last one (and the last block). Compiled with the address sanitizer,
// shared arrays have red zones (-fsanitize-sections=shared_memory) and the switches of stacks are announced to it.
//
// Only what kernels use and no more: an instruction that is missing here does not compile. SHIM_CHECKED: kernels that
// were made of PTX (ptx.py) tell checker.cpp of their accesses to memory, and launches, blocks and barriers are told it.
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

#ifdef SHIM_CHECKED
#pragma GCC visibility push(default)
extern "C" void checker_launch(int threads);
extern "C" const char* checker_block(uint64_t number);
extern "C" const char* checker_barrier();
extern "C" const char* checker_done();
#pragma GCC visibility pop
#else
inline void checker_launch(int) {}
inline const char* checker_block(uint64_t) { return nullptr; }
inline const char* checker_barrier() { return nullptr; }
inline const char* checker_done() { return nullptr; }
#endif

namespace shim {

enum Wait { RUNS, AT_BARRIER, IN_WARP, ENDED };

const int MOST_COPIES = 64;  // of a thread, under way

struct Copy {  // of 16 bytes, see matrices.h
    uint64_t to;
    const void* from;  // null: zeros
    int group;
};

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
    int turn;             // of two rooms for what it brings, see matrices.h
    Copy copy[MOST_COPIES];
    int copies, groups;   // copies under way; groups that it has closed
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
    if (fibers[current].copies) fail("a thread ends while copies of its are under way", 0);
    for (;;) leave(ENDED);
}

inline void create(int index) {
    Fiber& fiber = fibers[index];
    char* low = stacks + index * stack_bytes;
    *(uint64_t*)low = CANARY;
    fiber.wait = RUNS;
    fiber.turn = fiber.copies = fiber.groups = 0;
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

// What the checker says: null, or that something is wrong.
inline bool refuses(const char* fault) {
    if (fault) snprintf(message, sizeof message, "%s", fault);
    return fault != nullptr;
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
    if (fibers[0].wait == AT_BARRIER && refuses(checker_barrier())) return false;
    for (int k = 0; k < threads; k++) fibers[k].wait = RUNS;
    return true;
}

inline bool is_shared(const char* at) { return at >= __start_shared_memory && at < __stop_shared_memory; }

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
    checker_launch(block);
    for (size_t k = 0; k < n; k++) {
        const size_t at = reversed ? n - 1 - k : k;
        blockIdx = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]), (unsigned)(at / grid[0] / grid[1])};
        if (refuses(checker_block(at)) || !run_block(block, reversed)) {
#ifdef __SANITIZE_ADDRESS__
            __asan_unpoison_memory_region(memory, MOST * bytes);  // frames that nobody returned from
#endif
            return message;
        }
    }
    return refuses(checker_done()) ? message : nullptr;
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

#include "instructions.h"
#include "matrices.h"
