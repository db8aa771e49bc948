"""`ggufkit warmup`, and the kernels that a model turns out to need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny_models
from ggufkit_formats.blocks import TYPES, find
from ggufkit_kernels.cpu import prepare
from ggufkit_kernels.cpu.jit import Entry
from ggufkit_runtime import generate

RUN = [sys.executable, "-m", "ggufkit"]


def command(*words, **environment):
    return subprocess.run(
        [*RUN, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_compiles_once_and_says_where(tmp_path):
    words = ["warmup", "--types", "q8_0", "--no-encoders", "--json"]
    first = command(*words, GGUFKIT_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["types"] == ["Q8_0"] and told["compiled"] == told["kernels"] > 10 and told["encoders"] == 0
    assert told["cache"].startswith(str(tmp_path)) and told["cache_nbytes"] > 10_000
    again = command(*words[:-1], GGUFKIT_CACHE_DIR=str(tmp_path))
    assert again.returncode == 0 and "0 of them compiled now" in again.stdout


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [(["--types", "q9_9"], 2, "q9_9"), (["--types", ","], 2, "names no type"), (["missing.gguf"], 1, "missing.gguf")],
)
def test_wrong_use_is_one_line(words, status, message):
    done = command("warmup", *words)
    assert done.returncode == status and message in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("type", ["Q4_K", "F16"])
def test_a_model_uses_what_was_prepared_and_nothing_else(type, tmp_path, monkeypatch):
    path = tiny_models.write(tmp_path / "m.gguf", "llama", type)
    used = set()
    ready = Entry._ready

    def remember(self):
        used.add(self.name)
        return ready(self)

    with generate.gguf.open(path) as file:
        types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) == 2}
    ours = prepare.of_network(types, types)
    for entry in ours:
        monkeypatch.setattr(entry, "_address", 0)
    monkeypatch.setattr(Entry, "_ready", remember)
    model = generate.load(path, threads=2)
    cache = model.cache()
    model.forward(list(range(40)), cache, first=39)
    model.forward([1], cache)
    assert used <= {entry.name for entry in ours}
    assert type in {t.name for t in types}


def test_every_type_that_packs_by_a_map_is_known():
    for type in TYPES.values():
        names = [entry.name for entry in prepare.of_types([type])]
        assert len(names) == len(set(names))
    assert "pack_fast.pack_tq1_0" in [entry.name for entry in prepare.of_types([find("TQ1_0")])]
    assert len(prepare.of_types([find("Q4_0"), find("Q4_0")])) == len(prepare.of_types([find("Q4_0")]))
