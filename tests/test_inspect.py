"""`ggufkit inspect`: its JSON, its text, its speed, and files that mean harm."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
from typing import NamedTuple

import hostile
import pytest
from command_line import ggufkit
from ggufkit_formats import gguf
from hostile import ARRAY, BOOL, F32, FLOAT32, FLOAT64, INT32, STRING, UINT32, array, entry, info, string, u32
from test_gguf_read import put, put_split, sample, shard

from ggufkit.cli import main

COMMAND = [sys.executable, "-c", "from ggufkit.cli import main; main()", "inspect"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def inspect(*args: object) -> Done:
    """The command as a user runs it into a pipe, but in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main(["inspect", *map(str, args)])
    signal.signal(signal.SIGTERM, before)
    return Done(int(exit.value.code or 0), out.getvalue(), err.getvalue())


def document(*args: object) -> dict:
    done = inspect(*args, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(done.stdout, parse_constant=refuse)


def test_json_of_a_small_file(tmp_path):
    path = put(tmp_path, sample())
    found = document(path)
    assert list(found) == ["file", "version", "byte_order", "alignment", "metadata", "tensors", "summary"]
    assert (found["file"], found["version"], found["byte_order"], found["alignment"]) == (str(path), 3, "little", 64)
    assert found["metadata"] == {
        "general.architecture": "llama",
        "general.alignment": 64,
        "flag": True,
        "eps": pytest.approx(1e-5),
        "tokens": ["<s>", "", "ab", "né"],
        "scores": [1.0, 2.0, 3.0],
        "flags": [True, False, True],
        "deep": [[1, -2], ["x"]],
        "empty": [],
    }
    start = path.stat().st_size - 200
    assert found["tensors"] == [
        {"name": "a", "type": "F32", "shape": [8, 2], "offset": start, "nbytes": 64},
        {"name": "b", "type": "Q4_0", "shape": [32, 1, 2], "offset": start + 64, "nbytes": 36},
        {"name": "c", "type": "999", "shape": [3], "offset": start + 128, "nbytes": 64},
        {"name": "d", "type": "F16", "shape": [4], "offset": start + 192, "nbytes": 8},
    ]
    assert found["summary"] == {
        "n_tensors": 4,
        "n_parameters": 87,
        "n_bytes": 172,
        "bits_per_weight": round(172 * 8 / 87, 4),
        "types": {"F32": 1, "Q4_0": 1, "999": 1, "F16": 1},
    }


def test_long_arrays_show_their_head(tmp_path):
    words = b"".join(string(f"w{i}") for i in range(17))
    entries = [
        entry("words", ARRAY, array(STRING, 17, words)),
        entry("sixteen", ARRAY, array(INT32, 16, struct.pack("<16i", *range(16)))),
        entry("seventeen", ARRAY, array(INT32, 17, struct.pack("<17i", *range(17)))),
    ]
    path = put(tmp_path, hostile.gguf(entries))
    found = document(path)["metadata"]
    assert found["words"] == {"type": "STRING", "length": 17, "head": [f"w{i}" for i in range(16)]}
    assert found["sixteen"] == list(range(16))
    assert found["seventeen"] == {"type": "INT32", "length": 17, "head": list(range(16))}
    found = document(path, "--full")["metadata"]
    assert found["words"] == [f"w{i}" for i in range(17)] and found["seventeen"] == list(range(17))


def test_numbers_that_json_lacks(tmp_path):
    three = struct.pack("<3f", float("nan"), float("inf"), 1.0)
    entries = [
        entry("nan", FLOAT32, struct.pack("<f", float("nan"))),
        entry("inf", FLOAT64, struct.pack("<d", float("-inf"))),
        entry("array", ARRAY, array(FLOAT32, 3, three)),
        entry("many", ARRAY, array(FLOAT32, 30, three * 10)),
    ]
    found = document(put(tmp_path, hostile.gguf(entries)))["metadata"]
    assert found["nan"] is None and found["inf"] is None and found["array"] == [None, None, 1.0]
    assert found["many"]["head"][:3] == [None, None, 1.0]


def test_json_options(tmp_path):
    path = put(tmp_path, sample())
    assert "tensors" not in document(path, "--no-tensors")
    assert document(path, "--key", "eps")["metadata"] == {"eps": pytest.approx(1e-5)}


def test_default_model(default_model_path):
    found = document(default_model_path)
    assert found["summary"] == {
        "n_tensors": 272,
        "n_parameters": 134515008,
        "n_bytes": 96576768,
        "bits_per_weight": 5.7437,
        "types": {"Q4_1": 210, "F32": 61, "Q8_0": 1},
    }
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 49152
    first = {"name": "token_embd.weight", "type": "Q8_0", "shape": [576, 49152], "offset": 1785664, "nbytes": 30081024}
    assert found["tensors"][0] == first


def test_text(tmp_path):
    done = inspect(put(tmp_path, sample()))
    lines = done.stdout.splitlines()
    assert lines[1].startswith("GGUF version 3, little endian, alignment 64, ")
    assert "  general.architecture  llama" in lines and "  eps                   1e-05" in lines
    assert '  tokens                STRING × 4: "<s>", "", "ab", "né"' in lines
    assert "  flag                  true" in lines and "  empty                 STRING × 0" in lines
    assert '  deep                  ARRAY × 2: INT32 × 2: 1, -2, STRING × 1: "x"' in lines
    assert any(line.split() == ["b", "Q4_0", "32", "×", "1", "×", "2", "36", "B", "640"] for line in lines), lines
    assert lines[-2:] == [
        "4 tensors, 87 parameters, 172 B, 15.82 bits per weight",
        "F32 × 1, Q4_0 × 1, 999 × 1, F16 × 1",
    ]
    assert "Tensors" not in inspect(tmp_path / "t.gguf", "--no-tensors").stdout


def test_one_value(tmp_path):
    template = "{% for m in messages %}\n\t{{ m }}{% endfor %}" * 50
    entries = [
        entry("tokenizer.chat_template", STRING, string(template)),
        entry("llama.block_count", UINT32, u32(30)),
        entry("llama.rope.freq_base", FLOAT32, struct.pack("<f", 1e-5)),
        entry("flag", BOOL, b"\0"),
        entry("words", ARRAY, array(STRING, 3, string("a b") + string("line\nbreak") + string("né"))),
        entry("ids", ARRAY, array(INT32, 40, struct.pack("<40i", *range(40)))),
    ]
    path = put(tmp_path, hostile.gguf(entries))

    def value(key: str) -> str:
        return inspect(path, "--key", key).stdout

    assert value("tokenizer.chat_template") == template + "\n"
    assert value("llama.block_count") == "30\n" and value("flag") == "false\n"
    assert value("llama.rope.freq_base") == "1e-05\n"
    assert value("words") == "a b\nline\\nbreak\nné\n"
    assert value("ids") == "".join(f"{i}\n" for i in range(40))
    for wrong, near in [("llama.block_cout", "llama.block_count"), ("qwen.block_count", "llama.block_count")]:
        done = inspect(path, "--key", wrong)
        message = f"error: {path}: no metadata key '{wrong}'; did you mean {near}?\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    shown = inspect(path).stdout
    assert f"({len(template)} characters)" in shown and template.replace("\n", "\\n").replace("\t", "\\t") not in shown
    assert template.replace("\n", "\\n").replace("\t", "\\t") in inspect(path, "--full").stdout


def evil() -> bytes:
    """Escape sequences, line breaks and broken UTF-8 wherever a file can say something."""
    entries = [
        entry("evil\x1b[2Jkey", STRING, string("\x1b]0;title\x07 \u202ereversed\r\n\x9b31m")),
        entry("bytes", STRING, string(b"\xff\xfe")),
        entry("words", ARRAY, array(STRING, 2, string("\x1b[31m") + string(b"\xc3("))),
    ]
    return hostile.gguf(entries, [info("bad\nname\x1b[0m", [8], F32, 0)], bytes(32))


def test_strings_that_drive_a_terminal_are_escaped(tmp_path):
    path = put(tmp_path, evil())
    shown = inspect(path).stdout
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert r"evil\x1b[2Jkey" in shown and r"\x1b]0;title\x07 \u202ereversed\r\n\x9b31m" in shown
    assert r"bad\nname\x1b[0m" in shown
    assert all(c.isprintable() or c == "\n" for c in inspect(path, "--key", "words").stdout)
    found = document(path)
    assert found["metadata"]["bytes"] == "\ufffd\ufffd" and found["tensors"][0]["name"] == "bad\nname\x1b[0m"


def terminal(columns: int, *args: object) -> str:
    """What the command writes to a terminal of that width."""
    pty = pytest.importorskip("pty")
    near, far = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns)}
    process = subprocess.Popen([*COMMAND, *map(str, args)], stdout=far, stderr=far, env=environment)
    os.close(far)
    parts = []
    while True:
        try:
            part = os.read(near, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(near)
    assert process.wait(60) == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [70, 80, 200])
