"""`convert --report`: the error of each tensor against its source, as `diff` finds it afterwards."""

from __future__ import annotations

import math

import checkpoints
import numpy as np
import pytest
import quantized_checkpoints
import tiny_models
from command_line import ggufkit
from ggufkit_formats import gguf
from ggufkit_formats.blocks import find
from ggufkit_formats.errors import UsageError

from ggufkit import compare
from ggufkit.convert import Report, convert, pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("report") / "checkpoint")


def check(report: Report, made, source) -> None:
    """The report against whole tensors: those of the new file and of the source as F32."""
    with gguf.open(made) as a, gguf.open(source) as b:
        squares = reference = 0.0
        for entry in report.tensors:
            x, y = (f.tensors[entry.name].dequantize().astype(np.float64) for f in (a, b))
            beside = a.tensors.get(entry.name.replace(".weight", ".scale"))
            if beside is not None and ".weight" in entry.name:
                x = (x * beside.dequantize()).astype(np.float32).astype(np.float64)
            off = x - y
            squares, reference = squares + np.square(off).sum(), reference + np.square(y).sum()
            assert entry.max_error == np.abs(off).max(), entry.name
            assert entry.rel_rmse is not None
            assert math.isclose(entry.rel_rmse, math.sqrt(np.square(off).sum() / np.square(y).sum()), rel_tol=1e-9)
        assert report.total is not None
        assert math.isclose(report.total.relative_rmse, math.sqrt(squares / reference), rel_tol=1e-9)
        assert report.total.max_difference == max(entry.max_error or 0 for entry in report.tensors)


