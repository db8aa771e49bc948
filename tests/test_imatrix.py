"""Importance matrices: both forms of llama.cpp's files, merging, fit to a model, and converting with one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from ggufkit_formats import gguf
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError
from oracles import ggml

from ggufkit.convert import convert
from ggufkit.quantize import imatrix
from ggufkit.quantize.imatrix import Entry, Imatrix

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> sums (matrices, cols), counts (matrices,) or (1,)
LAYER = {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256, "ffn_gate": 256, "ffn_up": 256,
         "ffn_down": 512}  # fmt: skip


def made_up(seed: int = 0, layers: int = 2) -> Sums:
    """Sums for the model of checkpoints.make: every column's inputs of another size."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(layers):
        for name, cols in LAYER.items():
            sums = (5120 * rng.standard_normal((1, cols)) ** 2 * 10.0 ** rng.uniform(-3, 2, (1, cols))).astype("f4")
            sums[0, rng.random(cols) < 0.02] = 0
            out[f"blk.{i}.{name}.weight"] = sums, np.array([5120])
    return out


def write_gguf(path: Path, sums: Sums, chunks: int = 10, size: int = 512, drop: str = "") -> Path:
    """As llama-imatrix writes it, by the gguf package."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    writer.kv_data[0].pop(drop, None)
    for name in sorted(sums):
        values, counts = sums[name]
        values = values.astype(np.float32)
        writer.add_tensor(f"{name}.in_sum2", values if len(values) > 1 else values[0])
        counts = counts.astype(np.float32)
        writer.add_tensor(f"{name}.counts", counts[:, None] if len(values) > 1 else counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy(path: Path, sums: Sums, calls: int = 10, tail: bool = True) -> Path:
    """The older form: mean squares times the number of calls."""
    data = struct.pack("<i", len(sums))
    for name, (values, counts) in sums.items():
        raw = (values.reshape(-1) / np.float32(counts[0]) * np.float32(calls)).astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(raw)) + raw.tobytes()
    if tail:
        data += struct.pack("<ii", calls, 5) + b"a.txt"
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    convert(checkpoints.make(root / "model"), "f32", root / "model.gguf")
    return root / "model.gguf"


# -- files -----------------------------------------------------------------------------------------


def test_gguf_form(tmp_path: Path) -> None:
    sums = made_up()
    found = imatrix.read(write_gguf(tmp_path / "a.gguf", sums))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (["a.txt", "b.txt"], 10, 512)
    assert sorted(found.entries) == sorted(sums)
    for name, (values, counts) in sums.items():
        importance = found.importance(name, (3, values.shape[1]))
        assert importance is not None and importance.dtype == np.float32
        np.testing.assert_array_equal(importance, values / np.float32(counts[0]))


@pytest.mark.parametrize("tail", [True, False])
def test_older_form(tail: bool, tmp_path: Path) -> None:
    """Its mean squares are what llama-quantize divides out of it, bit for bit."""
    sums = made_up()
    found = imatrix.read(write_legacy(tmp_path / "a.dat", sums, calls=7, tail=tail))
    assert (found.datasets, found.chunk_count) == ((["a.txt"], 7) if tail else ([], 0))
    for name, (values, counts) in sums.items():
        stored = (values / np.float32(counts[0]) * np.float32(7)).astype(np.float32)
        importance = found.importance(name, (3, values.shape[1]))
        np.testing.assert_array_equal(importance, stored / np.float32(7))


def test_written_as_llama_imatrix_writes_it(tmp_path: Path) -> None:
    """Byte for byte what the gguf package makes of the same keys and tensors, stacked matrices included."""
    sums = made_up()
    rng = np.random.default_rng(1)
    sums["blk.0.ffn_up_exps.weight"] = rng.random((4, 256)).astype("f4"), np.array([3, 0, 5, 1])
    theirs = write_gguf(tmp_path / "theirs.gguf", sums)
    imatrix.write(imatrix.read(theirs), tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()
    shapes = {t.name: t.shape.tolist() for t in GGUFReader(tmp_path / "ours.gguf").tensors}
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == [256, 4]
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == [1, 4]
    with pytest.raises(GgufkitError, match="exists"):
        imatrix.write(imatrix.read(theirs), tmp_path / "ours.gguf")


def test_matrices_without_input_count_as_ones(tmp_path: Path) -> None:
    sums: Sums = {"blk.0.ffn_up_exps.weight": (np.full((3, 64), 8, "f4"), np.array([4, 0, 2]))}
    found = imatrix.read(write_gguf(tmp_path / "a.gguf", sums))
    importance = found.importance("blk.0.ffn_up_exps.weight", (3, 5, 64))
    assert importance is not None and importance.tolist() == [[2] * 64, [1] * 64, [4] * 64]
    assert found.importance("blk.1.ffn_up_exps.weight", (3, 5, 64)) is None


def test_merged(tmp_path: Path) -> None:
    one, two = made_up(1), made_up(2)
    two["blk.9.attn_q.weight"] = one["blk.0.attn_q.weight"]
    a = imatrix.read(write_gguf(tmp_path / "a.gguf", one))
    b = imatrix.read(write_gguf(tmp_path / "b.gguf", two, chunks=20))
    both = imatrix.merged([a, b])
    assert (both.chunk_count, both.chunk_size, both.datasets) == (20, 512, ["a.txt", "b.txt"] * 2)
    for name, (values, counts) in two.items():
        other = one.get(name, (np.float32(0), np.int64(0)))
        np.testing.assert_array_equal(both.entries[name].sums, (other[0] + values)[0])
        np.testing.assert_array_equal(both.entries[name].counts, other[1] + counts)
    assert a.entries["blk.0.attn_q.weight"].counts == [5120]  # left as it was
    a.entries["blk.0.attn_q.weight"] = Entry(np.ones(128, np.float32), np.array([5]))
    with pytest.raises(FormatError, match=r"b.gguf: 'blk.0.attn_q.weight' has 256 values .* 128 .*: not of one model"):
        imatrix.merged([a, b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(x=(np.full((1, 4), np.nan), np.ones(1))), "values of 'x' are not all finite and positive"),
        (lambda s: s.update(x=(np.full((1, 4), -1), np.ones(1))), "values of 'x' are not all finite and positive"),
        (lambda s: s.update(x=(np.ones((1, 4)), np.array([np.nan]))), "counts of 'x' are no counts"),
        (lambda s: s.update(x=(np.ones((1, 4)), np.array([-1]))), "counts of 'x' are no counts"),
        (lambda s: s.update(x=(np.ones((2, 4)), np.ones(3))), "'x' has 8 values and 3 counts"),
        (lambda s: s.clear(), r"not an importance matrix: no tensor is named \*.in_sum2"),
    ],
)
def test_broken_gguf(change: Any, message: str, tmp_path: Path) -> None:
    sums = made_up()
    change(sums)
    with pytest.raises(FormatError, match=f"a.gguf: .*{message}"):
        imatrix.read(write_gguf(tmp_path / "a.gguf", sums))


def test_broken_files(tmp_path: Path, model: Path) -> None:
    with pytest.raises(FormatError, match=r"not an importance matrix: metadata 'imatrix.chunk_size' is missing"):
        imatrix.read(write_gguf(tmp_path / "a.gguf", made_up(), drop="imatrix.chunk_size"))
    with pytest.raises(FormatError, match=r"model.gguf: not an importance matrix: metadata 'imatrix.datasets'"):
        imatrix.read(model)
    with pytest.raises(GgufkitError, match=r"missing.gguf: No such file"):
        imatrix.read(tmp_path / "missing.gguf")
    lone = gguf.Plan(
        {"imatrix.datasets": ["a"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 512}, [("x.in_sum2", "F32", (4,))]
    )
    with gguf.Writer(tmp_path / "lone.gguf", lone) as writer:
        writer.write("x.in_sum2", np.ones(4, np.float32).view(np.uint8))
    with pytest.raises(FormatError, match=r"'x' has .in_sum2 or .counts, and both are needed"):
        imatrix.read(tmp_path / "lone.gguf")


def test_broken_older_files(tmp_path: Path) -> None:
    """Cut anywhere it is refused, but for a missing tail; so are texts and absurd numbers."""
    path = write_legacy(tmp_path / "a.dat", {"blk.0.attn_q.weight": (np.ones((1, 8), "f4"), np.array([512]))})
    data = path.read_bytes()
    whole = len(data) - 13
    for n in range(len(data)):
        path.write_bytes(data[:n])
        if n in (whole, whole + 4):
            assert len(imatrix.read(path).entries) == 1
        else:
            with pytest.raises(FormatError, match=r"a.dat: not an importance matrix"):
                imatrix.read(path)
    for head in (b"To be, or not to be, that is the question", struct.pack("<ii", 1, -5) + bytes(30),
                 struct.pack("<ii", 1, 2**31 - 1) + bytes(30)):  # fmt: skip
        path.write_bytes(head)
        with pytest.raises(FormatError, match=r"a.dat: not an importance matrix"):
            imatrix.read(path)


# -- does it fit? ----------------------------------------------------------------------------------


def of(sums: Sums) -> Imatrix:
    return Imatrix({name: Entry(v.reshape(-1), c) for name, (v, c) in sums.items()}, file="m.gguf")


SHAPES = {f"blk.{i}.{name}.weight": (8, cols) for i in range(2) for name, cols in LAYER.items()} | {
    "token_embd.weight": (9, 256), "blk.0.attn_norm.weight": (256,),
}  # fmt: skip


def test_fits() -> None:
    assert imatrix.check(of(made_up()), SHAPES, "model") == []
    sums = made_up()
    sums["output.weight"] = np.ones((1, 256), "f4"), np.ones(1)
    sums["token_embd.weight"] = np.ones((1, 9), "f4"), np.ones(1)  # ignored, as llama-quantize does
    del sums["blk.0.attn_q.weight"], sums["blk.1.ffn_up.weight"]
    notes = imatrix.check(of(sums), SHAPES, "model")
    assert notes == ["m.gguf has no importance for blk.0.attn_q.weight and 1 more: quantized without"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(made_up(layers=3)), "which has no tensor 'blk.2.attn_q.weight'"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("blk.1.")], "it knows nothing of layer 1"),
        (lambda s: s.clear(), "it knows nothing of layer 0"),
        (lambda s: s.update({"blk.0.attn_q.weight": (np.ones((1, 128), "f4"), np.ones(1))}),
         "holds 128 values for 'blk.0.attn_q.weight', which has 256 columns: it was made for another model"),
    ],
)  # fmt: skip
def test_of_another_model(change: Any, message: str) -> None:
    sums = made_up()
    change(sums)
    with pytest.raises(FormatError, match=f"m.gguf: .*{message}"):
        imatrix.check(of(sums), SHAPES, "model")


def test_coverage_and_warnings() -> None:
    sums = made_up()
    assert imatrix.warnings(of(sums))[0].startswith("only 5120 tokens")
    for name in sums:
        sums[name] = np.ones_like(sums[name][0]), np.array([50_000])
    assert imatrix.warnings(of(sums)) == []
    sums["blk.0.ffn_up_exps.weight"] = np.ones((3, 8), "f4"), np.array([50_000, 0, 7])
    sums["blk.1.ffn_up.weight"] = np.arange(256, dtype="f4")[None] // 64, np.array([50_000])
    rows = {row.name: row for row in imatrix.coverage(of(sums))}
    assert list(rows)[:2] == ["blk.0.attn_k.weight", "blk.0.attn_output.weight"]
    experts = rows["blk.0.ffn_up_exps.weight"]
    assert (experts.cols, experts.matrices, experts.tokens, experts.fewest) == (8, 3, 50_000, 0)
    assert rows["blk.1.ffn_up.weight"].covered == 0.75
    lines = imatrix.warnings(of(sums))
    assert lines[0].startswith("1 matrices in 1 tensors had no input at all, blk.0.ffn_up_exps.weight the first")
    assert lines[1] == "1 tensors have columns without input, blk.1.ffn_up.weight the first: 25.0 % of them"


# -- converting with one ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Any:
    if not ggml.available():
        pytest.skip("xllamacpp is not installed")
    one = ggml.Ggml()
    yield one
    one.close()


@pytest.mark.parametrize(
    "type",
    ["q2_k_s", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs",
     "iq3_s", "iq3_xxs", "iq2_xxs"],
)  # fmt: skip
def test_bytes_are_ggmls_with_importance(type: str, model: Path, oracle: Any, tmp_path: Path) -> None:
    sums = made_up()
    del sums["blk.1.attn_output.weight"]  # quantized without
    if type in ("q2_k_s", "iq3_xxs", "iq2_xxs"):
        sums = made_up()  # needs all
    path = write_gguf(tmp_path / "m.gguf", sums)
    report = convert(model, type, tmp_path / "out.gguf", imatrix=path, threads=2)
    assert any("quantized without" in note for note in report.notes) == ("blk.1.attn_output.weight" not in sums)
    with gguf.open(model) as source, gguf.open(tmp_path / "out.gguf") as made:
        for name, tensor in made.tensors.items():
            x = source.tensors[name].dequantize()
            if tensor.type == "F32":
                assert np.array_equal(tensor.raw.reshape(-1), x.reshape(-1).view(np.uint8))
                continue
            values, counts = sums.get(name, (None, None))
            importance = None if values is None or counts is None else values[0] / np.float32(counts[0])
            assert np.array_equal(tensor.raw, oracle.quantize(tensor.type.id, x, importance)), (name, tensor.type)


def test_metadata_and_rules_of_llama_quantize(model: Path, tmp_path: Path) -> None:
    """Keys, their types and order; and the first ffn_down is Q4_1 in Q4_0 files, with a matrix only."""
    path = write_gguf(tmp_path / "m.gguf", made_up(layers=8))
    source = checkpoints.make(tmp_path / "deep", layers=8)
    report = convert(source, "q4_0", tmp_path / "out.gguf", imatrix=path)
    types = {entry.name: entry.type for entry in report.tensors}
    assert types["blk.0.ffn_down.weight"] == "Q4_1" and types["blk.1.ffn_down.weight"] == "Q4_0"
    with gguf.open(tmp_path / "out.gguf") as made:
        keys = [key for key in made.metadata if key.startswith("quantize.")]
        assert list(made.metadata)[-4:] == keys
        assert [(key, made.metadata.type_name(key), made.metadata[key]) for key in keys] == [
            ("quantize.imatrix.file", "STRING", str(path)[:127]),
            ("quantize.imatrix.dataset", "STRING", "a.txt"),
            ("quantize.imatrix.entries_count", "UINT32", 56),
            ("quantize.imatrix.chunks_count", "UINT32", 10),
        ]
    old = write_legacy(tmp_path / "m.dat", made_up(layers=8), tail=False)
    convert(tmp_path / "out.gguf", "q8_0", tmp_path / "again.gguf", imatrix=old, allow_requantize=True)
    with gguf.open(tmp_path / "again.gguf") as made:
        found = {key: made.metadata[key] for key in made.metadata if key.startswith("quantize.")}
        assert found["quantize.imatrix.file"] == str(old)[:127]


def test_stacked_matrices_have_an_importance_each(oracle: Any, tmp_path: Path) -> None:
    """Experts: three dimensions, and slabs that hold rows of several."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, 40, 256)).astype(np.float32)
    head = {"general.architecture": "llama", "llama.block_count": 1, "llama.expert_count": 4}
    plan = gguf.Plan(head, [("blk.0.ffn_up_exps.weight", "F32", x.shape)])
    with gguf.Writer(tmp_path / "x.gguf", plan) as writer:
        writer.write("blk.0.ffn_up_exps.weight", x.reshape(-1).view(np.uint8))
    sums: Sums = {"blk.0.ffn_up_exps.weight": (rng.random((4, 256)).astype("f4"), np.array([2, 3, 0, 5]))}
    path = write_gguf(tmp_path / "m.gguf", sums)
    convert(tmp_path / "x.gguf", "q4_k_s", tmp_path / "y.gguf", imatrix=path)
    with gguf.open(tmp_path / "y.gguf") as made:
        raw = made.tensors["blk.0.ffn_up_exps.weight"]
        for i, (values, count) in enumerate(zip(*sums["blk.0.ffn_up_exps.weight"], strict=True)):
            importance = values / np.float32(count) if count else np.ones(256, np.float32)
            assert np.array_equal(raw.raw[i], oracle.quantize(raw.type.id, x[i], importance)), i


def test_refusals(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(
        UnsupportedError, match="Q2_K needs an importance matrix in Q2_K_S; make one with `ggufkit imat"
    ):
        convert(model, "q2_k_s", out)
    sums = made_up()
    del sums["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "m.gguf", sums)
    with pytest.raises(FormatError, match=r"m.gguf: has no importance for 'blk.1.ffn_up.weight', which Q2_K needs"):
        convert(model, "q2_k_s", out, imatrix=path)
    sums["blk.0.attn_q.weight"] = np.ones((1, 576), "f4"), np.array([5])
    with pytest.raises(FormatError, match=r"576 values for 'blk.0.attn_q.weight', .* another model"):
        convert(model, "q4_k_m", out, imatrix=write_gguf(path, sums))
    assert not out.exists()