def test_a_terminal_is_not_overrun(columns, default_model_path, tmp_path):
    lines = terminal(columns, default_model_path).splitlines()[1:]
    assert max(map(len, lines)) <= columns
    infos = [info("a.very.long.tensor.name." * 4, [1 << 20, 0, 3, 1], F32, 0), info("short", [8], F32, 0)]
    path = put(tmp_path, hostile.gguf([entry("k" * 100, STRING, string("v" * 1000))], infos, bytes(32)))
    lines = terminal(columns, path).splitlines()
    table = lines[lines.index("Tensors") + 1 :]
    assert max(map(len, table)) <= max(columns, 60)
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_no_escape_sequences_from_a_value(tmp_path):
    path = put(tmp_path, evil())
    assert "\x1b" not in terminal(80, path) + terminal(80, path, "--key", "evil\x1b[2Jkey")


def test_split_files(tmp_path):
    paths = put_split(tmp_path, shard(0, 2, "ab", 3), shard(1, 2, "c", 3))
    for path in paths:
        found = document(path)
        assert found["file"] == str(path) and found["shards"] == [str(p) for p in paths]
        assert [(t["name"], t["shard"]) for t in found["tensors"]] == [("a", 0), ("b", 0), ("c", 1)]
        assert found["summary"]["n_tensors"] == 3
        for t in found["tensors"]:
            data = paths[t["shard"]].read_bytes()[t["offset"] :][: t["nbytes"]]
            assert data == struct.pack("<f", ord(t["name"])) * 8
    assert "2 shards" in inspect(paths[1]).stdout


