// Reading a packed matrix (cpu/pack.py): what a thread takes of a chunk, its codes, its scales and its minima.
//
// A layout is spelled by macros (weights.py): VALUES, BITS, BLOCK, GROUP, OFFSET, SCALE, MINIMUM, JOINED, NUMBER,
// LANES, as the fields of `Layout` say. Nothing here knows a tensor type.
//
// A thread takes four rows of a chunk (32 inputs): 16 bytes of each of its BITS vectors, 4 LANES bytes apart, and
// beside them d, dmin, scales and minima of these rows, 1 to 16 bytes each. PARTS = LANES / 4 threads share a chunk, a
// warp takes STEP = 32 / PARTS chunks at a time: together all bytes of 32 BITS vectors, nothing read twice, every
// sector of 32 bytes whole. So what a scale costs (decoding, two conversions, the fma) is paid once in 32 products.
#pragma once
#include "common.cuh"
#include "stream.cuh"

#define V_CODES 0    // unsigned, less than 8 bits
#define V_BYTES 1    // signed bytes
#define V_TABLE 2    // places in a codebook of int8
#define V_TABLE16 3  // places in a codebook of 16-bit integers, two bytes each
#define N_F32 0
#define N_F16 1
#define N_E8M0 2
#define N_E4M3 3
#define S_NONE 0
#define S_SIGNED 1
#define S_UNSIGNED 2

#define PARTS (LANES / 4)
#define STEP (32 / PARTS)
#define VECTOR (4 * LANES)                 // bytes
#define CHUNK_NBYTES (BITS * VECTOR)
#define UNITS (GROUP == 16 ? 2 : 1)        // sums of a chunk, each with a scale and a minimum
#define D_UNITS (BLOCK == 16 ? 2 : 1)      // numbers d of a chunk
#define NUMBER_NBYTES (NUMBER == N_F32 ? 4 : NUMBER == N_F16 ? 2 : 1)
#define BLOCK_CHUNKS (BLOCK < 32 ? 1 : BLOCK / 32)
#define GROUP_CHUNKS (GROUP < 32 ? 1 : GROUP / 32)
#define IS_TABLE (VALUES == V_TABLE || VALUES == V_TABLE16)
#define PLANE_2 (BITS & 4)                 // first vector of the plane of 2 bits, of 1 bit
#define PLANE_1 (BITS & 6)

// The arrays of one strip.
struct Strip {
    const u8 *codes, *d, *scale, *dmin, *minimum;
};

__device__ __forceinline__ Strip strip_of(const u8* codes, const u8* d, const u8* scale, const u8* dmin,
                                          const u8* minimum, int strip, int chunks) {
    const size_t lanes = (size_t)strip * LANES;  // of one number a chunk: times chunks
    const size_t numbers = lanes * (chunks * D_UNITS / BLOCK_CHUNKS) * NUMBER_NBYTES;
    const size_t groups = lanes * (chunks * UNITS / GROUP_CHUNKS);
    return {codes + (size_t)strip * chunks * CHUNK_NBYTES, d + numbers, scale + groups, dmin + numbers,
            minimum + (JOINED == 6 ? groups / 2 : groups)};
}

// What a thread has read of a chunk, as it was read.
struct Chunk {
    u32 code[BITS][4];  // vector, row
    u32 d[D_UNITS][NUMBER_NBYTES], dmin[D_UNITS][NUMBER_NBYTES];
    u32 scale[UNITS][1], minimum[UNITS][1];
};

// Where a thread's codes of a chunk begin. A strip has less than 2**32 bytes.
__device__ __forceinline__ const u8* codes_at(const Strip& from, int chunk, int part) {
    return from.codes + (u32)(chunk * CHUNK_NBYTES + 16 * part);
}

// The vectors that hold codes of quads q and q + 4 and of no quads that are taken later, in the order q = 0 … 3.
__device__ __forceinline__ void load_codes(Chunk& to, const u8* codes, int q) {
    if (BITS == 8) {
        load_words(to.code[q], codes + q * VECTOR);
        load_words(to.code[(q + 4) % BITS], codes + (q + 4) * VECTOR);
        return;
    }
    if (BITS & 4) load_words(to.code[q % BITS], codes + q * VECTOR);
    if (BITS & 2 && q >= 2) load_words(to.code[(PLANE_2 + q % 2) % BITS], codes + (PLANE_2 + q % 2) * VECTOR);
    if (BITS & 1 && q == 3) load_words(to.code[PLANE_1 % BITS], codes + PLANE_1 * VECTOR);
}

