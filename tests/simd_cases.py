"""A compact set of runs of the CPU's kernels, over all arithmetic that a family of instructions does its own way.

`run()` runs it here, compares each result with the definition, and returns the results by name; tests/test_simd.py
asks for it in processes that are told another family, tools/emulate on other processors.

    python simd_cases.py OUT.npz [few|products] [attention] [others] [types]    run (or the first three), write results
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TYPES, find
from ggufkit_formats.tensor import Tensor
from ggufkit_kernels.cpu.ops import CpuOps
from ggufkit_kernels.cpu.simd import FAMILY
from ggufkit_kernels.ops_ref import RefOps
from memory_tensors import MadeUp, decoded, from_raw, random_blocks

# Layouts that differ in what a family does: an offset, scales and minima, two units of 16, signed bytes, a table, a
# table of 16-bit numbers, two d in 32 inputs. The first four are those of Q4_0, Q4_K, Q6_K and Q8_0.
QUANTIZED: dict[str, MadeUp] = {
    "offset": MadeUp(4, 32, 32, offset=8),
    "minima": MadeUp(4, 256, 32, scale="u1", dmin=True, minimum=True),
    "units of 16": MadeUp(6, 256, 16, offset=32, scale="i1"),
    "bytes": MadeUp(8, 32, 32, offset=128),
    "table": MadeUp(4, 32, 32, codebook=np.array([-127, *range(-104, 105, 16), 127], np.int8)),
    "fine table": MadeUp(4, 64, 64, d="<f4", codebook=np.linspace(-1, 1, 16).astype(np.float32) ** 3),
    "two d": MadeUp(5, 16, 16, offset=16, dmin=True),
}
FEW = ("minima", "units of 16", "bytes")  # where each kernel that is compiled counts
ALONE = ("offset", "fine table")  # those that are run with one token too: each is a kernel more
PARTS = ("products", "attention", "others")
MORE = (*PARTS, "types")
ROWS, COLS, TOKENS = 21, 512, 11  # ragged for 16 lanes and for 8, and for tiles of 8 and of 4


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded_inputs(x: np.ndarray) -> np.ndarray:
    """What the kernels make of inputs (n, cols): int8 per 32 with a float32 scale; as float64."""
    parts = x.reshape(len(x), -1, 32)
    largest = np.abs(parts).max(axis=2, keepdims=True).astype(np.float64)
    inverse = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 1e-30).astype(np.float32)
    scale = (largest / 127).astype(np.float32)
    return (np.rint(parts * inverse) * scale.astype(np.float64)).reshape(x.shape)


def near(got: np.ndarray, want: np.ndarray, bound: np.ndarray | float, what: str) -> np.ndarray:
    assert got.shape == want.shape and got.dtype == np.float32, what
    wrong = ~(np.abs(got - want) <= bound)
    assert not wrong.any(), f"{what}: {np.argwhere(wrong)[:3].tolist()}, {got[wrong][:3]} for {want[wrong][:3]}"
    return got


def same(got: np.ndarray, want: np.ndarray, what: str) -> np.ndarray:
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), what
    return got


def product(tensor: Tensor, x: np.ndarray, ops: CpuOps, what: str, scale: float = 1.0) -> np.ndarray:
    """ops.matmul, compared with the rounded inputs times the decoded weights (times `scale`), in float64."""
    weight = ops.weight(tensor, scale)
    values = scale * decoded(tensor)
    inputs = x.astype(np.float64) if weight.packed.layout.is_plain else rounded_inputs(x)
    want, size = inputs @ values.T, np.abs(inputs) @ np.abs(values).T
    loose = 1e-4 if weight.packed.layout.values == "table16" else 1e-5  # its levels are rounded to 16 bits
    # a minimum is subtracted after the sums: rounding goes with the parts, not with the difference
    low = np.abs(inputs).sum(axis=1, keepdims=True) * np.abs(values).max() if weight.packed.layout.minimum else 0
    return near(ops.matmul(weight, x), want, loose * size + 1e-6 * low + 1e-6, what)


def random_products(ops: CpuOps, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        t = QUANTIZED[name]
        tensor = random_blocks(t, ROWS, COLS, np.random.default_rng(1))
        weight, exact = ops.weight(tensor), RefOps().weight(tensor)
        ids = np.arange(ROWS)[::-1]
        yield f"embed, {name}", same(ops.embed(weight, ids), RefOps().embed(exact, ids), name)
        many = product(tensor, normal(2, TOKENS, COLS), ops, name)
        yield f"product, {name}", many
        if name in ALONE:
            for i in (0, TOKENS - 1):
                same(ops.matmul(weight, normal(2, TOKENS, COLS)[i : i + 1]), many[i : i + 1], f"one token, {name}")


def plain_products(ops: CpuOps) -> Iterator[tuple[str, np.ndarray]]:
    for name, n in (("F16", TOKENS), ("F16", 1), ("BF16", 1)):
        tensor = random_blocks(find(name), ROWS, COLS, np.random.default_rng(1))
        yield f"plain product, {name}, {n}", product(tensor, normal(3, n, COLS), ops, name)


def typed_products(ops: CpuOps) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor type there is, with a tile of tokens and with one."""
    for name, t in TYPES.items():
        tensor = random_blocks(t, ROWS, COLS, np.random.default_rng(6))
        for n in (TOKENS, 1):
            yield f"product, {name}, {n}", product(tensor, normal(7, n, COLS), ops, f"{name} {n}")
    for name in ("TQ1_0", "TQ2_0"):  # with a scale beside the matrix, which makes d a float32
        tensor = random_blocks(TYPES[name], ROWS, COLS, np.random.default_rng(6))
        for n in (TOKENS, 1):
            yield f"product, {name} scaled, {n}", product(tensor, normal(7, n, COLS), ops, f"{name} {n}", 0.3)