def test_vocabularies_adapters_and_unknown_architectures(tmp_path):
    vocabulary = put(tmp_path, hostile.gguf([entry("general.architecture", STRING, string("frobnicate"))]), "v.gguf")
    assert document(vocabulary)["summary"] == {
        "n_tensors": 0, "n_parameters": 0, "n_bytes": 0, "bits_per_weight": 0.0, "types": {},
    }  # fmt: skip
    assert "0 tensors" in inspect(vocabulary).stdout
    entries = [entry("general.type", STRING, string("adapter")), entry("adapter.type", STRING, string("lora"))]
    infos = [info("blk.0.attn_q.weight.lora_a", [8, 1], F32, 0), info("blk.0.attn_q.weight.lora_b", [1, 8], F32, 32)]
    adapter = put(tmp_path, hostile.gguf(entries, infos, bytes(64)), "a.gguf")
    assert [t["shape"] for t in document(adapter)["tensors"]] == [[8, 1], [1, 8]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hostile.safetensors({"a": hostile.tensor()}), "not a GGUF file: the file is a safetensors file"),
        (b"", "not a GGUF file: the file is empty"),
        (sample()[:700], "but the file ends at 700"),
        (None, "no such file"),
    ],
)
def test_errors_are_one_line(data, message, tmp_path):
    path = tmp_path / "t.gguf"
    if data is not None:
        path.write_bytes(data)
    for options in ([], ["--json"], ["--key", "x"]):
        done = inspect(path, *options)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_folders_are_no_files(tmp_path):
    done = inspect(tmp_path)
    assert done.returncode == 1 and "is a folder, not a file" in done.stderr
    assert inspect().returncode == 2


def test_a_large_vocabulary_is_shown_at_once(tmp_path):
    """262,144 tokens and as many merges; the limit is generous, for busy machines: 0.35 s where this was written."""
    words = [f"token{i}" for i in range(262_144)]
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": words}
    path = tmp_path / "t.gguf"
    with gguf.Writer(path, gguf.Plan(metadata, [])):
        pass
    times = []
    for _ in range(3):
        before = os.times()
        assert subprocess.run([*COMMAND, path], capture_output=True, timeout=60).returncode == 0
        after = os.times()  # processor time: other programs may keep us waiting
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 1.0, times


def test_no_heavy_imports(tmp_path):
    path = put(tmp_path, sample())
    script = (
        "import sys\nfrom ggufkit.cli import group\n"
        f"group.main(['inspect', {str(path)!r}], standalone_mode=False)\n"
        "heavy = {'numba', 'rich', 'torch', 'gguf', 'jinja2', 'tokenizers', 'cupy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_names_the_options():
    shown = inspect("--help").stdout
    assert all(option in shown for option in ("FILE", "--json", "--key", "--no-tensors", "--full"))


# -- what fits ---------------------------------------------------------------------------------------


def test_fit(tmp_path):
    """Bytes are those of the packed matrices; layers fit one by one, the ends last; no GPU is asked."""
    import tiny_models
    from ggufkit_kernels.cpu import pack

    path = tiny_models.write(tmp_path / "m.gguf", "llama", "Q4_K", optional=False)
    found = json.loads(ggufkit("inspect", path, "--fit", "-c", "64", "--memory", "1G", "--json").out)
    with gguf.open(path) as file:
        packed = sum(pack.pack(t).nbytes if len(t.shape) == 2 else t.nbytes for name, t in file.tensors.items())
    assert found["weights"] == packed and found["n_gpu_layers"] == found["n_layers"] + 1 == 3
    assert found["total"] == found["weights"] + found["cache"] + found["scratch"]
    assert found["cache"] >= 2 * 2 * 2 * 64 * 64 * found["n_layers"]  # keys and values, halves, heads of 64
    fitting = [
        json.loads(ggufkit("inspect", path, "--fit", "-c", "64", "--memory", str(n), "--json").out)["n_gpu_layers"]
        for n in (found["total"], found["total"] - 1, found["scratch"], (3 * found["total"] + found["scratch"]) // 4)
    ]
    assert fitting[:3] == [3, 2, 0] and fitting[3] in (1, 2)
    assert "all of it fits (-ngl 3)" in ggufkit("inspect", path, "--fit", "--memory", "24GB").out
    assert ggufkit("inspect", path, "--fit", "--memory", "much").status == 2
    assert ggufkit("inspect", path, "--memory", "1G").status == 2
