"""Hold importance matrices against llama.cpp's: files quantized with one, and a matrix of ours beside one of its own.

    python tools/check_imatrix.py files --python PYTHON [--matrix FILE --model FILE] [--types q4_k_m,q4_0]
    python tools/check_imatrix.py sums OURS.gguf THEIRS.gguf

`files` compares whole files with llama_model_quantize's. PYTHON is an interpreter with llama-cpp-python (a build whose
ggml-base has no fused products, which is the usual one); without a model, a small random one and a made-up matrix
are taken. `sums` prints the relative L2 distance of the sums of each tensor. Exits 1 where bytes or counts differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import checkpoints
from check_against_llama_cpp import compare
from ggufkit_formats import gguf

from ggufkit.convert import convert
from ggufkit.quantize import file_types, imatrix

TYPES = "q2_k_s,q2_k,q3_k_s,q3_k_m,q3_k_l,q4_k_s,q4_k_m,q5_k_s,q5_k_m,q6_k,q4_0,q4_1,q5_0,q5_1,q8_0,f16"

# What llama-quantize does with its command line; the matrix comes as an .npz of importance by name.
QUANTIZE = """
import ctypes, json, sys
import numpy as np, llama_cpp as L
source, target, number, matrix, notes = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4]), sys.argv[5]
params = L.llama_model_quantize_default_params()
params.ftype, params.nthread, params.allow_requantize = number, 2, True
rows = (L.llama_model_imatrix_data * (len(matrix.files) + 1))()
kept = [np.ascontiguousarray(matrix[name], np.float32) for name in matrix.files]
for row, name, values in zip(rows, matrix.files, kept):
    row.name, row.size = name.encode(), values.size
    row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
params.imatrix = rows
notes = json.loads(notes)
overrides = (L.llama_model_kv_override * (len(notes) + 1))()
for override, (key, value) in zip(overrides, notes):
    override.key, override.tag = key.encode(), 3 if isinstance(value, str) else 0
    if isinstance(value, str):
        override.value.val_str = value.encode()[:127]
    else:
        override.value.val_i64 = value
params.kv_overrides = overrides
sys.exit(L.llama_model_quantize(source.encode(), target.encode(), params))
"""


def importance(path: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, str | int]]]:
    """Mean squares by name, and llama-quantize's notes, read with the gguf package."""
    reader = GGUFReader(path)
    tensors = {t.name: np.array(t.data, np.float32) for t in reader.tensors}
    values = {}
    for name in (t.removesuffix(".in_sum2") for t in tensors if t.endswith(".in_sum2")):
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        sums = tensors[f"{name}.in_sum2"].reshape(len(counts), -1)
        values[name] = np.where(counts > 0, sums / np.maximum(counts, np.float32(1)), np.float32(1)).reshape(-1)
    dataset = reader.fields["imatrix.datasets"].contents()[0]
    chunks = int(reader.fields["imatrix.chunk_count"].contents())
    notes: list[tuple[str, str | int]] = [
        ("quantize.imatrix.file", str(path)),
        ("quantize.imatrix.dataset", dataset),
        ("quantize.imatrix.entries_count", len(values)),
        ("quantize.imatrix.chunks_count", chunks),
    ]
    return values, notes


def made_up(model: Path, path: Path) -> Path:
    """A matrix for the model, of columns that matter very differently."""
    rng = np.random.default_rng(0)
    entries = {}
    with gguf.open(model) as f:
        for name, tensor in f.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) > 1:
                sums = 5120 * rng.standard_normal(tensor.cols) ** 2 * 10.0 ** rng.uniform(-3, 2, tensor.cols)
                entries[name] = imatrix.Entry(sums.astype(np.float32), np.array([5120]))
    imatrix.write(imatrix.Imatrix(entries, ["a.txt"], 10, 512), path)
    return path


def files(python: str, model: Path | None, matrix: Path | None, types: list[str]) -> int:
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if model is None:
            model = work / "model.gguf"
            convert(checkpoints.make(work / "model", layers=9), "f32", model)
        matrix = matrix or made_up(model, work / "matrix.gguf")
        values, notes = importance(matrix)
        np.savez(work / "matrix.npz", **values)  # type: ignore[arg-type]
        for name in types:
            ours, theirs = work / "ours.gguf", work / "theirs.gguf"
            number = str(file_types.find(name).id)
            command = [python, "-c", QUANTIZE, model, theirs, number, work / "matrix.npz", json.dumps(notes)]
            subprocess.run([str(each) for each in command], check=True, capture_output=True)
            convert(model, name, ours, overwrite=True, imatrix=matrix, allow_requantize=True, threads=2)
            same = ours.read_bytes() == theirs.read_bytes()
            print(f"{name:8} {'equal' if same else 'differs'}", flush=True)
            if not same:
                print(*compare(ours, theirs, ordered=True), sep="\n")
            bad += not same
    return bad


def sums(ours: Path, theirs: Path) -> int:
    a, b = imatrix.read(ours), imatrix.read(theirs)
    if set(a.entries) != set(b.entries):
        print(f"other tensors: {sorted(set(a.entries) ^ set(b.entries))[:5]}")
        return 1
    counts = sum(not np.array_equal(a.entries[name].counts, b.entries[name].counts) for name in a.entries)
    far = {}
    for name, entry in b.entries.items():
        x, y = a.entries[name].sums.astype(np.float64), entry.sums.astype(np.float64)
        far[name] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    worst = max(far, key=lambda name: far[name])
    median = np.median(list(far.values()))
    print(f"{len(far)} tensors, counts differ in {counts}; relative L2: median {median:.2e}, {worst} {far[worst]:.2e}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("files")
    first.add_argument("--python", required=True)
    first.add_argument("--model", type=Path)
    first.add_argument("--matrix", type=Path)
    first.add_argument("--types", default=TYPES)
    second = commands.add_parser("sums")
    second.add_argument("ours", type=Path)
    second.add_argument("theirs", type=Path)
    args = parser.parse_args()
    if args.command == "sums":
        return int(sums(args.ours, args.theirs) > 0)
    return int(files(args.python, args.model, args.matrix, args.types.split(",")) > 0)


if __name__ == "__main__":
    sys.exit(main())
