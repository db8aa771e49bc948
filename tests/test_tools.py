"""tools/make_model.py and tools/bench_peers.py: small models that load everywhere, and honest reports."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ggufkit_formats import gguf
from ggufkit_formats.errors import GgufkitError, UnsupportedError
from ggufkit_runtime import generate
from ggufkit_runtime.models import llama
from oracles.llama import Llama, available

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import decode_share  # noqa: E402
import gpu_check  # noqa: E402
import make_model  # noqa: E402
import speed_plot  # noqa: E402
from peers import data, host, limits, measure, report, wire  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(not available(), reason="needs xllamacpp")

CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu pni ssse3 fma f16c avx avx2 bmi2 avx512f avx512_vnni

processor\t: 1
flags\t\t: fpu
"""
WHEEL = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | AVX512 = 0 | OPENMP = 1 | "


# -- make_model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "millions"), [("135m", 134.5), ("1b", 1100.0), ("3b", 3212.7), ("8b", 8030.3)])
def test_shapes_are_those_of_the_models_they_are_named_after(shape: str, millions: float):
    settings = make_model.SHAPES[shape]
    specs = llama.tensors(llama.config_from_hf(settings))
    wanted = [spec for spec in specs if make_model._wanted(spec, settings["tie_word_embeddings"])]
    assert sum(np.prod(spec.shape) for spec in wanted) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert not any(spec.gguf.endswith("bias") for spec in wanted)


@pytest.mark.parametrize("type", ["q4_k_m", "Q8_0", "f16"])
@needs_llama_cpp
def test_a_made_model_runs_in_llama_cpp_and_here(tmp_path: Path, type: str):
    path = tmp_path / "tiny.gguf"
    plan = make_model.write("tiny", type, path)
    assert path.stat().st_size == plan.nbytes
    ids = [1, 300, 301, 302, 77, 400]
    ours = generate.load(path, device="reference").logits(ids)
    with Llama(path, n_ctx=64, n_threads=1) as oracle:
        theirs = oracle.logits(ids)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
    assert ours.std() > 0.1