// d, dmin, scales and minima.
__device__ __forceinline__ void load_scales(Chunk& to, const Strip& from, int chunk, int part) {
#pragma unroll
    for (int u = 0; u < D_UNITS; u++) {
        const u32 at = ((D_UNITS == 2 ? 2 * chunk + u : chunk / BLOCK_CHUNKS) * LANES + 4 * part) * NUMBER_NBYTES;
        load_words(to.d[u], from.d + at);
        if (MINIMUM) load_words(to.dmin[u], from.dmin + at);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const u32 group = UNITS == 2 ? 2 * chunk + u : chunk / GROUP_CHUNKS;
        const u32 at = group * LANES + 4 * part, joined_at = group / 2 * LANES + 4 * part;
        if (SCALE != S_NONE) load_words(to.scale[u], from.scale + at);
        if (JOINED == 6 && (UNITS == 1 || u == 0)) load_words(to.minimum[u], from.minimum + joined_at);
        if (JOINED == 0 && MINIMUM == 2) load_words(to.minimum[u], from.minimum + at);
    }
}

__device__ __forceinline__ void load_chunk(Chunk& to, const Strip& from, int chunk, int part) {
    const u8* codes = codes_at(from, chunk, part);
#pragma unroll
    for (int q = 0; q < 4; q++) load_codes(to, codes, q);
    load_scales(to, from, chunk, part);
}

// -- numbers -----------------------------------------------------------------------------------------------

// Byte k of a word as float32, exact: it becomes the low bits of 2**23.
__device__ __forceinline__ float byte_to_float(u32 word, int k) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | k)) - 8388608.0f;
}
__device__ __forceinline__ float signed_byte_to_float(u32 flipped, int k) {  // of a word ^ 0x80808080
    return __uint_as_float(__byte_perm(flipped, 0x4b000000u, 0x7440u | k)) - 8388736.0f;
}

// Number k of those that were read together.
__device__ __forceinline__ float number_at(const u32 (&raw)[NUMBER_NBYTES], int k) {
    if (NUMBER == N_F32) return __uint_as_float(raw[k % NUMBER_NBYTES]);
    if (NUMBER == N_F16) {
        const u32 word = raw[k / 2 % NUMBER_NBYTES];
        return half_to_float((u16)(k % 2 ? word >> 16 : word & 0xffffu));
    }
    const u32 byte = raw[0] >> 8 * k & 0xffu;
    if (NUMBER == N_E8M0) return __uint_as_float(byte < 2 ? 0x00200000u << byte : (byte - 1) << 23);
    return __uint_as_float(byte << 20) * 0x1p119f;  // e4m3: exponent and mantissa moved into place, subnormals too
}

// Scales of a group as they share bytes (pack.py), four rows: `high` is shifted so that this group's bits are lowest.
__device__ __forceinline__ u32 joined_scale(u32 low, u32 high) {
    return JOINED == 6 ? (low & 0x0f0f0f0fu) | (high & 0x03030303u) << 4 : low & 0x0f0f0f0fu;
}
__device__ __forceinline__ u32 joined_minimum(u32 low, u32 high) {
    return JOINED == 6 ? (low >> 4 & 0x0f0f0f0fu) | (high & 0x0c0c0c0cu) << 2 : low >> 4 & 0x0f0f0f0fu;
}

