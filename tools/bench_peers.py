"""ggufkit and llama.cpp in turn, on the same files with the same number of threads: ratios of medians.

    python tools/make_model.py 1b q4_k_m 1b-q4_k_m.gguf
    python tools/bench_peers.py --models 1b-q4_k_m.gguf --json 1b-q4_k_m.json
    python tools/bench_peers.py --models *.gguf --what prefill,decode,limits -t 2 --pairs 7
    python tools/bench_peers.py --what encode

Peers: llama.cpp built on this machine (the package llama-cpp-python; --native-python names the Python that has it, if
it is another one), and the wheel xllamacpp, which is built for any x86 processor. Both are used through llama.cpp's C
API. Every contender is a process of its own that stays open; in each round all take their turn, each round begins with
another one, and nobody computes while it is another one's turn (that is checked). A peer that is absent is left out
with one line. Extra: pip install 'ggufkit[bench]'. How to read the results: docs/benchmarks.md.

prefill     a prompt of 512 tokens in one batch, logits of the last
decode      64 given tokens one by one from an empty context, logits of each; no sampling
decode4096  32 tokens after 4,096
load        weights and context in a fresh process, the file in the page cache, kernels cached; and once more there
memory      largest resident memory of a fresh process after a prompt and 64 tokens, context of 1,024
encode      weights a second of one thread, each type, ours against ggml_quantize_chunk (and libgguf)
limits      in the same rounds: read bandwidth (the better of one and four streams a thread) and int8 multiply-adds
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ggufkit_kernels.cpu.team import default_threads
from peers import host, report
from peers.measure import OURS, QUICK, WHAT, Bench, Contender, Rounds, Sizes, contenders, encode


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--what", default=",".join(WHAT), help="comma-separated; default: everything")
    parser.add_argument("--pairs", type=int, metavar="N", help="rounds (5)")
    parser.add_argument("-t", "--threads", type=int, default=default_threads(), metavar="N")
    parser.add_argument("--native-python", metavar="PATH", help="a Python that has llama-cpp-python")
    parser.add_argument(
        "--flash", choices=["auto", "on", "off"], default="auto", help="llama.cpp's flash attention (auto)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there, too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    args = parser.parse_args()
    args.what = args.what.split(",")
    if unknown := [name for name in args.what if name not in WHAT]:
        parser.error(f"--what: {', '.join(unknown)} (known: {', '.join(WHAT)})")
    if not args.models and args.what != ["encode"]:
        args.what = [name for name in args.what if name == "encode"]
        say("no --models: only encode is measured")
    if missing := [str(path) for path in args.models if not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    return args


def header(args: argparse.Namespace, found: list[tuple[Contender, dict[str, Any]]]) -> dict[str, Any]:
    """Machine and contenders: printed, and the beginning of the document."""
    cpuinfo = host.read_cpuinfo()
    machine = host.describe(cpuinfo)
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    commit = host.revision(Path(__file__).resolve().parent)
    print(f"{when}, {machine['cpu']}, {machine['cpus']} processors ({' '.join(machine['features'])}), "
          f"{args.threads} threads, load {machine['load']}")  # fmt: skip
    about = {}
    for contender, facts in found:
        about[contender.name] = facts
        if contender.name == OURS:
            facts["commit"] = commit
            print(f"{OURS} {facts['version']} {commit}, kernels {facts['simd']}, Numba {facts['numba']}")
            continue
        print(f"{contender.name}: {facts['version']}" + (f", {facts['system_info']}" if "system_info" in facts else ""))
        if "system_info" in facts:
            facts["lacks"] = host.lacks(facts["system_info"], cpuinfo)
            if facts["lacks"]:
                print(f"  it does not use what this processor has: {', '.join(facts['lacks'])}")
            if "OPENMP" not in host.used(facts["system_info"]):
                print("  it is built without OpenMP: it starts its threads anew for every batch")
    sys.stdout.flush()
    return {"date": when, "machine": machine, "threads": args.threads, "flash": args.flash, "contenders": about}


def main() -> int:
    args = parse()
    sizes: Sizes = QUICK if args.quick else Sizes()
    sizes = replace(sizes, pairs=args.pairs or sizes.pairs)
    found = contenders(args.native_python, say)
    names = [contender.name for contender, _ in found]
    if OURS not in names:
        return 1
    document = header(args, found) | {"pairs": sizes.pairs, "quick": args.quick, "models": [], "encode": []}
    runners = [contender for contender, _ in found if contender.module != "peers.libgguf_encode"]
    peers = [name for name in names if name != OURS]
    complete = True
    bench = Bench(runners, args.what, args.threads, sizes, args.flash, say)
    for path in args.models:
        result = bench.model(path.resolve())
        print("\n" + report.model_text(result, peers, sizes.n_ctx), flush=True)
        document["models"].append(report.model_document(result, sizes.n_ctx))
        complete &= all(OURS in series.values for series in result.series.values())
        save(args.json, document)
    if "encode" in args.what:
        rounds = Rounds(sizes.pairs, say)
        series, differ = encode([contender for contender, _ in found], sizes, rounds)
        print("\n" + report.encode_text(series, differ, peers))
        document["encode"] = [report.series_document(each) | {"differ": differ[each.name]} for each in series]
    document["idle"] = bench.rounds.idle.shares()
    for line in report.idle_notes(document["idle"]):
        print(line)
    save(args.json, document)
    return 0 if complete else 1


def save(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