def test_types_follow_the_file_type(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    make_model.write("tiny", "Q4_K_M", path)
    with gguf.open(path) as file:
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert file.metadata["general.file_type"] == 15
    assert types["token_embd.weight"] == "Q6_K"  # the output, too
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert types["blk.2.attn_v.weight"] == "Q6_K"
    assert types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("type", ["nf4", "nf4_dq"])
def test_a_made_model_in_nf4(tmp_path: Path, type: str):
    path = tmp_path / "tiny.gguf"
    plan = make_model.write("tiny", type, path)
    assert path.stat().st_size == plan.nbytes
    with gguf.open(path) as file:
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert "general.file_type" not in file.metadata
        weights = file.tensors["blk.0.ffn_up.weight"].dequantize()
    assert weights.std() == pytest.approx(make_model.STD, rel=0.05)
    assert types["blk.0.attn_q.weight"] == "NF4" and types["token_embd.weight"] == "F16"
    assert np.isfinite(generate.load(path, device="reference").logits([1, 300, 301])).all()


def test_a_made_model_in_a_type_that_needs_importance(tmp_path: Path):
    make_model.write("tiny", "iq2_xxs", tmp_path / "tiny.gguf")
    with gguf.open(tmp_path / "tiny.gguf") as file:
        assert file.tensors["blk.1.ffn_up.weight"].type == "IQ2_XXS"


def test_the_seed_decides_the_bytes(tmp_path: Path):
    paths = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        make_model.write("tiny", "q8_0", path, seed)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_make_model_refuses(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(GgufkitError, match="exists"):
        make_model.write("tiny", "q8_0", path)
    with pytest.raises(UnsupportedError, match="did you mean"):
        make_model.write("tiny", "q4_k_x", path)
    with pytest.raises(UnsupportedError, match="known: tiny"):
        make_model.write("2t", "q4_0", path)
    assert path.read_bytes() == b"mine"


# -- the host and the peers ------------------------------------------------------------------------


def test_what_a_build_leaves_unused():
    assert host.lacks(WHEEL, CPUINFO) == ["AVX512", "AVX512_VNNI"]
    assert host.lacks(WHEEL + "AVX512 = 1 | AVX512_VNNI = 1 | ", CPUINFO) == []
    assert host.lacks(WHEEL, "") == []
    assert "OPENMP" in host.used(WHEEL) and "AVX512" not in host.used(WHEEL)
    assert host.describe(CPUINFO)["cpu"] == "A Processor"


def test_a_worker_that_dies_or_refuses_is_one_line():
    with wire.Remote("nobody", "peers.no_such_module") as worker, pytest.raises(wire.WorkerError) as caught:
        worker.ask("about")
    assert "nobody ended in about" in str(caught.value) and "\n" not in str(caught.value)
    with wire.Remote("limits", "peers.limits") as worker:
        with pytest.raises(wire.WorkerError, match="no attribute 'nonsense'"):
            worker.ask("nonsense")
        assert worker.ask("about")["cpu"]
        assert worker.cpu_seconds() > 0 or sys.platform != "linux"


def test_a_contender_that_fails_is_left_out_and_the_others_go_on():
    class Fake:
        closed = False

        def cpu_seconds(self) -> float:
            return 0.0

        def close(self) -> None:
            self.closed = True

    said, order = [], []

    def turn(name: str, worker: object) -> None:
        if name == "b" and len(order) == 3:
            raise wire.WorkerError("b died")
        order.append(name)

    workers = {name: Fake() for name in "abc"}
    measure.Rounds(3, said.append).run(workers, turn)  # pyright: ignore[reportArgumentType]
    assert order == ["a", "b", "c", "c", "a", "a", "c"]  # b begins the second round, and dies of it
    assert said == ["b is left out: b died"]


def test_encoded_weights_are_the_same_everywhere():
    x = data.weights()
    assert x.shape == (data.ROWS, data.COLS) and x.dtype == np.float32
    assert abs(x.mean()) < 1e-4 and x.std() == pytest.approx(0.02, rel=0.01)
    assert np.abs(np.corrcoef(x[0], x[1])[0, 1]) < 0.06


# -- limits ----------------------------------------------------------------------------------------


def test_limits_measure_something():
    found = limits.Limits()
    assert all(rate > 1e8 for rate in found.bandwidth(2, 1, 1 << 22).values())
    rates = found.peak(2, 0.02)
    assert set(rates) == set(found.about()["dots"])
    assert all(rate > 1e8 for rate in rates.values())


@pytest.mark.parametrize("words", [1 << 10, 32 * 1001])
def test_reading_reads_all(words: int):
    x = np.random.default_rng(0).integers(0, 1 << 60, words, dtype=np.uint64)
    raw = np.zeros(words + 8, np.uint64)
    aligned = raw[-raw.ctypes.data % limits.LINE // 8 :][:words]
    aligned[:] = x
    assert [limits.Reader(streams).run(aligned) for streams in (1, 4)] == [int(x.sum())] * 2


@pytest.mark.parametrize("name", [name for name in limits.DOTS if "dotprod" not in name])
def test_loops_hold_the_instruction_and_nothing_spills(name: str):
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = ",".join(f"+{need}" for need in limits.DOTS[name][0])
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(features=features, opt=2)
    module = llvm.parse_assembly(f'target triple = "x86_64-unknown-linux-gnu"\n{limits.loop(name)}')
    assembly = machine.emit_assembly(module)
    assert assembly.count(name.split()[1]) == limits.DOTS[name][2] * limits.REPEATS
    assert "(%rsp)" not in assembly


# -- the report ------------------------------------------------------------------------------------


def result() -> measure.Result:
    facts = measure.Facts(
        Path("x.gguf"), "Q4_K_M", 1000_000_000, 900_000_000, 1_000_000_000, 50_000_000, 1.0, 320, 1024
    )
    out = measure.Result(facts)
    for ours, theirs in ((100.0, 50.0), (120.0, 40.0), (110.0, 60.0)):
        out.add("pp512", "tokens/s", measure.OURS, ours)
        out.add("pp512", "tokens/s", "native", theirs)
    for name, ours, theirs in (("tg64", 20.0, 10.0), ("tg32 @ 4096", 10.0, 8.0)):
        out.add(name, "tokens/s", measure.OURS, ours)
        out.add(name, "tokens/s", "native", theirs)
    out.add("load", "s", measure.OURS, 0.5, True)
    out.bandwidth = {"one": [18e9, 19e9, 20e9], "four": [20e9, 20e9, 20e9]}
    out.peak = {"avx2 vpmaddubsw": [440e9]}
    return out


def test_ratios():
    found = report.compare(result().series["pp512"], "native")
    assert found == {"ratio": pytest.approx(2.2), "min": pytest.approx(110 / 60), "max": pytest.approx(3.0)}
    assert report.compare(result().series["load"], "native") is None


def test_growth_and_limits():
    assert report.growth(result()) == {"ggufkit": 2.0, "native": 1.25}
    found = report.limits(result())
    assert found["bandwidth"]["best"] == 20e9
    assert found["bandwidth"]["ggufkit"] == {"bytes_per_s": 18e9, "share": pytest.approx(0.9)}
    paired = result()
    paired.bandwidth = {"one": [18e9], "four": [24e9]}
    assert report.limits(paired)["bandwidth"]["ggufkit"]["paired"] == pytest.approx(0.75)
    done = 110 * 2 * (1_000_000_000 + 50_000_000 / 512)
    assert found["int8"]["ggufkit"]["share"] == pytest.approx(done / 440e9)


def test_table_and_document():
    text = report.model_text(result(), ["native", "absent"], 1024)
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["pp512"][2:] == ["110.0", "50.00", "2.20", "1.83–3.00"]
    assert rows["load"][3:] == ["0.500", "-", "-", "-"]
    assert "absent" not in text
    assert "ggufkit 18.0 GB/s = 0.90" in text
    document = json.loads(json.dumps(report.model_document(result(), 1024)))
    assert document["memory_allowed"] == pytest.approx(1.1e9 + 2 * 1024 * 1024 + 300e6)
    first = document["results"][0]
    assert (first["test"], first["contenders"]["native"]["values"]) == ("pp512", [50.0, 40.0, 60.0])
    assert report.idle_notes({"a": 0.2, "b": 0.01}) == [
        "note: a took 20% of a processor while others were measured: the figures suffer"
    ]


def test_encoding_says_where_bytes_differ():
    series = measure.Series("Q4_K", "million weights/s", values={"ggufkit": [80.0], "libgguf": [10.0]})
    text = report.encode_text([series], {"Q4_K": ["libgguf"]}, ["libgguf"])
    assert "8.00" in text and "note: Q4_K: other bytes than ours from libgguf" in text


def test_facts_of_a_file(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    make_model.write("tiny", "q4_0", path)
    facts = measure.Facts.of(path)
    assert (facts.type, facts.n_vocab, facts.quantized) == ("Q4_0", 512, 1.0)
    assert facts.bytes_per_token == facts.n_bytes  # the embedding is the output
    assert facts.output_weights == 512 * 256
    assert facts.n_kv == 2 * 3 * 2 * 64


@pytest.mark.slow
@needs_llama_cpp
def test_the_whole_benchmark_in_small(tmp_path: Path):
    path, target = tmp_path / "tiny.gguf", tmp_path / "out.json"
    make_model.write("tiny", "q4_0", path)
    command = [sys.executable, TOOLS / "bench_peers.py", "--models", path, "--quick", "--json", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tg4 @ 256" in done.stdout
    document = json.loads(target.read_text())
    assert {"ggufkit", "xllamacpp"} <= set(document["models"][0]["results"][0]["contenders"])
    assert document["models"][0]["notes"] == []
    assert len(document["encode"]) == len(measure.ENCODED)


def test_gpu_check_in_emulation(tmp_path):
    """The program itself, on the emulated device: what it measures there means nothing."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    done = subprocess.run(
        [sys.executable, TOOLS / "gpu_check.py", "--emulate", "--types", "q4_k_m,f16,q3_x", "--json",
         tmp_path / "r.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    parts = report["parts"]
    assert parts["smoke sample"]["passed"] and parts["compile"]["compile"]["wrong"] == []
    assert set(parts["speed tiny q4_k_m"]) == set(gpu_check.MAIN)
    assert set(parts["speed tiny f16"]) == {"decode", "prefill"}
    launches = sum(row["launches"] for row in parts["speed tiny q4_k_m"]["kernels"]["rows"] if row["context"] == 8)
    assert launches == parts["speed tiny q4_k_m"]["decode"]["launches"]
    assert len(report["left_out"]) == 3 and all("q3_x" in line for line in report["left_out"])  # and it goes on
    for type in ("q4_k_m", "f16"):
        row = parts[f"nearness {type}"]["nearness"]
        for way in ("", "_by_token"):
            assert row[f"kl_cuda{way}"] <= max(1.2 * row[f"kl_cpu{way}"], 1e-6)
    assert "decode 8b q4_k_m, share of the copy bandwidth: not measured" in done.stdout


# -- decode_share ------------------------------------------------------------------------------------


def test_share_of_reading_is_told_by_pace(tmp_path: Path):
    path, said = tmp_path / "tiny.gguf", tmp_path / "turns.json"
    make_model.write("tiny", "q4_0", path)
    command = [sys.executable, str(TOOLS / "decode_share.py"), str(path), "--seconds", "0.3", "--buffer", str(1 << 22)]
    run = subprocess.run([*command, "--json", str(said)], capture_output=True, text=True, check=True)
    turns = np.array(json.loads(said.read_text())["tiny.gguf"])
    assert turns.shape[1] == 3 and (turns > 0).all()
    whole = next(line for line in run.stdout.splitlines() if line.strip().startswith("all"))
    better = turns[:, int(np.argmax(np.median(turns[:, :2], axis=0)))]
    assert float(whole.split()[3]) == pytest.approx(np.median(turns[:, 2] / better), abs=0.006)


def test_share_of_reading_of_given_turns():
    turns = np.repeat([[10e9, 9e9, 9e9], [20e9, 19e9, 10e9], [40e9, 45e9, 36e9]], 2, axis=0)
    lines = [line.split() for line in decode_share.report("m", turns).splitlines()]
    assert [line[:4] for line in lines[3:]] == [
        ["slow", "10.0", "9.0", "0.90"], ["middle", "20.0", "10.0", "0.50"], ["fast", "40.0", "36.0", "0.90"],
    ]  # fmt: skip


# -- speed_plot --------------------------------------------------------------------------------------


def test_speeds_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")

    def result(test: str, ratio: float) -> dict:
        peer = {"median": 10.0, "values": [10.0], "ratio": ratio, "min": ratio - 0.125, "max": ratio + 0.25}
        return {"test": test, "contenders": {"ggufkit": {"median": 10.0, "values": [10.0]}, "native": peer}}

    versions = {"ggufkit": {"version": "0.1.0", "simd": "avx2"}, "native": {"version": "llama-cpp-python 0.3.36"}}
    models = [
        {"file": f"{size}-q4_0.gguf", "type": "Q4_0", "results": [result("pp512", 2.5), result("tg64", 1.25)]}
        for size in ("1b", "135m")
    ]
    document = {"machine": {"cpu": "Some CPU", "features": []}, "contenders": versions, "threads": 2, "pairs": 7}
    said = tmp_path / "a.json"
    said.write_text(json.dumps(document | {"models": models}))
    assert speed_plot.rows([json.loads(said.read_text())], "tg", "native") == [
        ("1b Q4_0", 1.25, 1.125, 1.5), ("135m Q4_0", 1.25, 1.125, 1.5),
    ]  # fmt: skip
    command = [sys.executable, str(TOOLS / "speed_plot.py")]
    for name in ("a.svg", "b.svg"):
        subprocess.run([*command, str(tmp_path / name), str(said)], check=True)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    absent = subprocess.run([*command, str(tmp_path / "c.svg"), str(said), "--peer", "xllamacpp"], capture_output=True)
    assert absent.returncode == 2 and b"beside xllamacpp" in absent.stderr and not (tmp_path / "c.svg").exists()


STEPS = """
import json, os, pathlib, sys, time
out, steps, done = pathlib.Path(sys.argv[2]), sys.argv[3:], {}
for step in steps:
    out.with_suffix(".x").write_text(json.dumps({"doing": step, "done": done}))
    out.with_suffix(".x").replace(out)
    if step == "crashes": os.abort()
    if step == "hangs" or (step == "decode" and os.environ.get("GGUFKIT_CUDA_EARLY") != "0"): time.sleep(60)
    done[step] = {"error": "this one"} if step == "fails" else {"steps": steps}
    out.with_suffix(".x").write_text(json.dumps({"doing": step, "done": done}))
    out.with_suffix(".x").replace(out)
    if step == "loses": sys.exit(3)
"""


def test_gpu_check_goes_on_behind_what_fails(tmp_path, capsys):
    (tmp_path / "steps.py").write_text(STEPS)
    options = argparse.Namespace(minutes=5, json=tmp_path / "r.json", emulate=False, only="")
    runner = gpu_check.Runner(options, tmp_path)
    runner.program, runner.start_s = tmp_path / "steps.py", 2
    names = ("first", "fails", "second", "crashes", "third", "hangs", "fourth", "loses", "last")
    runner.run([[gpu_check.Part("p", dict.fromkeys(names, 1))]])
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["parts"]["p"]) == ["first", "second", "third", "fourth", "loses", "last"]
    assert report["parts"]["p"]["third"]["steps"] == list(names[4:])  # in a new process
    assert report["parts"]["p"]["last"]["steps"] == ["last"]
    assert [line.partition(",")[2] for line in report["left_out"]] == [
        " fails: this one", " crashes: ended by SIGABRT: ", " hangs: it took too long",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("\n") == 9 and "[    0 s] p, first: " in said
    assert runner.running == []


def test_gpu_check_decodes_again_without_early_launches(tmp_path, monkeypatch):
    """Where decoding hangs, once, and so all that follows."""
    monkeypatch.delenv(gpu_check.EARLY, raising=False)
    (tmp_path / "steps.py").write_text(STEPS)
    options = argparse.Namespace(minutes=5, json=tmp_path / "r.json", emulate=False, only="")
    runner = gpu_check.Runner(options, tmp_path)
    runner.program, runner.start_s = tmp_path / "steps.py", 2
    runner.run([[gpu_check.Part(name, dict.fromkeys(("first", "decode", "last"), 1))] for name in ("p", "q")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert [list(report["parts"][name]) for name in "pq"] == [["first", "decode", "last"]] * 2
    assert report["left_out"] == [
        "p, decode: it took too long", "p and all behind it, kernels that begin early: decode failed",
    ]  # fmt: skip


def test_gpu_check_without_time_and_tests_that_fail(tmp_path, capsys):
    options = argparse.Namespace(minutes=0.5, json=None, emulate=False, only="")
    runner = gpu_check.Runner(options, tmp_path)
    text = (
        "FAILED a.py::b[x] - Failed: the device was lost in a.py::b[x] : the GPU failed\n1 failed, 7 passed, 2 skipped"
    )
    script = f"import sys; print(sys.argv[1:] and '9 passed' or {text!r}); sys.exit(not sys.argv[1:])"
    runner.run([[gpu_check.Part("tests", command=[sys.executable, "-c", script], seconds=20)]])
    assert runner.report["parts"]["tests"] == {
        "failed": 1, "passed": 9, "skipped": 2,
        "which": ["FAILED a.py::b[x] - Failed: the device was lost in a.py::b[x] : the GPU failed"],
    }  # fmt: skip
    runner.end = time.monotonic() + 3
    runner.run([[gpu_check.Part("one", {"x": 1}), gpu_check.Part("two", {"x": 1})]])
    assert runner.report["left_out"] == ["one: the time is over", "two: the time is over"]
    runner.report["goals"] = gpu_check.goals(runner.report, gpu_check.FULL)
    assert "not done: one: the time is over" in gpu_check.table(runner.report, gpu_check.FULL)


def test_gpu_check_that_is_stopped(tmp_path):
    """What there is by then is printed and written."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    command = [sys.executable, TOOLS / "gpu_check.py", "--emulate", "--types", "q4_k_m", "--json", tmp_path / "r.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        said += process.stdout.readlines()
    assert process.returncode == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert "facts" in report["parts"]["device"] and "goals" in report
    assert "not done: what came behind: stopped\n" in said and any("not measured" in line for line in said)
