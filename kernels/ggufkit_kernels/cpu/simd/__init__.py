"""Vector values for Numba: the only folder that knows LLVM, the width of a vector, and the processor's instructions.

A kernel written with these functions reads like arithmetic, and its values stay in registers:

    u8    4 LANES bytes: four consecutive inputs (a *quad*) of each of LANES rows
    i16   2 LANES int16: two partial sums a row
    i32   LANES int32, one a row
    f32   LANES float32, one a row

A *tile* is a fixed number of such vectors, one a token; `Codes` are the bit planes of 32 inputs x LANES rows, as
pack.py lays them out. Memory is addressed by int64 addresses; the callers check sizes before a kernel runs.

    target.py     what is compiled for: instruction sets, the width, how bytes are multiplied
    build.py      building blocks of the code generators
    products.py   codes out of bit planes; the instructions that multiply and sum bytes
    values.py     types, loads, stores, arithmetic on one vector
    tiles.py      tiles and the steps of a matmul
    words.py      raw words of LANES rows side by side, for packing
    atomics.py    atomic words, a pause, a call through an address: what a team of threads needs
"""

from .atomics import add_atomic, call, give_way, load_acquire, pause, store_release, swap_if
from .products import planes
from .target import BIAS, FAMILIES, FAMILY, FEATURES, LANES, QUAD, SETTING, compiled_features
from .tiles import (
    add_columns,
    add_dots,
    add_floats,
    add_outer,
    add_products,
    dot_pairs,
    store_outer,
    store_starts,
    store_sums,
    store_tile,
    sum_tile,
    zeros_f32,
    zeros_i32,
)
from .values import (
    abs_f32,
    add_f32,
    div_f32,
    exp_f32,
    first_f32,
    float_i32,
    fma_f32,
    get_f32,
    get_i8,
    get_i64,
    get_number,
    get_u8,
    intrinsic,
    largest_f32,
    load_bytes,
    load_codes,
    load_f32,
    load_number,
    load_u8,
    max_f32,
    mul_f32,
    neg_f32,
    put_f16,
    put_f32,
    round_f32,
    splat_f32,
    splat_i32,
    store_f32,
    store_i8,
    sum_f32,
)
from .words import add_term, copy_bytes, get_i32, put_i64, read_at, store_low, turn_halves, turn_words

__all__ = [
    "BIAS",
    "FAMILIES",
    "FAMILY",
    "FEATURES",
    "LANES",
    "QUAD",
    "SETTING",
    "abs_f32",
    "add_atomic",
    "add_columns",
    "add_dots",
    "add_f32",
    "add_floats",
    "add_outer",
    "add_products",
    "add_term",
    "call",
    "compiled_features",
    "copy_bytes",
    "div_f32",
    "dot_pairs",
    "exp_f32",
    "first_f32",
    "float_i32",
    "fma_f32",
    "get_f32",
    "get_i8",
    "get_i32",
    "get_i64",
    "get_number",
    "get_u8",
    "give_way",
    "intrinsic",
    "largest_f32",
    "load_acquire",
    "load_bytes",
    "load_codes",
    "load_f32",
    "load_number",
    "load_u8",
    "max_f32",
    "mul_f32",
    "neg_f32",
    "pause",
    "planes",
    "put_f16",
    "put_f32",
    "put_i64",
    "read_at",
    "round_f32",
    "splat_f32",
    "splat_i32",
    "store_f32",
    "store_i8",
    "store_low",
    "store_outer",
    "store_release",
    "store_starts",
    "store_sums",
    "store_tile",
    "sum_f32",
    "sum_tile",
    "swap_if",
    "turn_halves",
    "turn_words",
    "zeros_f32",
    "zeros_i32",
]
