"""export: checkpoint -> GGUF -> checkpoint, in every dtype and for every architecture, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import ml_dtypes  # noqa: F401 - numpy's bfloat16, for safetensors
import numpy as np
import pytest
import quantized_checkpoints
import safetensors.numpy
import tiny_models
from command_line import ggufkit as command
from ggufkit_formats import gguf
from ggufkit_formats import safetensors as ours
from ggufkit_formats.blocks.nf4 import unpack_4bit
from ggufkit_runtime import generate, models

import ggufkit
from ggufkit.convert import convert
from ggufkit.export import export

SMALL = Path(__file__).parent / "data" / "small-model"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tied": True},
    "llama 3.1": {"config": {"rope_scaling": ROPE, "rope_theta": 500000.0}},
    "llama wide heads": {"head_dim": 96},
    "llama linear": {"config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    "llama yarn": {"config": {"rope_scaling": YARN | {"attention_factor": 1.3}}},
    "qwen2": {"arch": "qwen2"},
    "qwen3 yarn": {"arch": "qwen3", "head_dim": 128, "config": {"rope_scaling": YARN | {"beta_fast": 24.0}}},
    "bitnet": {"arch": "bitnet", "tied": True, "config": {"hidden_act": "relu2"}},
}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by the `safetensors` package."""
    out: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(path)
    return out


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.shape == b[name].shape, name
        assert x.tobytes() == b[name].tobytes(), name


def same_gguf(a: Path, b: Path) -> None:
    """Equal tensors, byte for byte, and equal metadata. tokenizer.json tells more ids than tokenizer.model alone."""
    with gguf.open(a) as one, gguf.open(b) as two:
        assert list(one.stored) == list(two.stored)
        for name, tensor in one.stored.items():
            assert tensor.type is two.stored[name].type and np.array_equal(tensor.raw, two.stored[name].raw), name
        for key in set(one.metadata) - {"general.name", "general.finetune", "general.basename"}:
            x, y = one.metadata[key], two.metadata[key]
            assert (x == y).all() if isinstance(x, np.ndarray) else x == y, key
        more = {key.removeprefix("tokenizer.ggml.") for key in set(two.metadata) - set(one.metadata)}
        assert more <= {"unknown_token_id", "add_sep_token", "general.basename", "general.finetune"}


# -- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("type", ["bf16", "f32"])
def test_a_checkpoint_comes_back(case: str, type: str, tmp_path: Path) -> None:
    first = checkpoints.make(tmp_path / "first", **CASES[case])
    convert(first, type, tmp_path / "a.gguf")
    # convert rounds a BitNet's weights to three levels, the scale of which is a float32
    dtype = "f32" if case == "bitnet" and type == "f32" else "bf16"
    report = export(tmp_path / "a.gguf", tmp_path / "again", dtype, threads=2)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(report.files)
    if case != "bitnet":
        same(stored(first), stored(tmp_path / "again"))
    given, got = settings(first), settings(tmp_path / "again")
    scaling = got.pop("rope_scaling") or {}
    for key, value in (given.pop("rope_scaling", None) or {}).items():
        assert scaling["rope_type" if key == "type" else key] == value, key
    assert {key: got[key] for key in given} == given | ({"torch_dtype": "float32"} if dtype == "f32" else {})
    convert(tmp_path / "again", type, tmp_path / "b.gguf")
    same_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf")


def test_the_small_model_speaks_the_same(tmp_path: Path) -> None:
    convert(SMALL, "bf16", tmp_path / "a.gguf")
    ggufkit.export(tmp_path / "a.gguf", tmp_path / "again")
    same(stored(SMALL), stored(tmp_path / "again"))
    convert(tmp_path / "again", "bf16", tmp_path / "b.gguf")
    logits = [generate.load(tmp_path / f"{x}.gguf", device="reference").logits([1, 5, 9]) for x in "ab"]
    assert np.array_equal(*logits)