def extreme_blocks(t: MadeUp) -> Iterator[Tensor]:
    """Weights whose codes, scales and minima are all at one end or the other, or change from one to the next."""
    blocks = np.zeros(ROWS * COLS // t.block, t.fields)
    blocks["d"] = 1
    names = t.fields.names or ()
    if "dmin" in names:
        blocks["dmin"] = 1
    most = (1 << t.bits) - 1
    ends = {"i1": (-128, 127), "u1": (255, 1)}
    for low, high in ((0, 0), (most, most), (0, most)):
        blocks["codes"][:, ::2], blocks["codes"][:, 1::2] = low, high
        for which in (0, 1):
            if "scale" in names:
                blocks["scale"] = ends["i1" if t.fields["scale"].base == np.int8 else "u1"][which]
            if "minimum" in names:
                blocks["minimum"] = 255 * which
            yield from_raw(t, blocks.copy(), (ROWS, COLS))


def extreme_inputs() -> np.ndarray:
    """Inputs that become 127 and -127: all of one sign, changing by ones, twos and fours, at random, and zeros."""
    x = np.full((TOKENS, COLS), 127, np.float32)
    x[1] = -127
    for row, step in ((2, 1), (3, 2), (4, 4)):
        x[row, np.arange(COLS) // step % 2 == 1] = -127
    x[5:8] *= np.random.default_rng(5).choice([-1, 1], (3, COLS))
    x[8] = 0
    x[9, :] = 0
    x[9, 33] = 1e-38  # below what is told from nothing
    return x


def extreme_products(ops: CpuOps, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    x = extreme_inputs()
    for name in names:
        t = QUANTIZED[name]
        for k, tensor in enumerate(extreme_blocks(t)):
            got = product(tensor, x, ops, f"extreme {name} {k}")
            assert not got[8:10].any(), f"zeros, {name}"
            yield f"extreme, {name}, {k}", got


def not_finite(ops: CpuOps, names: Iterable[str]) -> None:
    """An input that is infinite or NaN shows in all of its token's outputs and in no other's."""
    x = normal(4, TOKENS, COLS)
    for name in names:
        weight = ops.weight(random_blocks(QUANTIZED[name], ROWS, COLS, np.random.default_rng(1)))
        want = ops.matmul(weight, x)
        for row, (bad, at) in enumerate(((np.inf, 0), (-np.inf, 77), (np.nan, COLS - 1), (np.nan, 8))):
            spoiled = x.copy()
            spoiled[row, at] = bad
            got = ops.matmul(weight, spoiled)
            assert not np.isfinite(got[row]).any(), f"{bad} at {at}, {name}"
            same(np.delete(got, row, 0), np.delete(want, row, 0), f"beside {bad}, {name}")


def attention(ops: CpuOps) -> Iterator[tuple[str, np.ndarray]]:
    other = RefOps(np.float16)
    heads, kv_heads, dim = 6, 2, 20
    mine, theirs = ops.cache(1, kv_heads, dim, 512), other.cache(1, kv_heads, dim, 512)
    start = 0
    for step, n in enumerate((4, 1, 250, 4, 1)):  # past the first split of positions
        q, k, v = normal(step, n, heads, dim), normal(step + 20, n, kv_heads, dim), normal(step + 40, n, kv_heads, dim)
        want = other.attend(q, k, v, theirs, 0, start, 0.3)
        yield f"attention {step}", near(ops.attend(q, k, v, mine, 0, start, 0.3), want, 1e-5, f"attention {step}")
        start += n
        mine.length = theirs.length = start


def others(ops: CpuOps) -> Iterator[tuple[str, np.ndarray]]:
    ref = RefOps()
    x, weight = normal(1, 3, 93), normal(2, 93)
    yield "rmsnorm", near(ops.rmsnorm(x, weight, 1e-5), ref.rmsnorm(x, weight, 1e-5), 1e-5, "rmsnorm")
    freqs = 1 / 10000 ** (np.arange(19) / 19)
    for interleaved in (False, True):
        heads = normal(3, 4, 3, 40)
        want = ref.rope(heads.copy(), 4000, freqs, interleaved, 1.2)
        got = ops.rope(heads.copy(), 4000, freqs, interleaved, 1.2)
        yield f"rope {interleaved}", near(got, want, 1e-5, "rope")
    gate, up = 20 * normal(4, 1, 101), normal(5, 1, 101)
    gate[0, :8] = [-200, -88, -1e-30, 0, 1e-30, 88, 200, 3e38]
    up[0, :8] = 1
    want = ref.swiglu(gate.copy(), up)
    yield "swiglu", near(ops.swiglu(gate.copy(), up), want, 2e-6 * np.abs(want) + 1e-30, "swiglu")
    finite = np.minimum(gate, 1e18)
    want = ref.relu2(finite.copy(), up)
    yield "relu2", near(ops.relu2(finite.copy(), up), want, 2e-6 * np.abs(want) + 1e-30, "relu2")
    yield "add", same(ops.add(gate.copy(), up), gate + up, "add")
    logits = normal(12, 1, 5003)
    yield "top", same(ops.top(logits, 40)[1], np.sort(logits[0])[:-41:-1], "top")


def run(ops: CpuOps, parts: Iterable[str] = PARTS) -> dict[str, np.ndarray]:
    """The parts' results by name; AssertionError says what differs from the definition."""
    out: dict[str, np.ndarray] = {}
    if "few" in parts or "products" in parts:
        names = tuple(QUANTIZED) if "products" in parts else FEW
        not_finite(ops, names)
        out |= dict([*random_products(ops, names), *extreme_products(ops, names)])
    if "products" in parts:
        out |= dict(plain_products(ops))
    if "types" in parts:
        out |= dict(typed_products(ops))
    if "attention" in parts:
        out |= dict(attention(ops))
    if "others" in parts:
        out |= dict(others(ops))
    return out


if __name__ == "__main__":
    results = run(CpuOps(1), sys.argv[2:] or PARTS)
    arrays: Any = results
    np.savez(sys.argv[1], **arrays)
    print(f"{FAMILY.name}: {len(results)} results as defined")
