"""A large ternary checkpoint there and back: safetensors -> GGUF -> safetensors, every weight compared.

    python tools/check_export.py --layers 8 --dim 2048 --ffn 5632 --types tq2_0,tq1_0,q2_0 --dtypes bf16,packed

Weights are random codes -1, 0, 1 times a bfloat16 scale a matrix. Prints counts, times and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import checkpoints
import ml_dtypes
from ggufkit_formats import bitnet, safetensors

import ggufkit

SUFFIX = "_proj.weight"


def make(folder: Path, arch: str, dim: int, ffn: int, layers: int) -> int:
    """Write the checkpoint, layer by layer in files of their own; returns the number of ternary weights."""
    heads, kv, count = dim // 128, max(1, dim // 512), 0
    checkpoints.make(folder, arch, dim=dim, ffn=ffn, layers=layers, heads=heads, kv=kv, tied=True,
                     drop=(), config={"hidden_act": "relu2"} if arch == "bitnet" else None)  # fmt: skip
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    rng = np.random.default_rng(11)
    for name, x in tensors.items():
        if name.endswith(SUFFIX):
            scale = ml_dtypes.bfloat16(rng.uniform(0.5, 2.0))
            tensors[name] = rng.integers(-1, 2, x.shape, np.int8).astype(ml_dtypes.bfloat16) * scale
            count += x.size
    checkpoints.write_tensors(folder, tensors)
    return count


def equal(first: Path, again: Path) -> tuple[int, int]:
    """Ternary weights that were compared, and those that differ."""
    with safetensors.open(first) as a, safetensors.open(again) as b:
        compared = different = 0
        for name in (name for name in a.tensors if name.endswith(SUFFIX)):
            one, two = a.tensors[name], b.tensors[name]
            if two.type.name == "U8":
                scale = float(b.tensors[f"{name}_scale"].dequantize()[0])
                two = bitnet.PackedTernary(two, scale).tensor(name)
            for start, stop in one.slabs(1 << 25):
                x, y = (t.type.decode(t.read_rows(start, stop)) for t in (one, two))
                compared, different = compared + x.size, different + int((x != y).sum())
    return compared, different


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 8), ("dim", 2048), ("ffn", 5632)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--arch", default="bitnet")
    parser.add_argument("--types", default="tq2_0")
    parser.add_argument("--dtypes", default="bf16,packed")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as place:
        first = Path(place) / "first"
        count = make(first, args.arch, args.dim, args.ffn, args.layers)
        settings = json.loads((first / "config.json").read_text())
        print(f"{settings['architectures'][0]}, {count:,} ternary weights")
        for kind in args.types.split(","):
            gguf = Path(place) / f"{kind}.gguf"
            ggufkit.convert(first, kind, gguf)
            for dtype in args.dtypes.split(","):
                began = time.monotonic()
                ggufkit.export(gguf, Path(place) / "again", dtype, overwrite=True)
                seconds = time.monotonic() - began
                compared, different = equal(first, Path(place) / "again")
                failed |= bool(different) or compared != count
                print(f"{kind} -> {dtype}: {compared:,} compared, {different} differ, {seconds:.1f} s")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB, making included")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
