"""The IQ types' encoders with importance, and those of one to three bits: ggml's bytes, and its aborts as refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from ggufkit_formats.blocks import find
from ggufkit_formats.errors import FormatError, UsageError
from nasty_weights import COLS, finite_rows, large_rows
from oracles.ggml import Ggml, GgmlDied

FOUR_BITS = ["IQ4_NL", "IQ4_XS"]
GRIDS = ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"]
SLOW_TO_BEGIN = ["IQ2_S", "IQ1_S", "IQ1_M"]
WITH_IMPORTANCE_ONLY = {"IQ2_XS", "IQ2_XXS", "IQ1_S"}
ROWS = {name: rows.astype(np.float32) for name, rows in finite_rows(seed=9)}


def few(most: int) -> np.ndarray:
    """At most so many rows of each kind, from its end."""
    return np.concatenate([rows[-most:] for rows in ROWS.values()])


def importances() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(10)
    kinds = {
        "ordinary": rng.chisquare(1, COLS),
        "zeros among them": rng.random(COLS) * (rng.random(COLS) < 0.5),
        "zeros": np.zeros(COLS),
        "ones": np.ones(COLS),
        "every magnitude": 10.0 ** rng.uniform(-20, 6, COLS),
        "one outlier": np.where(np.arange(COLS) == 77, 1e6, 1e-3),
    }
    return {name: kind.astype(np.float32) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def ggml() -> Iterator[Ggml]:
    oracle = Ggml()
    yield oracle
    oracle.close()


def assert_same(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    rows = np.flatnonzero((ours != theirs).any(axis=1))
    if len(rows):
        at = np.flatnonzero(ours[rows[0]] != theirs[rows[0]])
        pytest.fail(f"{what}: {len(rows)} of {len(ours)} rows differ, the first at {rows[0]} in bytes {at[:10]}")


def cases(name: str, most: int) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(what, rows, importance) of a type, at most so many rows of a kind.

    In rows of several blocks importance goes by the column, not by the block. A group of zeros leads there, too, where
    IQ3_S moves what follows it.
    """
    rows, rng = few(most), np.random.default_rng(4)
    for what, importance in importances().items():
        yield f"{name}, {what}", rows, importance
    if name not in WITH_IMPORTANCE_ONLY:
        yield f"{name} without importance", rows, None
    x = rng.standard_normal((5, 768)).astype(np.float32)
    x[1:3, :96] = x[3, 288:320] = 0
    yield f"{name}, rows of several blocks", x, rng.random(768).astype(np.float32)


# The first characters of the SHA-256 of what ggml makes of the cases, where it takes many seconds to begin: `python
# test_encode_iq.py` asks it again.
GOLDEN = {"IQ2_S": "d2fffd1343551676", "IQ1_S": "473444718655efea", "IQ1_M": "cf07fde7474abc1d"}


def digest(parts: Iterable[np.ndarray]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.tobytes())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize("name", [name for name in [*FOUR_BITS, *GRIDS] if name not in SLOW_TO_BEGIN])
def test_bytes_of_ggml(name: str, ggml: Ggml) -> None:
    t = find(name)
    for what, rows, importance in cases(name, 40 if name in FOUR_BITS else 3):
        assert_same(t.encode(rows, importance), ggml.quantize(t.id, rows, importance), what)


@pytest.mark.parametrize("name", SLOW_TO_BEGIN)
def test_bytes_that_ggml_gave(name: str) -> None:
    t = find(name)
    assert digest(t.encode(rows, importance) for _, rows, importance in cases(name, 3)) == GOLDEN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOUR_BITS, *GRIDS])
def test_bytes_of_ggml_on_many_rows(name: str, ggml: Ggml) -> None:
    t = find(name)
    for what, rows, importance in cases(name, 60):
        assert_same(t.encode(rows, importance), ggml.quantize(t.id, rows, importance), what)


@pytest.mark.parametrize("name", sorted(WITH_IMPORTANCE_ONLY))
def test_types_that_need_importance_say_so(name: str) -> None:
    for rows in (ROWS["normal"], ROWS["normal"][:0]):
        with pytest.raises(UsageError, match=f"{name} is encoded with importance only: one weight per column"):
            find(name).encode(rows)
    assert find(name).encode(ROWS["normal"][:0], np.ones(COLS, np.float32)).shape[0] == 0


@pytest.mark.parametrize("name", [*GRIDS])
def test_refuses_what_ggml_aborts_on(name: str) -> None:
    """From 1e15 on at the latest ggml's searches overflow, and it ends the process."""
    t, importance = find(name), np.ones(COLS, np.float32)
    for x in list(large_rows())[::20]:
        largest = np.abs(x).max()
        if largest < 1e6:
            t.encode(x, importance)
        elif largest > 1e15 or 1e8 < largest < 1e9:
            with pytest.raises(FormatError, match=f"weights are too large for {name}: scale not finite in float16"):
                t.encode(x, importance)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_what_ggml_aborts_on_and_what_it_would_not_load(name: str, ggml: Ggml) -> None:
    t, importance = find(name), np.ones(COLS, np.float32)
    for x in list(large_rows())[::12]:
        largest = np.abs(x).max()
        try:
            theirs = ggml.quantize(t.id, x, importance)
            valid = ggml.validate(t.id, theirs)
        except GgmlDied:
            valid = False
        if valid and largest < 1e15:
            assert_same(t.encode(x, importance), theirs, f"{name} at {largest:g}")
        else:
            with pytest.raises(FormatError, match=f"weights are too large for {name}: scale not finite in float16"):
                t.encode(x, importance)


@pytest.mark.parametrize("name", [*FOUR_BITS, *GRIDS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_weights_that_are_not_finite(name: str, bad: float) -> None:
    x = np.zeros((2, COLS), np.float32)
    x[1, 77] = bad
    with pytest.raises(FormatError, match=f"NaN or infinite weights cannot be quantized to {name}"):
        find(name).encode(x, np.ones(COLS, np.float32))


def test_errors_are_of_the_size_that_the_bits_allow() -> None:
    x, importance = ROWS["normal"][:40], np.ones(COLS, np.float32)
    most = {"IQ4": 0.09, "IQ3": 0.26, "IQ2": 0.42, "IQ1": 0.66}
    for name in [*FOUR_BITS, *GRIDS]:
        t = find(name)
        error = np.sqrt(np.mean((t.decode(t.encode(x, importance)) - x) ** 2))
        assert 0.03 < error < most[name[:3]], (name, error)


if __name__ == "__main__":
    oracle = Ggml()
    for slow in SLOW_TO_BEGIN:
        print(slow, digest(oracle.quantize(find(slow).id, x, w) for _, x, w in cases(slow, 3)))
    oracle.close()
