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
    blocks.py     vectors of any length with operators, for encoding
    atomics.py    atomic words, a pause, a call through an address: what a team of threads needs
"""

from __future__ import annotations

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ..jit import Later
from .target import BIAS, FAMILIES, FAMILY, FEATURES, GROUP, LANES, QUAD, SETTING, compiled_features, planes

if TYPE_CHECKING:
    from .atomics import add_atomic, call, give_way, load_acquire, pause, store_release, swap_if
    from .blocks import (
        all_of,
        any_of,
        as_bytes,
        as_float,
        at_least,
        at_least_zero,
        at_most,
        bits_of,
        choose,
        even_lanes,
        extended,
        first_half,
        float_of,
        greatest,
        half_floats,
        halves,
        highest,
        highest_word,
        lanes_to_rows,
        least,
        load_bytes,
        load_floats,
        load_words,
        lowest,
        lowest_bit,
        magnitude,
        mask_bits,
        odd_lanes,
        prefetch,
        prefetch_ahead,
        repeat,
        root,
        rows_to_lanes,
        scatter,
        second_half,
        store_vector,
        truncated,
        whole,
    )
    from .tiles import (
        add_columns,
        add_dots,
        add_floats,
        add_outer,
        add_products,
        dot_pairs,
        load_tile,
        store_outer,
        store_starts,
        store_sums,
        store_tile,
        sum_tile,
        zeros_f32,
        zeros_i32,
    )
    from .values import (
        add_f32,
        bits_f32,
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
        largest_f32,
        largest_magnitude,
        load_codes,
        load_f32,
        load_minimum,
        load_number,
        load_scale,
        load_u8,
        max_f32,
        max_i32,
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
    from .words import (
        add_term,
        copy_bytes,
        get_i32,
        put_i64,
        read_at,
        splat_words,
        store_low,
        turn_halves,
        turn_words,
    )

__all__ = [
    "BIAS",
    "FAMILIES",
    "FAMILY",
    "FEATURES",
    "GROUP",
    "LANES",
    "QUAD",
    "SETTING",
    "add_atomic",
    "add_columns",
    "add_dots",
    "add_f32",
    "add_floats",
    "add_outer",
    "add_products",
    "add_term",
    "all_of",
    "any_of",
    "as_bytes",
    "as_float",
    "at_least",
    "at_least_zero",
    "at_most",
    "bits_f32",
    "bits_of",
    "call",
    "choose",
    "compiled_features",
    "copy_bytes",
    "div_f32",
    "dot_pairs",
    "even_lanes",
    "exp_f32",
    "extended",
    "first_f32",
    "first_half",
    "float_i32",
    "float_of",
    "fma_f32",
    "get_f32",
    "get_i8",
    "get_i32",
    "get_i64",
    "get_number",
    "get_u8",
    "give_way",
    "greatest",
    "half_floats",
    "halves",
    "highest",
    "highest_word",
    "lanes_to_rows",
    "largest_f32",
    "largest_magnitude",
    "least",
    "load_acquire",
    "load_bytes",
    "load_codes",
    "load_f32",
    "load_floats",
    "load_minimum",
    "load_number",
    "load_scale",
    "load_tile",
    "load_u8",
    "load_words",
    "lowest",
    "lowest_bit",
    "magnitude",
    "mask_bits",
    "max_f32",
    "max_i32",
    "mul_f32",
    "neg_f32",
    "odd_lanes",
    "pause",
    "planes",
    "prefetch",
    "prefetch_ahead",
    "put_f16",
    "put_f32",
    "put_i64",
    "read_at",
    "repeat",
    "root",
    "round_f32",
    "rows_to_lanes",
    "scatter",
    "second_half",
    "splat_f32",
    "splat_i32",
    "splat_words",
    "store_f32",
    "store_i8",
    "store_low",
    "store_outer",
    "store_release",
    "store_starts",
    "store_sums",
    "store_tile",
    "store_vector",
    "sum_f32",
    "sum_tile",
    "swap_if",
    "truncated",
    "turn_halves",
    "turn_words",
    "whole",
    "zeros_f32",
    "zeros_i32",
]


def __getattr__(name: str) -> Any:
    """All but target.py generates code, and needs Numba: a kernel's source gets a name that is looked up later."""
    if name not in __all__:
        raise AttributeError(f"simd has no {name}")
    found = globals()[name] = Later(lambda: _look_up(name))
    return found


def _look_up(name: str) -> Any:
    for file in ("values", "tiles", "blocks", "words", "atomics"):
        found = getattr(import_module(f".{file}", __name__), name, None)
        if found is not None and not isinstance(found, FunctionType):  # a code generator's building block
            return found
    raise AttributeError(f"simd has no {name}")
