"""Ternary types: lossless for ternary weights, and scales by the mean magnitude and by search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from ggufkit_formats import gguf
from ggufkit_formats.blocks import find
from ggufkit_kernels.cpu.encode.four_levels import best_scales

import ggufkit
from ggufkit.convert import convert
from ggufkit.quantize import ternary

LEVELS = {"TQ1_0": (-1, 0, 1), "TQ2_0": (-1, 0, 1), "Q2_0": (-1, 0, 1, 2)}


def weights(seed: int = 1, rows: int = 8, cols: int = 512) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32) * np.float32(0.02)


def rmse(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)))


@pytest.mark.parametrize("name", ternary.TYPES)
def test_blocks_put_together_are_blocks_taken_apart(name: str) -> None:
    kind: Any = find(name)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, len(LEVELS[name]), (20, kind.block)).astype(np.uint8)
    d = rng.standard_normal(20).astype(np.float16).astype(np.float32)
    got = kind.decode(kind.assemble(d, codes))
    assert np.array_equal(got, d[:, None] * (codes.astype(np.float32) - 1))


@pytest.mark.parametrize("name", ternary.TYPES)
def test_absmean_is_the_papers_formula(name: str) -> None:
    x = weights()
    x[0, :256] = 0
    gamma = float(np.abs(x.astype(np.float64)).mean())
    assert ternary.mean_magnitude([x[:3], x[3:]]) == pytest.approx(gamma, rel=1e-12)
    want = np.array([[max(-1, min(1, round(float(w) / gamma))) for w in row] for row in x])
    got = find(name).decode(ternary.absmean(find(name), x, gamma))  # type: ignore[arg-type]
    assert np.array_equal(got, want * np.float32(np.float16(gamma)))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_the_search_finds_the_best_scale_of_three_levels(name: str) -> None:
    x = weights(2, 6, 256) * np.array([[1], [1e-3], [30], [1], [1], [0]], np.float32)
    x[3] **= 3  # few large ones
    got = find(name).decode(ternary.search(find(name), x))  # type: ignore[arg-type]
    for row, mine in zip(x.astype(np.float64), got, strict=True):
        best = np.inf
        for d in np.linspace(0, np.abs(row).max(), 3001)[1:] if row.any() else [1.0]:
            best = min(best, ((row - d * np.clip(np.rint(row / d), -1, 1)) ** 2).sum())
        assert ((row - mine) ** 2).sum() <= best * 1.0001


@pytest.mark.parametrize(("name", "most"), [("TQ1_0", 0.44), ("TQ2_0", 0.44), ("Q2_0", 0.36)])
def test_the_search_has_about_half_of_ggmls_error(name: str, most: float) -> None:
    x, kind = weights(3, 64, 1024), find(name)
    ours = rmse(x, kind.decode(ternary.search(kind, x)))  # type: ignore[arg-type]
    assert ours < most and ours < 0.55 * rmse(x, kind.decode(kind.encode(x)))


def test_a_common_scale_is_found_or_refused() -> None:
    signs = np.random.default_rng(4).integers(-1, 2, (300, 512)).astype(np.float32)
    assert ternary.common_scale([signs[:0], 0 * signs, signs * np.float32(0.3)]) == float(np.float32(0.3))
    assert ternary.common_scale([0 * signs]) is None
    assert ternary.common_scale([signs, signs * np.float32(0.5)]) is None
    signs[-1, -1] = np.nan
    assert ternary.common_scale([signs]) is None


@pytest.mark.parametrize("method", ternary.METHODS)
@pytest.mark.parametrize("type", ["tq1_0", "tq2_0", "q2_0"])
def test_convert(type: str, method: str, tmp_path: Path) -> None:
    """One tensor of the checkpoint is ternary and stays it; the others are encoded as asked."""
    rng = np.random.default_rng(5)
    already = (rng.integers(-1, 2, (512, 256)) * 0.0123).astype(np.float32)
    already = (already.view(np.uint32) & 0xFFFF0000).view(np.float32)  # a bfloat16's value
    name = "model.layers.0.mlp.gate_proj.weight"
    folder = checkpoints.make(tmp_path / "m", layers=1, extra={name: already})
    convert(folder, type, tmp_path / "out.gguf", ternary=method)
    up = checkpoints.weights("llama", 256, 512, 1, 4, 2, 64, 320, False, 1)["model.layers.0.mlp.up_proj.weight"]
    up = (up.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
    with gguf.open(tmp_path / "out.gguf") as f:
        assert np.array_equal(f.tensors["blk.0.ffn_gate.weight"].dequantize(), already)
        got, kind = f.tensors["blk.0.ffn_up.weight"], find(type)
        assert got.type.name == kind.name
        want = {
            "ggml": lambda: kind.encode(up),
            "absmean": lambda: ternary.absmean(kind, up, ternary.mean_magnitude([up])),  # type: ignore[arg-type]
            "search": lambda: ternary.search(kind, up),  # type: ignore[arg-type]
        }[method]()
        assert rmse(kind.decode(want), got.dequantize()) < 2e-3  # rounding of bfloat16 halves aside
    with pytest.raises(ggufkit.UsageError, match="'best' is none of ggml, absmean, search"):
        convert(folder, type, tmp_path / "x.gguf", ternary="best")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_what_has_no_scale_is_refused(bad: float) -> None:
    x = weights()
    x[1, 3] = bad
    for encode in (lambda: ternary.search(find("TQ2_0"), x), lambda: ternary.absmean(find("TQ2_0"), x, 7e4)):  # type: ignore[arg-type]
        with pytest.raises(ggufkit.FormatError, match=r"NaN or infinite|too large"):
            encode()


def test_the_compiled_search_of_four_levels_is_the_definition():
    """Equal bits: normal weights, every magnitude, ties, blocks of one sign, of one weight, and of none."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-44, 4, (100, 1))
    kinds = [rng.standard_normal((400, 64)), rng.standard_normal((100, 64)) * sizes, np.zeros((2, 64)), np.eye(64)]
    kinds += [rng.integers(-2, 3, (100, 64)) / 2, -np.abs(rng.standard_normal((50, 64)))]
    x = np.concatenate(kinds).astype(np.float32)
    three = ternary._best_of_three(x)
    with np.errstate(all="ignore"):
        want = ternary.best_of_four(x, three)
    got = best_scales(x, three, ternary.STARTS, ternary.ROUNDS, 2)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    assert (got != three).mean() > 0.3 and best_scales(x[:0], three[:0], ternary.STARTS, 3, 2).shape == (0,)