// d * scale and dmin * minimum of each unit and row, in float32.
__device__ __forceinline__ void scales_of(const Chunk& c, int chunk, float (&scale)[UNITS][4], float (&low)[UNITS][4]) {
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        u32 factors = SCALE != S_NONE ? c.scale[u][0] : 0, minima = MINIMUM == 2 && JOINED == 0 ? c.minimum[u][0] : 0;
        if (JOINED) {
            const u32 high = JOINED == 6 ? c.minimum[0][0] >> (UNITS == 2 ? 4 * u : chunk / GROUP_CHUNKS % 2 * 4) : 0;
            minima = joined_minimum(factors, high);
            factors = joined_scale(factors, high);
        }
        if (SCALE == S_SIGNED) factors ^= 0x80808080u;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            scale[u][r] = number_at(c.d[u % D_UNITS], r);
            if (SCALE == S_SIGNED) scale[u][r] = __fmul_rn(scale[u][r], signed_byte_to_float(factors, r));
            if (SCALE == S_UNSIGNED) scale[u][r] = __fmul_rn(scale[u][r], byte_to_float(factors, r));
            low[u][r] = 0.0f;
            if (MINIMUM) low[u][r] = number_at(c.dmin[u % D_UNITS], r);
            if (MINIMUM == 2) low[u][r] = __fmul_rn(low[u][r], byte_to_float(minima, r));
        }
    }
}

// -- codes -------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shifted(u32 word, int right) { return right >= 0 ? word >> right : word << -right; }

// Four codes, inputs 4q … 4q + 3 of row r, a byte each; signed bytes as they are.
__device__ __forceinline__ u32 quad_of(const u32 (&code)[BITS][4], int q, int r) {
    if (BITS == 8) return code[q % BITS][r];
    const int low_2 = BITS & 4, low_1 = BITS & 6;
    u32 out = 0;
    if (BITS & 4) out = code[q % 4 % BITS][r] >> 4 * (q / 4) & 0x0f0f0f0fu;
    if (BITS & 2) out |= shifted(code[(PLANE_2 + q % 2) % BITS][r], 2 * (q / 2) - low_2) & 0x03030303u << low_2;
    if (BITS & 1) out |= shifted(code[PLANE_1 % BITS][r], q - low_1) & 0x01010101u << low_1;
    return out;
}

#if VALUES == V_TABLE || VALUES == V_TABLE16
// The codes of quads q (low nibbles) and q + 4 (high nibbles) of row r, q < 4.
__device__ __forceinline__ u32 nibbles_of(const u32 (&code)[BITS][4], int q, int r) {
    if (BITS == 4) return code[q % BITS][r];
    u32 out = 0;
    if (BITS & 2) out = code[q % 2 % BITS][r] >> 2 * (q / 2) & 0x33333333u;
    if (BITS & 1) out |= shifted(code[PLANE_1 % BITS][r], q - PLANE_1) & 0x11111111u << PLANE_1;
    return out;
}

// The codebook's bytes for quads q and q + 4: `__byte_perm` takes four bytes of eight by the low half of a word of
// nibbles. Of 16 entries, bit 3 of each nibble says which of two such choices.
__device__ __forceinline__ void look_up(const u32 (&table)[4], u32 nibbles, u32& first, u32& second) {
    u32 even, odd;  // entries of bytes 0 and 1 of both quads, of bytes 2 and 3
    if (BITS < 4) {
        even = __byte_perm(table[0], table[1], nibbles);
        odd = __byte_perm(table[0], table[1], nibbles >> 16);
    } else {
        const u32 low = nibbles & 0x77777777u, which = (nibbles >> 1 & 0x44444444u) | 0x32103210u;
        even = __byte_perm(__byte_perm(table[0], table[1], low), __byte_perm(table[2], table[3], low), which);
        odd = __byte_perm(__byte_perm(table[0], table[1], low >> 16), __byte_perm(table[2], table[3], low >> 16),
                          which >> 16);
    }
    first = __byte_perm(even, odd, 0x6420u);
    second = __byte_perm(even, odd, 0x7531u);
}
#endif

// The bytes that meet int8 inputs, of quads q and q + 4 of row r: codes, or what the table says.
__device__ __forceinline__ void pair_of(const Chunk& c, const u32 (&table)[4], int q, int r, int& first, int& second) {
#if VALUES == V_TABLE || VALUES == V_TABLE16
    u32 a, b;
    look_up(table, nibbles_of(c.code, q, r), a, b);
    first = (int)a, second = (int)b;
#else
    first = (int)quad_of(c.code, q, r), second = (int)quad_of(c.code, q + 4, r);
#endif
}