@pytest.mark.parametrize(
    "type", ["f16", "bf16", "q4_0", "q4_k_m", "iq4_xs", "tq2_0", "mxfp4", "nvfp4", "nf4", "nf4_dq"]
)
def test_errors_of_a_checkpoint(folder, tmp_path, monkeypatch, type):
    """Rows of q and k are reordered on the way, and slabs are small."""
    monkeypatch.setattr(pipeline, "slab_weights", lambda threads: 1 << 13)
    monkeypatch.setattr(compare, "PIECE", 1 << 10)
    report = convert(folder, type, tmp_path / "a.gguf", measure=True, threads=2)
    plain = convert(folder, type, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert plain.total is None and plain.tensors[0].rel_rmse is None
    convert(folder, "f32", tmp_path / "f32.gguf")
    check(report, tmp_path / "a.gguf", tmp_path / "f32.gguf")


def test_errors_are_those_of_diff(tmp_path):
    source = tiny_models.write(tmp_path / "a.gguf")
    report = convert(source, "q5_k", tmp_path / "b.gguf", measure=True, threads=1)
    with gguf.open(source) as a, gguf.open(tmp_path / "b.gguf") as b:
        for entry in report.tensors:
            found = compare.distance(b.tensors[entry.name], a.tensors[entry.name])
            assert entry.max_error == found.max_difference
            assert entry.rel_rmse is not None and math.isclose(entry.rel_rmse, found.relative_rmse, rel_tol=1e-12)


def test_errors_with_importance_and_scales(tmp_path):
    """Columns that matter get more of the same bits; a ternary tensor whose scale stands beside has no error."""
    from ggufkit.quantize import imatrix

    source = tiny_models.write(tmp_path / "a.gguf", optional=False)
    rng = np.random.default_rng(0)
    with gguf.open(source) as f:
        matrices = {n: t for n, t in f.tensors.items() if n.startswith("blk.") and len(t.shape) > 1}
        entries = {
            n: imatrix.Entry((1000 * rng.random(t.cols)).astype(np.float32), np.array([1000]))
            for n, t in matrices.items()
        }
        values = {n: t.dequantize() for n, t in f.tensors.items()}
        metadata = f.metadata.copy()
    imatrix.write(imatrix.Imatrix(entries, ["a"], 2, 512), tmp_path / "m.gguf")
    report = convert(source, "iq3_xxs", tmp_path / "b.gguf", measure=True, imatrix=tmp_path / "m.gguf")
    check(report, tmp_path / "b.gguf", source)
    values["blk.0.ffn_up.weight"] = rng.integers(-1, 2, (512, 256)).astype(np.float32) * np.float32(0.1)
    with gguf.Writer(tmp_path / "c.gguf", gguf.Plan(metadata, [(n, "F32", x.shape) for n, x in values.items()])) as w:
        for name, x in values.items():
            w.write(name, x)
    report = convert(tmp_path / "c.gguf", "tq1_0", tmp_path / "d.gguf", measure=True, ternary="search")
    errors = {entry.name: entry.rel_rmse for entry in report.tensors}
    assert (
        errors["blk.0.ffn_up.scale"] == errors["blk.0.ffn_up.weight"] == 0 and 0.4 < errors["blk.1.ffn_up.weight"] < 0.5
    )
    values["blk.0.ffn_up.scale"] = np.array([0.1], np.float32)
    keys = [(n, "F32", x.shape) for n, x in values.items()]
    with gguf.Writer(tmp_path / "e.gguf", gguf.Plan(metadata, keys)) as w:
        for name, x in values.items():
            w.write(name, x)
    check(report, tmp_path / "d.gguf", tmp_path / "e.gguf")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("type", ["nf4", "nf4_dq", "q4_0"])
def test_errors_of_what_bitsandbytes_quantized(tmp_path, monkeypatch, type, nested):
    """Codes that are copied have no error, but maxima that are quantized anew do."""
    monkeypatch.setattr(pipeline, "slab_weights", lambda threads: 1 << 13)
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint"), nested=nested)
    report = convert(folder, type, tmp_path / "a.gguf", measure=True, threads=2)
    convert(folder, "f32", tmp_path / "f32.gguf")
    check(report, tmp_path / "a.gguf", tmp_path / "f32.gguf")
    errors = {entry.name: entry.rel_rmse for entry in report.tensors}
    lossless = type == "nf4" or (type == "nf4_dq" and nested)
    assert (errors["blk.1.ffn_down.weight"] == 0) == lossless


def test_nothing_encoded_nothing_measured(folder, tmp_path):
    with pytest.raises(UsageError, match="--plan"):
        convert(folder, "q4_0", tmp_path / "a.gguf", plan=True, measure=True)
    done = ggufkit("convert", folder, "q4_0", "-o", tmp_path / "a.gguf", "--plan", "--report")
    assert done.status == 2 and "--report" in done.error
    assert not (tmp_path / "a.gguf").exists()


def test_copies(tmp_path):
    """Tensors that stay as they are have no error, and count in that of all; integers do not."""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    rows = {"a.weight": ("F32", x), "b.weight": ("Q8_0", x), "n": ("I32", np.full((1, 4), 1 << 30, np.float32))}
    plan = gguf.Plan({"general.architecture": "x"}, [(name, kind, y.shape) for name, (kind, y) in rows.items()])
    with gguf.Writer(tmp_path / "a.gguf", plan) as w:
        for name, (kind, y) in rows.items():
            w.write(name, y.astype(np.int32) if kind == "I32" else find(kind).encode(y))
    report = convert(tmp_path / "a.gguf", "q8_0", tmp_path / "b.gguf", measure=True)
    errors = {entry.name: entry.rel_rmse for entry in report.tensors}
    assert errors["n"] == errors["b.weight"] == 0 and errors["a.weight"] > 0
    assert report.total is not None and math.isclose(
        report.total.relative_rmse, errors["a.weight"] / 2**0.5, rel_tol=0.01
    )


def test_the_command(tmp_path):
    source = tiny_models.write(tmp_path / "a.gguf", optional=False)
    args = ("convert", source, "q4_k", "-o", tmp_path / "b.gguf", "--overwrite")
    found = ggufkit(*args, "--report", "--json").json
    assert {"rel_rmse", "max_error"} <= set(found)
    for each in found["tensors"]:
        assert list(each) == ["name", "shape", "type", "asked", "reason", "rel_rmse", "max_error"]
        assert (each["rel_rmse"] > 0) == (each["max_error"] > 0) == ("norm" not in each["name"])
    assert "rel_rmse" not in str(ggufkit(*args, "--json").json)
    lines = ggufkit(*args, "--report").out.splitlines()
    at = lines.index(next(line for line in lines if "relative RMSE" in line))
    named = {line.split()[0]: line.split()[1:] for line in lines[at + 1 : at + 17]}
    first = next(each for each in found["tensors"] if each["name"] == "blk.0.attn_q.weight")
    assert named[first["name"]] == ["Q4_K", f"{first['rel_rmse']:.3g}", f"{first['max_error']:.3g}"]
    assert named["all"] == [f"{found['rel_rmse']:.3g}", f"{found['max_error']:.3g}"]
    assert "5 of 20 tensors are what they were" in lines


@pytest.mark.parametrize("type", ["q4_0", "q6_k", "iq4_nl", "nf4", "tq2_0"])
def test_the_error_that_types_shows_is_the_same_measure(tmp_path, type):
    """Normal random weights, converted with --report, have the error that `ggufkit types` has for the type."""
    from ggufkit.cli import types

    x = np.random.default_rng(0).standard_normal(types.SAMPLE).astype(np.float32)
    plan = gguf.Plan({"general.architecture": "x"}, [("blk.0.a.weight", "F32", x.shape)])
    with gguf.Writer(tmp_path / "a.gguf", plan) as w:
        w.write("blk.0.a.weight", x)
    report = convert(tmp_path / "a.gguf", type, tmp_path / "b.gguf", pure=True, measure=True)
    shown, _ = types._error(find(type))
    assert shown is not None and report.total is not None
    assert math.isclose(report.total.relative_rmse, shown, rel_tol=1e-9)