def test_biases_of_all_matrices_or_of_none(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "a.gguf", "llama")
    export(tmp_path / "a.gguf", tmp_path / "out", "f32")
    got = settings(tmp_path / "out")
    assert got["attention_bias"] is got["mlp_bias"] is True
    convert(tmp_path / "out", "f32", tmp_path / "b.gguf")
    with gguf.open(tmp_path / "a.gguf") as a, gguf.open(tmp_path / "b.gguf") as b:
        assert set(a.tensors) == set(b.tensors)
        for name, tensor in a.tensors.items():
            assert np.array_equal(tensor.raw, b.tensors[name].raw), name
    with gguf.open(tmp_path / "a.gguf") as f:
        left = [t for t in f.tensors.values() if t.name != "blk.1.attn_output.bias"]
        with gguf.Writer(tmp_path / "c.gguf", gguf.Plan(f.metadata.copy(), left)) as writer:
            for t in left:
                writer.write(t.name, t.raw)
    with pytest.raises(
        ggufkit.UnsupportedError, match=r"c.gguf: 'blk.0.attn_q.bias' is there and 'blk.1.attn_output.b"
    ):
        export(tmp_path / "c.gguf", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("type", ["q4_k_m", "q8_0", "mxfp4"])
def test_quantized_files_become_what_they_mean(type: str, tmp_path: Path) -> None:
    convert(SMALL, type, tmp_path / "a.gguf")
    export(tmp_path / "a.gguf", tmp_path / "out", "f32")
    convert(tmp_path / "a.gguf", "f32", tmp_path / "wide.gguf", allow_requantize=True)
    convert(tmp_path / "out", "f32", tmp_path / "b.gguf")
    with gguf.open(tmp_path / "wide.gguf") as a, gguf.open(tmp_path / "b.gguf") as b:
        for name, tensor in a.tensors.items():
            assert np.array_equal(tensor.raw, b.tensors[name].raw), name


def test_shards(tmp_path: Path) -> None:
    first = checkpoints.make(tmp_path / "first")
    convert(first, "bf16", tmp_path / "a.gguf")
    report = export(tmp_path / "a.gguf", tmp_path / "out", shard_size=600_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    n = len(files)
    assert n > 3 and files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = stored(tmp_path / "out")
    assert index["metadata"]["total_size"] == report.n_bytes == sum(x.nbytes for x in whole.values())
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "out" / file)
        assert {name for name, at in index["weight_map"].items() if at == file} == set(held)
        assert sum(x.nbytes for x in held.values()) <= 600_000
    same(stored(first), whole)
    convert(tmp_path / "out", "bf16", tmp_path / "b.gguf")
    same_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf")


# -- bitsandbytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantized_as_bitsandbytes_does(kind: str, nested: bool, tmp_path: Path) -> None:
    """The same bytes as `bitsandbytes.encode` of the whole matrix, which is held to vectors of bitsandbytes itself."""
    first = checkpoints.make(tmp_path / "first", dim=96, ffn=272, heads=3, kv=3)
    convert(first, "f32", tmp_path / "a.gguf")
    export(tmp_path / "a.gguf", tmp_path / "out", kind + ("_dq" if nested else ""), threads=3)
    quantized_checkpoints.quantize(first, kind, nested)
    same(stored(first), stored(tmp_path / "out"))
    said = settings(tmp_path / "out")["quantization_config"]
    assert settings(first)["quantization_config"].items() <= said.items()


def drop_output(tensors: Any) -> dict[str, Any]:
    """Without the two matrices that convert writes as F16 when the others are NF4."""
    return {name: x for name, x in tensors.items() if name not in ("lm_head.weight", "model.embed_tokens.weight")}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_nf4_keeps_its_codes_both_ways(arch: str, nested: bool, tmp_path: Path) -> None:
    first = checkpoints.make(tmp_path / "first", arch, head_dim=64)
    quantized_checkpoints.quantize(first, "nf4", nested)
    dtype = "nf4_dq" if nested else "nf4"
    convert(first, dtype, tmp_path / "a.gguf")
    report = export(tmp_path / "a.gguf", tmp_path / "out", dtype)
    given, got = (drop_output(stored(folder)) for folder in (first, tmp_path / "out"))
    moved = [name for name in given if arch == "llama" and nested and ("q_proj" in name or "k_proj" in name)]
    same(
        {k: x for k, x in given.items() if k not in moved}, {k: x for k, x in got.items() if k in given.keys() - moved}
    )
    assert ("4 tensors keep the maxima of their blocks as F32, unchanged" in report.notes) == bool(moved)
    with ours.open(first) as one, ours.open(tmp_path / "out") as two:
        for name, tensor in drop_output(one.tensors).items():
            assert np.array_equal(tensor.dequantize(), two.tensors[name].dequantize()), name
    for name in moved:
        if name.endswith("proj.weight"):
            assert np.array_equal(given[name], got[name])
    convert(tmp_path / "out", dtype, tmp_path / "b.gguf")
    same_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf")


def test_nf4_from_nested_to_plain_and_back_to_numbers(tmp_path: Path) -> None:
    first = checkpoints.make(tmp_path / "first", "qwen2")
    quantized_checkpoints.quantize(first, "nf4", True, 128)
    convert(first, "nf4_dq", tmp_path / "a.gguf")
    export(tmp_path / "a.gguf", tmp_path / "plain", "nf4")
    export(tmp_path / "a.gguf", tmp_path / "numbers", "f32")
    with ours.open(first) as f, ours.open(tmp_path / "plain") as plain, ours.open(tmp_path / "numbers") as numbers:
        for name, tensor in drop_output(f.tensors).items():
            for other in (plain, numbers):
                assert np.array_equal(tensor.dequantize(), other.tensors[name].dequantize()), name
            if tensor.type == "NF4":
                a, b = f.stored[name], plain.stored[name]
                codes = [unpack_4bit(t.source.read(t.offset, t.nbytes)) for t in (a, b)]
                assert np.array_equal(*codes) and plain.stored[f"{name}.absmax"].type == "F32"


# -- ternary -------------------------------------------------------------------------------------------


def ternary(folder: Path, arch: str, s: float, **options: Any) -> dict[str, np.ndarray]:
    """A checkpoint whose matrices inside the blocks are s * {-1, 0, 1}; returns its tensors."""
    given = checkpoints.weights(arch, 256, 512, 2, 4, 2, 64, 320, False, 3)
    rng = np.random.default_rng(5)
    signs = {k: rng.integers(-1, 2, x.shape) for k, x in given.items() if k.endswith("_proj.weight")}
    made = {k: (x * np.float32(s)).astype(np.float32) for k, x in signs.items()}
    checkpoints.make(folder, arch, dtype=np.float32, extra=made, **options)
    return stored(folder)


@pytest.mark.parametrize("type", ["tq2_0", "tq1_0", "q2_0"])
@pytest.mark.parametrize("s", [0.046875, 1 / 73], ids=["half", "float"])
@pytest.mark.parametrize("arch", ["llama", "bitnet"])
def test_every_ternary_weight_comes_back(arch: str, s: float, type: str, tmp_path: Path) -> None:
    first = ternary(tmp_path / "first", arch, s)
    convert(tmp_path / "first", type, tmp_path / "a.gguf")
    with gguf.open(tmp_path / "a.gguf") as f:
        assert f.tensors["blk.1.ffn_up.weight"].type == type.upper()
        assert ("blk.1.ffn_up.scale" in f.tensors) == (s != 0.046875)
    for dtype in ("f32", "packed", "bf16"):
        export(tmp_path / "a.gguf", tmp_path / dtype, dtype)
        convert(tmp_path / dtype, "f32", tmp_path / f"{dtype}.gguf")
    got = stored(tmp_path / "f32")
    for name in (name for name in first if name.endswith("_proj.weight")):
        assert np.array_equal(first[name], got[name]), name
        if s == 0.046875:
            rounded = stored(tmp_path / "bf16")[name]
            assert np.array_equal(first[name], rounded.astype(np.float32)), name
    with gguf.open(tmp_path / "f32.gguf") as one, gguf.open(tmp_path / "packed.gguf") as two:
        for name, tensor in one.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) > 1:
                assert np.array_equal(tensor.raw, two.tensors[name].raw), name


