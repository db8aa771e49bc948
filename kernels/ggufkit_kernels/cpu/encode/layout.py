"""How the encoders of the K types see their weights: LANES blocks side by side, a few groups of them at a time.

The weights of LANES blocks are turned once, so that lane b of a vector belongs to block b. A *tile* is `tile` groups of
those blocks side by side: a vector of tile * LANES lanes holds weight i of each, group after group. It takes several
registers, so several chains of additions are in flight, which hides how long one takes. What is done once a block
takes vectors of LANES.

    columns   weight i of group g of the LANES blocks: byte column(g, i, k, tile), float32; rows of a tile follow
              one another
    codes     weight j of the LANES blocks: byte ROW * j, int32, j = 0…255

Of all time of Q4_K on a Zen 3, turning takes 6 %, half of it for waiting for memory (10 % without fetching the next
blocks ahead), packing codes 1 to 2 %: words of four codes are made in lanes, and turned back eight at a time.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    as_float,
    bits_of,
    greatest,
    lanes_to_rows,
    least,
    load_words,
    prefetch,
    repeat,
    rows_to_lanes,
    scatter,
    store_vector,
)

F32 = np.float32
ROW = 4 * LANES  # bytes of a number for each of the blocks
MAGIC = F32(12582912)  # 1.5 * 2**23: the sum's low bits hold the integer
ZERO, ONE = F32(0), F32(1)
NOT_FINITE, NOT_FINITE_HALF = 0x7F800000, 0x7C00  # bits of a magnitude from here on are infinite or NaN


@kernel(inline="always")
def column(g, i, k, tile):
    """The byte of weight i of group g of k weights in `columns`."""
    return ((g // tile * k + i) * tile + g % tile) * ROW


@kernel(inline="always")
def nearest(x):
    """int32 nearest to float32, halves to even, for |x| < 2**22; else what the bits give, as in ggml."""
    return (bits_of(x + MAGIC) & 0x7FFFFF) - 0x400000


@kernel(inline="always")
def between(x, low, high):
    """An int32 vector between two integers."""
    return least(greatest(x, low), high)


@kernel(inline="always")
def clipped(x, low, high):
    """nearest(x) between two integers, as a float."""
    return as_float(between(nearest(x), low, high))


@kernel
def load_columns(x, columns, k, tile):
    """LANES blocks of 256 float32 -> columns of groups of k. The next LANES blocks are fetched meanwhile."""
    for j in range(0, LANES * 1024, 64):
        prefetch(x + LANES * 1024 + j)
    for j in range(0, 256, LANES):
        rows_to_lanes(x + 4 * j, 1024, columns + column(j // k, j % k, k, tile), tile * ROW)


def packer(right, mask, step, count, bits):
    """The kernel that puts `count` codes of 32 weights each into 32 bytes a block, which lie `stride` bytes apart.

    Byte j holds `bits` bits of each of the codes j + step * p, p = 0… from below: those that are left after a code is
    shifted `right` and masked. `words` is scratch, 8 rows.
    """

    @kernel
    def pack(codes, words, out, stride):
        for q in range(8):
            word = repeat(0, LANES)
            for j in range(4):
                for p in range(count):
                    code = (load_words(codes + (4 * q + j + step * p) * ROW, LANES) >> right) & mask
                    word = word | (code << (8 * j + bits * p))
            store_vector(words + q * ROW, word)
        lanes_to_rows(words, out, stride)

    return pack


pack_nibbles = packer(0, 15, 32, 2, 4)
pack_far_nibbles = packer(0, 15, 64, 2, 4)
pack_pairs = packer(0, 3, 32, 4, 2)
pack_high_pairs = packer(4, 3, 32, 4, 2)
pack_third_bits = packer(2, 1, 32, 8, 1)
pack_fifth_bits = packer(4, 1, 32, 8, 1)


@kernel
def pack_block(codes, out, stride):
    """32 codes below 16 after a mask -> 16 bytes a block, `stride` apart: the first half in the low nibbles."""
    for q in range(4):
        word = repeat(0, LANES)
        for j in range(4):
            at = codes + (4 * q + j) * ROW
            low, high = load_words(at, LANES) & 15, load_words(at + 16 * ROW, LANES) & 15
            word = word | (low << (8 * j)) | (high << (8 * j + 4))
        scatter(out + 4 * q, stride, word)


@kernel
def pack_word(codes, out, stride):
    """The fifth bits of 32 codes -> one word a block, `stride` apart."""
    word = repeat(0, LANES)
    for j in range(32):
        word = word | (((load_words(codes + j * ROW, LANES) >> 4) & 1) << j)
    scatter(out, stride, word)


@kernel
def pack_six_bits(codes, out, stride):
    """16 codes of 6 bits -> 12 bytes a block, `stride` apart: the low nibbles of 0-7 and 8-15, then all upper bits."""
    first = second = third = repeat(0, LANES)
    for g in range(16):
        code = load_words(codes + g * ROW, LANES)
        low = (code & 15) << (8 * (g % 4) + 4 * (g // 8))
        if g % 8 < 4:
            first = first | low
        else:
            second = second | low
        third = third | ((code >> 4) << (8 * (g % 4) + 2 * (g // 4)))
    scatter(out, stride, first)
    scatter(out + 4, stride, second)
    scatter(out + 8, stride, third)
