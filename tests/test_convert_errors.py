"""convert: what it refuses, that it leaves nothing behind, its memory, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from ggufkit_formats import gguf
from hub_server import Hub

import ggufkit
from ggufkit.convert import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.make(tmp_path / "model-x", layers=1, heads=2, kv=1, dim=256, ffn=256)


def change(source: Path, **tensors: np.ndarray | None) -> None:
    """Rewrite the weights with some tensors replaced, added or (None) left out; `__` stands for a dot."""
    import safetensors.numpy

    held = safetensors.numpy.load_file(source / "model.safetensors")
    for name, x in tensors.items():
        held[name.replace("__", ".")] = x  # type: ignore[assignment]
    checkpoints.write_tensors(source, {name: x for name, x in held.items() if x is not None})


def refused(source: Path, match: str, type: str = "q4_k", error: Any = ggufkit.GgufkitError, **options: Any) -> None:
    """The conversion fails with that message, and the folder of the output is as it was."""
    out = source.parent / "out"
    out.mkdir(exist_ok=True)
    before = sorted(out.iterdir())
    with pytest.raises(error, match=match) as caught:
        convert(source, type, out / "x.gguf", threads=2, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.iterdir()) == before


def test_types_that_need_importance(source: Path) -> None:
    refused(source, "tensor 'blk.0.attn_k.weight': IQ2_XS needs an importance matrix", "iq2_xs")
    refused(source, "'token_embd.weight': IQ2_XS needs an importance matrix", "q8_0", token_embedding_type="iq2_xs")
    refused(source, "'blk.0.attn_q.weight': IQ1_S needs an importance matrix", tensor_types=["attn_q=iq1_s"])


BF16 = ml_dtypes.bfloat16
DOWN = "model__layers__0__mlp__down_proj__weight"


def test_missing_companions(source: Path) -> None:
    (source / "tokenizer.model").unlink()
    refused(source, "tokenizer")
    (source / "config.json").unlink()
    refused(source, r"config\.json: no such file; the folder needs one")
    refused(source / "model.safetensors", r"config\.json: no such file; model\.safetensors, which says nothing")
    (source / "config.json").write_text("{")
    refused(source, r"config\.json: not JSON")
    (source / "config.json").write_text("{}")
    refused(source, "'architectures' does not name a model class")


def test_no_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, "no .safetensors file; pytorch_model.bin is a PyTorch file")


def test_wrong_architecture(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLMM"]}))
    refused(source, "'LlamaForCausalLMM' is not supported .*did you mean LlamaForCausalLM")
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    refused(source, "hidden_act = 'gelu' is not supported")


def test_tensors_that_do_not_fit(source: Path) -> None:
    down = np.zeros((256, 256), BF16)
    change(source, **{DOWN: None})
    refused(source, "'model.layers.0.mlp.down_proj.weight' is missing that config.json asks for")
    change(source, **{DOWN: down, "model__layers__1__mlp__down_proj__weight": down})
    refused(source, "'model.layers.1.mlp.down_proj.weight' is not known to this architecture")
    change(source, **{DOWN: down[:128], "model__layers__1__mlp__down_proj__weight": None})
    refused(source, r"has shape \[128, 256\]; config.json makes it \[256, 256\]")
    change(source, **{DOWN: np.zeros((256, 256), np.uint8)})
    refused(source, "has type U8, which cannot be converted")
    change(source, **{DOWN: down, "lm_head__weight": None})
    refused(source, "'lm_head.weight' is missing")  # config.json says that it is not tied


def test_derived_tensors_are_ignored(source: Path) -> None:
    inv_freq = np.ones(64, np.float32)
    change(source, model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq)
    assert len(convert(source, "q8_0", plan=True).tensors) == 12


@pytest.mark.parametrize(
    ("value", "type", "message"),
    [
        (np.nan, "q4_k", "NaN or infinite"),
        (np.inf, "q8_0", "NaN or infinite"),
        (-np.inf, "f32", "NaN or infinite"),
        (np.nan, "bf16", "NaN or infinite"),
        (1e9, "f16", r"weights up to 1e\+09 are too large for F16"),
        (1e9, "q4_0", "too large for Q4_0"),
        (1e12, "q6_k", "too large for Q6_K"),
    ],
)
def test_values_that_no_file_should_hold(value: float, type: str, message: str, source: Path) -> None:
    down = np.zeros((256, 256), np.float32)
    down[100, 7] = value
    change(source, **{DOWN: down})
    name = r"tensor 'model.layers.0.mlp.down_proj.weight' \(blk.0.ffn_down.weight\): "
    refused(source, name + ".*" + message, type, ggufkit.FormatError)


def test_nan_in_a_norm(source: Path) -> None:
    change(source, model__norm__weight=np.full(256, np.nan, BF16))
    refused(source, "tensor 'model.norm.weight'", error=ggufkit.FormatError)


def test_targets(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "x.gguf").write_text("precious")
    refused(source, "x.gguf exists already")
    assert (out / "x.gguf").read_text() == "precious"
    convert(source, "q4_k", out / "x.gguf", overwrite=True)
    before = (out / "x.gguf").read_bytes()
    (out / "link.gguf").symlink_to("x.gguf")
    for name in ("x.gguf", "link.gguf"):
        with pytest.raises(ggufkit.UsageError, match="is what the file is made from"):
            convert(out / "x.gguf", "q8_0", out / name, overwrite=True, allow_requantize=True)
    assert (out / "x.gguf").read_bytes() == before
    assert (out / "x.gguf").read_bytes()[:4] == b"GGUF"
    with pytest.raises(ggufkit.GgufkitError, match="there is no folder"):
        convert(source, "q4_k", out / "no" / "x.gguf")
    full = os.statvfs(out)
    space = type("Space", (), {"f_bavail": 10, "f_frsize": 4096, "f_blocks": full.f_blocks})()
    monkeypatch.setattr(os, "statvfs", lambda path: space)
    refused(source, "needs [0-9]+ bytes, but only 40960 are free", overwrite=True)


def test_everything_is_checked_before_the_first_byte(source: Path) -> None:
    """Each of these fails although the weights would fail, too, once they are read."""
    change(source, **{DOWN: np.full((256, 256), np.nan, BF16)})
    refused(source, "did you mean Q4_K", "q4_kk")
    refused(source, "matches no tensor", tensor_types=["nothing=q8_0"])
    refused(source, "NaN", error=ggufkit.FormatError)


def test_interrupted_by_its_caller(source: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    out = source.parent / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(source, "q4_k", out / "x.gguf", progress=progress)
    assert list(out.iterdir()) == []


def test_a_failing_write_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    write = os.write

    def failing(fd: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000 and os.fstat(fd).st_size > 50_000:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", failing)
    refused(source, "no space left on device", "f32")


# -- the command -----------------------------------------------------------------------------------


COMMAND = [sys.executable, "-c", "from ggufkit.cli import main; main()"]


def run(*args: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def test_command(source: Path, tmp_path: Path) -> None:
    planned = run("convert", source, "q4_k", "--plan", "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    document = json.loads(planned.stdout)
    assert (document["file_type"], document["output"]) == ("Q4_K_M", "model-x-Q4_K_M.gguf")
    assert not (tmp_path / "model-x-Q4_K_M.gguf").exists()
    done = run("convert", source, "q4_k", "--tensor-type", "attn_v=q8_0", "-t", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model-x-Q4_K_M.gguf is" in done.stdout and "bits per weight" in done.stdout
    assert "million weights in" in done.stderr
    again = run("convert", source, "q4_k", cwd=tmp_path)
    assert again.returncode != 0 and again.stdout == ""
    assert again.stderr.startswith("error: model-x-Q4_K_M.gguf exists already") and again.stderr.count("\n") == 1
    shown = run("convert", tmp_path / "model-x-Q4_K_M.gguf", "q2_k", "--plan", "--allow-requantize", cwd=tmp_path)
    assert "model-x-Q2_K.gguf would be" in shown.stdout
    assert "note: 8 tensors that were quantized already" in shown.stderr


def test_command_shows_fallbacks(tmp_path: Path) -> None:
    source = checkpoints.make(tmp_path / "m", dim=96, ffn=272, heads=3, kv=3)
    shown = run("convert", source, "q4_k", "--dry-run", cwd=tmp_path).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "blk.*.attn_q.weight 2 Q4_K Q5_0 rows of 96 are not divisible by 256" in lines
    assert "output.weight 1 Q6_K Q8_0 rows of 96 are not divisible by 256" in lines


def test_command_takes_a_repository(source: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with Hub({"org/Tiny-1M": files}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = run("convert", "hf:org/Tiny-1M", "q8_0", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    with gguf.open(tmp_path / "Tiny-1M-Q8_0.gguf") as f:
        assert f.metadata["general.name"] == "Tiny 1M"


@pytest.mark.parametrize("given", [".", "model.safetensors", "../model-x", "other.safetensors"])
def test_name_of_the_output(given: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    if given == "other.safetensors":
        (source / "model.safetensors").rename(source / given)
    name = "other" if given.startswith("other") else "model-x"
    assert convert(given, "q8_0", plan=True).output == f"{name}-Q8_0.gguf"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of 200 million weights in three large tensors."""
    folder = checkpoints.make(tmp_path_factory.mktemp("wide") / "m", layers=1, heads=8, kv=8, dim=1024, ffn=256,
                              tied=True, n_vocab=320)  # fmt: skip
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.resize(rng.standard_normal(1 << 20).astype(BF16), (1024, 65536))
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = np.zeros((65536, 1024), BF16)
    checkpoints.write_tensors(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 65536}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_bounded(wide: Path, tmp_path: Path) -> None:
    """200 million weights, 400 MB: at most 480 MB of resident memory, which includes Numba's 150."""
    code = (
        "import sys, ggufkit; ggufkit.convert(sys.argv[1], 'q8_0', sys.argv[2], threads=2);"
        "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(wide), str(tmp_path / "x.gguf")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 480_000


def test_ctrl_c(wide: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "convert", str(wide), "q8_0", "-o", "x.gguf"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, "Traceback" in err) == ("", False)
    assert list(tmp_path.iterdir()) == []