def test_packed_is_how_plain_loops_pack(tmp_path: Path) -> None:
    first = ternary(tmp_path / "first", "llama", 0.5)
    convert(tmp_path / "first", "tq2_0", tmp_path / "a.gguf")
    export(tmp_path / "a.gguf", tmp_path / "out", "packed")
    got = stored(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        codes = np.sign(first[name]).astype(int) + 1
        n = len(codes) // 4
        want = np.zeros((n, codes.shape[1]), np.uint8)
        for row in range(len(codes)):
            want[row % n] |= (codes[row] << (2 * (row // n))).astype(np.uint8)
        assert np.array_equal(got[name], want) and got[f"{name}_scale"].tolist() == [0.5]
    assert settings(tmp_path / "out")["quantization_config"]["linear_class"] == "autobitlinear"


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    convert(SMALL, "f16", tmp_path / "a.gguf")
    with pytest.raises(ggufkit.UnsupportedError, match=r"'blk.0.attn_q.weight' is not ternary"):
        export(tmp_path / "a.gguf", tmp_path / "out", "packed")
    ternary(tmp_path / "first", "llama", 16.0)
    convert(tmp_path / "first", "tq2_0", tmp_path / "b.gguf")
    with pytest.raises(ggufkit.UnsupportedError, match=r"has the scale 16: readers would take"):
        export(tmp_path / "b.gguf", tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists()


# -- rotary factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("llama3", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 5.0, 4096),
                                    (8.0, 3.0, 7.0, 8192), (16.0, 1.5, 6.0, 2048), (8.0, 1.0, 4.0, 300)])  # fmt: skip
def test_llama3_numbers_are_found_again(llama3: Any, base: float) -> None:
    from ggufkit_runtime.models.rope import Rope

    factors = Rope(64, base, llama3=llama3).llama3_factors()
    assert factors is not None
    found = Rope(64, base).with_factors(factors).llama3_factors()
    assert found is not None and np.array_equal(found, factors)
    factors[3] *= 1.001
    with pytest.raises(ggufkit.UnsupportedError, match=r"do not come from Llama 3\.1"):
        Rope(64, base).with_factors(factors)


def test_rows_go_back() -> None:
    for n, heads in ((8, 1), (48, 3), (256, 4)):
        rows = models.permuted_rows(n, heads)
        assert np.array_equal(np.arange(n)[rows][models.restored_rows(n, heads)], np.arange(n))


# -- folders, errors, the command ----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "a.gguf", "llama", optional=False)


def test_folders_that_are_there(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(file, out)  # empty
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ggufkit.GgufkitError, match="out exists already, and is not empty; --overwrite"):
        export(file, out, "f32")
    export(file, out, "f32", overwrite=True, shard_size=500_000)
    assert "model.safetensors" not in {path.name for path in out.iterdir()}
    export(file, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ggufkit.GgufkitError, match=r"holds 'notes.txt', which no export writes"):
        export(file, out, overwrite=True)
    with pytest.raises(ggufkit.GgufkitError, match="is there already, and is no folder"):
        export(file, file, overwrite=True)
    with pytest.raises(ggufkit.GgufkitError, match="there is no folder"):
        export(file, tmp_path / "x" / "y")
    with pytest.raises(ggufkit.UsageError, match="unknown dtype 'bf17'; did you mean bf16"):
        export(file, tmp_path / "z", "bf17")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "out"]


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    for value, dtype, message in ((np.nan, "bf16", "NaN or infinite"), (1e6, "f16", "too large for F16"),
                                  (np.inf, "nf4", "NaN or infinite")):  # fmt: skip
        tiny_models.write(tmp_path / "a.gguf", "llama", optional=False)
        with gguf.open(tmp_path / "a.gguf") as f:
            t = f.tensors["blk.1.ffn_down.weight"]
            offset = t.offset
        with (tmp_path / "a.gguf").open("r+b") as raw:
            raw.seek(offset + 400)
            raw.write(np.float32(value).tobytes())
        with pytest.raises(ggufkit.FormatError, match=rf"tensor 'blk.1.ffn_down.weight': .*{message}"):
            export(tmp_path / "a.gguf", tmp_path / "out", dtype)
        assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_unknown_architecture_and_missing_tensor(file: Path, tmp_path: Path) -> None:
    with gguf.open(file) as f:
        tensors = [t for t in f.tensors.values() if t.name != "blk.0.ffn_up.weight"]
        changes = [({"general.architecture": "mamba"}, list(f.tensors.values())), ({}, tensors)]
        for i, (change, left) in enumerate(changes):
            plan = gguf.Plan(f.metadata.copy() | change, left)
            with gguf.Writer(tmp_path / f"{i}.gguf", plan) as writer:
                for t in left:
                    writer.write(t.name, t.raw)
    with pytest.raises(ggufkit.UnsupportedError, match=r"0.gguf: architecture 'mamba' is not supported"):
        export(tmp_path / "0.gguf", tmp_path / "out")
    with pytest.raises(ggufkit.FormatError, match=r"1.gguf: tensor 'blk.0.ffn_up.weight' is missing"):
        export(tmp_path / "1.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(file: Path, tmp_path: Path) -> None:
    done = command("export", file, tmp_path / "out")
    assert done.status == 0, done.err
    assert "holds model.safetensors, config.json" in done.out and "F32" in done.out
    assert command("export", file, tmp_path / "out").error.endswith("--overwrite (overwrite=True) replaces it")
    document = command("export", file, tmp_path / "out", "--overwrite", "--dtype", "nf4", "--json").json
    assert document["dtype"] == "nf4" and document["files"][0] == "model.safetensors"
    one = next(each for each in document["tensors"] if each["name"] == "model.layers.0.mlp.up_proj.weight")
    assert (one["shape"], one["dtype"], one["source"]) == ([512, 256], "NF4", "blk.0.ffn_up.weight")
    assert one["source_type"] == "F32" and one["nbytes"] > 512 * 256 * 4.5 / 8
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - document["n_bytes"] < 20_000
    bad = command("export", file, tmp_path / "b", "--dtype", "q4_k")
    assert bad.status == 2 and "unknown dtype 'q4_k'" in bad.error
    assert "no such file" in command("export", tmp_path / "none.gguf", tmp_path / "b").error


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of 150 million weights in three large matrices."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    return tiny_models.write(path, "llama", "F16", optional=False, hidden_size=1024, intermediate_size=49152,
                             num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["f32", "nf4_dq"])
def test_memory_is_bounded(dtype: str, wide: Path, tmp_path: Path) -> None:
    """150 million weights, 300 MB as F16 and 600 as F32: at most 420 MB of resident memory."""
    code = (
        "import sys, ggufkit; ggufkit.export(sys.argv[1], sys.argv[2], sys.argv[3], threads=2);"
        "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])"
    )
    arguments = [sys.executable, "-c", code, str(wide), str(tmp_path / "out"), dtype]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 420_000


def test_ctrl_c(wide: Path, tmp_path: Path) -> None:
    main = [sys.executable, "-c", "from ggufkit.cli import main; main()"]
    process = subprocess.Popen([*main, "export", str(wide), "out", "--dtype", "nf4"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    end = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, "Traceback" in err) == ("", False)
    assert list(tmp_path.iterdir()) == []
