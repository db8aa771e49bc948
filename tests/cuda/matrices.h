// Twins of what mma.cuh does by PTX, for shim.h, which includes this behind instructions.h: by the layouts of the PTX
// manual, lane by lane. test_shim.py compares them with a definition that knows no formula of these.
#pragma once

typedef uint64_t Shared;  // an address

inline Shared shared_address(const void* at) { return (Shared)at; }

namespace shim {

// What a lane brings to an instruction of the whole warp.
struct Brought {
    Shared at;         // ldmatrix: a row of 8 halves, and
    uint32_t row[4];   // what lies there
    float a[8], b[4];  // mma: its elements of A and of B
};
bool conflicts_allowed;  // rows of a matrix in the same banks are an error otherwise: ldmatrix would take longer

// Two rooms take turns: a lane may be at the next instruction before the others have read what it brought to this one,
// but not at the one after that.
Brought brought[2][MOST];

inline Brought& bring() {
    fibers[current].turn ^= 1;
    return brought[fibers[current].turn][current];
}
// What the lanes of this warp brought.
inline const Brought* meet(const char* what, int line) {
    in_warp(what, line, ~0u, 0);
    return brought[fibers[current].turn] + current / 32 * 32;
}

inline void load_matrices(unsigned (&r)[4], Shared row, bool transposed, const char* what, int line) {
    if (row % 16) fail("ldmatrix from an address that is not a multiple of 16", line);
    if (!is_shared((const char*)row)) fail("ldmatrix from an address that is not in shared memory", line);
    const uint32_t* const words = (const uint32_t*)row;
    Brought& own = bring();
    for (int i = 0; i < 4; i++) own.row[i] = words[i];
    own.at = row;
    const Brought* const warp = meet(what, line);
    for (int m = 0; m < 4 && !conflicts_allowed; m++) {
        unsigned banks = 0;  // four each
        for (int k = 0; k < 8; k++) banks |= 1u << warp[8 * m + k].at / 16 % 8;
        if (banks != 255) fail("ldmatrix with bank conflicts", line);
    }
    const int g = current % 32 / 4, t = current % 4;
    for (int m = 0; m < 4; m++) {
        if (!transposed) {
            r[m] = warp[8 * m + g].row[t];
            continue;
        }
        unsigned halves[2];
        for (int e = 0; e < 2; e++) halves[e] = warp[8 * m + 2 * t + e].row[g / 2] >> 16 * (g % 2) & 0xffff;
        r[m] = halves[0] | halves[1] << 16;
    }
}

inline void unpack_halves(float* to, unsigned both) {
    to[0] = half_to_float((unsigned short)(both & 0xffff));
    to[1] = half_to_float((unsigned short)(both >> 16));
}

// D += A B of 8 * eights columns of A. An element of A in column k is held by the lanes with t = k % 8 / 2, as are those
// of B in row k.
inline void multiply(float (&d)[4], const unsigned* a, const unsigned* b, int eights, const char* what, int line) {
    Brought& own = bring();
    for (int i = 0; i < eights; i++) {
        unpack_halves(own.a + 4 * i, a[2 * i]), unpack_halves(own.a + 4 * i + 2, a[2 * i + 1]);
        unpack_halves(own.b + 2 * i, b[i]);
    }
    const Brought* const warp = meet(what, line);
    const int g = current % 32 / 4, column = 2 * (current % 4);
    for (int t = 0; t < 4; t++) {
        const float* const rows = warp[4 * g + t].a;
        const float *const left = warp[4 * column + t].b, *const right = warp[4 * (column + 1) + t].b;
        for (int k = 0; k < 2 * eights; k++) {
            const float upper = rows[k / 2 * 4 + k % 2], lower = rows[k / 2 * 4 + 2 + k % 2];
            d[0] += upper * left[k], d[1] += upper * right[k];
            d[2] += lower * left[k], d[3] += lower * right[k];
        }
    }
}

}  // namespace shim

inline void ldmatrix(unsigned (&r)[4], Shared row, int line = __builtin_LINE()) {
    shim::load_matrices(r, row, false, "ldmatrix", line);
}
inline void ldmatrix_trans(unsigned (&r)[4], Shared row, int line = __builtin_LINE()) {
    shim::load_matrices(r, row, true, "ldmatrix.trans", line);
}
inline void mma_k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b, int line = __builtin_LINE()) {
    const unsigned a[2] = {a0, a1};
    shim::multiply(d, a, &b, 1, "mma.m16n8k8", line);
}
inline void mma_k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    const unsigned b[2] = {b0, b1};
    shim::multiply(d, a, b, 2, "mma.m16n8k16", line);
}

// Until it is waited for, a copy may be done or not, and who reads what is there is wrong either way: it is NaN.
inline void copy_async(Shared to, const void* from, bool there, int line = __builtin_LINE()) {
    shim::Fiber& fiber = shim::fibers[shim::current];
    if (to % 16 || (Shared)from % 16) shim::fail("a copy between addresses that are not multiples of 16", line);
    if (!shim::is_shared((const char*)to)) shim::fail("a copy to an address that is not in shared memory", line);
    if (fiber.copies == shim::MOST_COPIES) shim::fail("more copies under way than the shim keeps", line);
    fiber.copy[fiber.copies++] = {to, there ? from : nullptr, fiber.groups};
    uint32_t* const words = (uint32_t*)to;
    for (int i = 0; i < 4; i++) words[i] = 0x7fd57fd5u;
}
inline void copies_commit() { shim::fibers[shim::current].groups++; }
template <int N>
inline void copies_wait() {
    shim::Fiber& fiber = shim::fibers[shim::current];
    int left = 0;
    for (int k = 0; k < fiber.copies; k++) {
        const shim::Copy copy = fiber.copy[k];
        if (copy.group >= fiber.groups - N) {
            fiber.copy[left++] = copy;
            continue;
        }
        uint64_t words[2] = {0, 0};
        if (copy.from) words[0] = ((const uint64_t*)copy.from)[0], words[1] = ((const uint64_t*)copy.from)[1];
        ((uint64_t*)copy.to)[0] = words[0], ((uint64_t*)copy.to)[1] = words[1];
    }
    fiber.copies = left;
}

inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline unsigned pack_halves(float low, float high) {
    return (unsigned)float_to_half(low) | (unsigned)float_to_half(high) << 16;
}
