// PTX instructions in C++, for what ptx.py makes of a kernel's PTX; behind shim.h, whose fibers, barriers and warp
// instructions they use. By the PTX manual ("Instruction Set"); accesses to memory are told to checker.cpp.
#pragma once

#include <fenv.h>

#pragma GCC visibility push(default)
extern "C" const char* checker_global(uint64_t at, int bytes, int kind, int thread, const void* value = nullptr);
extern "C" const char* checker_shared(uint32_t at, int bytes, int kind, int thread);
extern "C" void checker_fence(int thread);
extern "C" void checker_warp(int thread);
extern "C" void checker_wait(int thread);
#pragma GCC visibility pop

namespace ptx {

enum Kind { READ, WRITE, ATOMIC, CONSTANT, ASKED };

template <class T, int N>
struct Several {
    T v[N];
};

// The bits of a register or a number, as a T: narrower ones are its low bits, wider ones by its own sign.
template <class To, class From>
inline To as(From from) {
    if constexpr (std::is_same_v<To, From>) {
        return from;
    } else if constexpr (sizeof(To) == sizeof(From) && !std::is_same_v<From, bool> && !std::is_same_v<To, bool>) {
        To to;
        memcpy(&to, &from, sizeof to);
        return to;
    } else {
        static_assert(std::is_integral_v<To> && std::is_integral_v<From>, "numbers of other sizes are integers");
        return (To)from;
    }
}
// The same of what is stored to a register: `set(register, value)`.
template <class To, class From>
inline void set(To& to, From from) {
    to = as<To>(from);
}

inline void require(const char* fault, int line) {
    if (fault) shim::fail(fault, line);
}

// -- memory ------------------------------------------------------------------------------------------------

struct Variable {  // of shared memory
    uint32_t at, bytes;
};
extern unsigned char shared_room[];

template <class T, int N>
inline Several<T, N> load_global(uint64_t at, int kind, int line) {
    if (at % sizeof(Several<T, N>)) shim::fail("a load from an address that is not aligned", line);
    require(checker_global(at, sizeof(Several<T, N>), kind, shim::current), line);
    Several<T, N> out;
    memcpy(&out, (const void*)at, sizeof out);
    return out;
}
template <class T, int N>
inline void store_global(uint64_t at, const Several<T, N>& value, int line) {
    if (at % sizeof value) shim::fail("a store to an address that is not aligned", line);
    require(checker_global(at, sizeof value, WRITE, shim::current, &value), line);
    memcpy((void*)at, &value, sizeof value);
}

template <int M>
inline void check_shared(const Variable (&variables)[M], uint32_t at, uint32_t bytes, int kind, int line) {
    if (at % bytes) shim::fail("an access to shared memory at an address that is not aligned", line);
    bool inside = false;
    for (const Variable& v : variables) inside |= at >= v.at && at + bytes <= v.at + v.bytes;
    if (!inside) shim::fail("an access to shared memory outside of its variables", line);
    require(checker_shared(at, bytes, kind, shim::current), line);
}
template <class T, int N, int M>
inline Several<T, N> load_shared(const Variable (&variables)[M], uint32_t at, int line) {
    Several<T, N> out;
    check_shared(variables, at, sizeof out, READ, line);
    memcpy(&out, shared_room + at, sizeof out);
    return out;
}
template <class T, int N, int M>
inline void store_shared(const Variable (&variables)[M], uint32_t at, const Several<T, N>& value, int line) {
    check_shared(variables, at, sizeof value, WRITE, line);
    memcpy(shared_room + at, &value, sizeof value);
}

inline void check_local(const unsigned char* room, uint32_t room_bytes, uint64_t at, uint32_t bytes, int line) {
    if (at % bytes) shim::fail("an access to local memory at an address that is not aligned", line);
    if (at < (uint64_t)room || at + bytes > (uint64_t)room + room_bytes)
        shim::fail("an access outside of the thread's local memory", line);
}
template <class T, int N>
inline Several<T, N> load_local(const unsigned char* room, uint32_t room_bytes, uint64_t at, int line) {
    Several<T, N> out;
    check_local(room, room_bytes, at, sizeof out, line);
    memcpy(&out, (const void*)at, sizeof out);
    return out;
}
template <class T, int N>
inline void store_local(const unsigned char* room, uint32_t room_bytes, uint64_t at, const Several<T, N>& value, int line) {
    check_local(room, room_bytes, at, sizeof value, line);
    memcpy((void*)at, &value, sizeof value);
}

template <class T>
inline T atomic(uint64_t at, T (*change)(T, T), T value, int line) {
    if (at % sizeof(T)) shim::fail("an atomic operation at an address that is not aligned", line);
    require(checker_global(at, sizeof(T), ATOMIC, shim::current), line);
    const T old = *(const T*)at;
    *(T*)at = change(old, value);
    return old;
}
template <class T>
inline T change_add(T old, T value) { return old + value; }
template <class T>
inline T change_max(T old, T value) { return old > value ? old : value; }
template <class T>
inline T change_inc(T old, T value) { return old >= value ? 0 : old + 1; }

inline void fence() { checker_fence(shim::current); }
inline void wait_for_grids() { checker_wait(shim::current); }
inline void prefetch(uint64_t at, int line) { require(checker_global(at, 1, ASKED, shim::current), line); }

// -- the others of a warp or a block -----------------------------------------------------------------------

inline void barrier(int) { shim::barrier("bar.sync", 0, 0); }
inline uint32_t barrier_count(bool value) {
    shim::barrier("bar.red.popc", 0, value);
    return shim::barrier_count;
}
inline void barrier_warp(uint32_t mask, int line) {
    shim::in_warp("bar.warp.sync", line, mask, 0);
    if (mask == ~0u) checker_warp(shim::current);  // of part of a warp: orders nothing, as far as this goes
}

enum Shuffle { UP, DOWN, BFLY, IDX };
// `limits`: the last or first lane in its low five bits, in bits 8 to 12 those of a lane's number that name its segment.
inline uint32_t shuffle(Shuffle how, uint32_t value, uint32_t by, uint32_t limits, uint32_t mask, int line) {
    const int lane = shim::current % 32, own = shim::current / 32 * 32;
    const int b = by & 31, c = limits & 31, segment = limits >> 8 & 31;
    const int most = (lane & segment) | (c & ~segment), least = lane & segment;
    int from = how == UP ? lane - b : how == DOWN ? lane + b : how == BFLY ? lane ^ b : least | (b & ~segment);
    const bool inside = how == UP ? from >= most : from <= most;
    if (!inside) from = lane;
    shim::in_warp("shfl.sync", line, mask, value);
    if (!(mask >> from & 1)) shim::fail("a shuffle from a lane that the mask does not name", line);
    return (uint32_t)shim::given[own + from];
}
inline uint32_t ballot(bool value, uint32_t mask, int line) { return shim::ballot("vote.sync", line, mask, value); }

// Matrices by the twins of matrices.h. A lane gives the address of a row: it is the one who reads it.
template <int M>
inline void load_matrices(const Variable (&variables)[M], uint32_t (&r)[4], uint32_t row, bool transposed, int line) {
    check_shared(variables, row, 16, READ, line);
    shim::load_matrices(r, (Shared)(shared_room + row), transposed, "ldmatrix", line);
}

template <int M>
inline void begin_copy(const Variable (&variables)[M], uint32_t to, uint64_t from, uint32_t bytes, int line) {
    if (bytes != 0 && bytes != 16) shim::fail("cp.async of other than 0 or 16 bytes", line);
    check_shared(variables, to, 16, WRITE, line);
    if (bytes) require(checker_global(from, 16, READ, shim::current), line);
    copy_async((Shared)(shared_room + to), (const void*)from, bytes != 0, line);
}
template <int N>
inline void wait_copies(int line) {
    const shim::Fiber& fiber = shim::fibers[shim::current];
    for (int k = 0; k < fiber.copies; k++) {  // they are written when they are waited for, as far as others can tell
        const uint64_t at = fiber.copy[k].to - (uint64_t)shared_room;
        if (fiber.copy[k].group < fiber.groups - N) require(checker_shared(at, 16, WRITE, shim::current), line);
    }
    copies_wait<N>();
}

// -- numbers -----------------------------------------------------------------------------------------------

template <class T>
inline T shift_left(T x, uint32_t by) { return by >= 8 * sizeof(T) ? 0 : (T)(x << by); }
template <class T>
inline T shift_right(T x, uint32_t by) {
    const uint32_t most = 8 * sizeof(T) - 1;
    if (by > most) return std::is_signed_v<T> ? (T)(x >> most) : 0;
    return (T)(x >> by);
}
template <class T>
inline T multiply_high(T a, T b) {
    static_assert(sizeof(T) <= 4);
    using W = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    return (T)((W)a * (W)b >> 8 * sizeof(T));
}
// Integers wrap: products and sums of what C++ would call signed are those of their bits.
template <class T>
inline T wrap_add(T a, T b) { return (T)((std::make_unsigned_t<T>)a + (std::make_unsigned_t<T>)b); }
template <class T>
inline T wrap_sub(T a, T b) { return (T)((std::make_unsigned_t<T>)a - (std::make_unsigned_t<T>)b); }
template <class T>
inline T wrap_mul(T a, T b) { return (T)((uint64_t)a * (uint64_t)b); }
template <class T>
inline T divide(T a, T b, int line) {
    if (b == 0) shim::fail("an integer divided by zero", line);
    return std::is_signed_v<T> && b == (T)-1 ? wrap_sub<T>(0, a) : a / b;
}
template <class T>
inline T remainder(T a, T b, int line) { return wrap_sub<T>(a, wrap_mul<T>(divide<T>(a, b, line), b)); }

template <class T>
inline T insert_bits(T field, T into, uint32_t at, uint32_t bits) {
    at &= 255, bits &= 255;
    for (uint32_t k = 0; k < bits && at + k < 8 * sizeof(T); k++) {
        const T bit = (T)1 << (at + k);
        into = (into & ~bit) | (field >> k & 1 ? bit : 0);
    }
    return into;
}

// As __byte_perm, but bit 3 of a nibble spreads the byte's sign.
inline uint32_t permute(uint32_t x, uint32_t y, uint32_t s) {
    uint32_t out = __byte_perm(x, y, s);
    for (int k = 0; k < 4; k++) {
        if (!(s >> 4 * k & 8)) continue;
        const uint32_t byte = 255u << 8 * k;
        out = out >> (8 * k + 7) & 1 ? out | byte : out & ~byte;
    }
    return out;
}

template <class T>
inline T larger(T a, T b) { return a > b ? a : b; }
template <class T>
inline T smaller(T a, T b) { return a < b ? a : b; }

inline float copy_sign(float sign, float number) { return copysignf(number, sign); }
// max and min of floats: the other one of a NaN.
inline float maximum(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }
inline float minimum(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }
inline float saturate(float x) { return !(x > 0.0f) ? 0.0f : x > 1.0f ? 1.0f : x; }
__attribute__((noinline)) inline float fma_down(float a, float b, float c) {
    volatile float x = a, y = b, z = c;
    const int before = fegetround();
    fesetround(FE_DOWNWARD);
    volatile float out = fmaf(x, y, z);
    fesetround(before);
    return out;
}

}  // namespace ptx
