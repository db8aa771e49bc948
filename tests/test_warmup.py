"""`ggufkit warmup`, and the kernels that a model turns out to need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from ggufkit_formats.blocks import TYPES, ScaledType, find
from ggufkit_kernels.cpu import jit, prepare
from ggufkit_kernels.cpu.encode import encode
from ggufkit_kernels.cpu.jit import Entry
from ggufkit_runtime import generate

RUN = [sys.executable, "-m", "ggufkit"]


def command(*words, **environment):
    return subprocess.run(
        [*RUN, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_compiles_once_and_says_where(tmp_path):
    words = ["warmup", "--type", "q8_0", "--no-encoders", "--json"]
    first = command(*words, GGUFKIT_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["types"] == ["Q8_0"] and told["compiled"] == told["kernels"] > 10 and told["encoders"] == 0
    assert told["cache"].startswith(str(tmp_path)) and told["cache_nbytes"] > 10_000
    again = command(*words[:-1], GGUFKIT_CACHE_DIR=str(tmp_path))
    assert again.returncode == 0 and "0 of them compiled now" in again.stdout


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--types", "q9_9"], 2, "q9_9"),
        (["--type", "q8_0", "--type", "q9"], 2, "q9"),
        (["--types", ","], 2, "names no type"),
        (["missing.gguf"], 1, "missing.gguf"),
    ],
)
def test_wrong_use_is_one_line(words, status, message):
    done = command("warmup", *words)
    assert done.returncode == status and message in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("arch", "type", "scales"),
    [("llama", "Q4_K", False), ("llama", "F16", False), ("bitnet", "TQ2_0", True), ("bitnet", "TQ1_0", True),
     ("bitnet", "F16", True)],
)  # fmt: skip
def test_a_model_uses_what_was_prepared_and_nothing_else(arch, type, scales, tmp_path, monkeypatch):
    act = "relu2" if arch == "bitnet" else "silu"
    path = tiny_models.write(tmp_path / "m.gguf", arch, type, scales=scales, hidden_act=act)
    used = set()
    ready = Entry._ready

    def remember(self):
        used.add(self.name)
        return ready(self)

    with generate.gguf.open(path) as file:
        layers, ends = generate.matrix_types(file.tensors)
    ours = prepare.of_network(layers, ends)
    for entry in ours:
        monkeypatch.setattr(entry, "_address", 0)
    monkeypatch.setattr(Entry, "_ready", remember)
    model = generate.load(path, threads=2)
    cache = model.cache()
    model.forward(list(range(40)), cache, first=39)
    model.forward([1], cache)
    assert used <= {entry.name for entry in ours}
    assert (f"{type} scaled" if scales else type) in {t.name for t in layers}


def test_a_file_s_scales_and_importance_are_compiled_for(tmp_path):
    path = tiny_models.write(tmp_path / "m.gguf", "bitnet", "TQ2_0", scales=True, hidden_act="relu2")
    told = command("warmup", str(path), "--json", GGUFKIT_CACHE_DIR=str(tmp_path / "cache"))
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["types"] == ["TQ2_0"]
    names = [entry.name for entry in prepare.of_types([ScaledType(find("TQ2_0"), 1.0)])]
    kept = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert all(any(name in file for file in kept) for name in [*names, "elementwise.relu2"])
    assert "pack_fast.pack_words" in names
    for name, encoders in (("q4_0", 1), ("iq2_xxs", 1)):  # with and without importance; not without
        assert command("warmup", "--types", name, "--json").returncode == 0, encoders
    before = jit.compiled()
    for importance in (None, np.ones(2048, np.float32)):
        encode("q4_0", np.zeros((1, 2048), np.float32), importance)
    assert jit.compiled() == before


def test_every_type_that_packs_by_a_map_is_known():
    for type in TYPES.values():
        names = [entry.name for entry in prepare.of_types([type])]
        assert len(names) == len(set(names))
    assert "pack_fast.pack_tq1_0" in [entry.name for entry in prepare.of_types([find("TQ1_0")])]
    scaled = [entry.name for entry in prepare.of_types([ScaledType(find("F16"), 1.0)])]
    assert any(name.startswith("plain_matmul.plain_matmul-0") for name in scaled)  # becomes float32, by NumPy
    assert len(prepare.of_types([find("Q4_0"), find("Q4_0")])) == len(prepare.of_types([find("Q4_0")]))
