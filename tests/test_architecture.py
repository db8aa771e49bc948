"""The import rules of the project, and that the wheel holds every module."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "ggufkit_formats": ROOT / "formats" / "ggufkit_formats",
    "ggufkit_kernels": ROOT / "kernels" / "ggufkit_kernels",
    "ggufkit_runtime": ROOT / "runtime" / "ggufkit_runtime",
    "ggufkit": ROOT / "ggufkit",
}
ORDER = list(PACKAGES)
MODULES = [(name, path) for name, root in PACKAGES.items() for path in sorted(root.rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports in a file, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def label(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value


@pytest.mark.parametrize(("package", "path"), MODULES, ids=label)
def test_imports_go_downwards(package, path):
    above = set(ORDER[ORDER.index(package) + 1 :])
    assert not imports(path) & above


@pytest.mark.parametrize(("package", "path"), MODULES, ids=label)
def test_numba_and_cupy_stay_in_their_places(package, path):
    found = imports(path)
    if "kernels/ggufkit_kernels/cpu/" not in path.as_posix():
        assert not found & {"numba", "llvmlite"}
    if "kernels/ggufkit_kernels/cuda/" not in path.as_posix():
        assert "cupy" not in found


@pytest.mark.parametrize("path", sorted((PACKAGES["ggufkit_runtime"] / "models").glob("*.py")), ids=label)
def test_models_import_formats_only(path):
    assert not imports(path) & {"ggufkit_kernels", "numba", "sentencepiece", "tokenizers"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level > 1), "models reach only into models"


@pytest.mark.parametrize("statement", ["import ggufkit", "import ggufkit.cli", "import ggufkit.cli.inspect"])
def test_light_imports(statement):
    heavy = {"numba", "cupy", "tokenizers", "sentencepiece", "jinja2", "rich", "huggingface_hub", "gguf", "torch"}
    code = f"import sys; {statement}; print(' '.join(sorted(set(sys.modules) & {heavy!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_llvm_stays_in_simd():
    cpu = PACKAGES["ggufkit_kernels"] / "cpu"
    for path in cpu.rglob("*.py"):
        if path.parent.name != "simd":
            allowed = {"llvmlite"} if path.name in ("compiler.py", "link.py") else set()
            assert not (imports(path) & {"llvmlite"}) - allowed, path
            assert path.name == "compiler.py" or "llvmlite.ir" not in path.read_text(encoding="utf-8"), path


def test_only_the_compiler_compiles():
    for path in (PACKAGES["ggufkit_kernels"] / "cpu").rglob("*.py"):
        if path.name != "compiler.py":
            names = {
                n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)
            }
            assert not names & {"njit", "jit"}, path


def test_wheel_holds_every_module(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, root in PACKAGES.items():
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(root).as_posix()}" in held
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == set(PACKAGES)
