"""Draw what bench_peers.py measured: how many times as fast as a peer, for each model and test.

    python tools/bench_peers.py --models 1b-*.gguf --what prefill,decode --json 1b.json
    python tools/speed_plot.py docs/benchmarks/zen4.svg 1b.json 135m.json [--peer native]

A dot is the ratio of medians, a line reaches from the smallest ratio of a pair to the largest. Needs matplotlib
(pip install 'ggufkit[plot]').
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TITLES = {"tg": "decoding, one token after another", "pp": "reading a prompt"}
Row = tuple[str, float, float, float]  # model, ratio of medians, smallest and largest ratio of a pair


def rows(documents: Iterable[Mapping[str, Any]], test: str, peer: str) -> list[Row]:
    """The results of a test (its name begins so, and says no context), in the order of the documents."""
    found = []
    for document in documents:
        for model in document["models"]:
            for result in model["results"]:
                theirs = result["contenders"].get(peer, {})
                if result["test"].startswith(test) and "@" not in result["test"] and "ratio" in theirs:
                    name = f"{model['file'].partition('-')[0]} {model['type']}"
                    found.append((name, theirs["ratio"], theirs["min"], theirs["max"]))
    return found


def about(document: Mapping[str, Any], peer: str) -> str:
    """The machine and the versions."""
    machine, versions = document["machine"], document["contenders"]
    vector = "AVX-512 VNNI" if "AVX512_VNNI" in machine["features"] else versions["ggufkit"]["simd"]
    built = "built on it" if peer == "native" else "its wheel"
    return (
        f"{machine['cpu']} ({vector}), {document['threads']} threads; {versions[peer]['version']}, {built}; ggufkit "
        f"{versions['ggufkit']['version']}. Dots: ratios of medians of {document['pairs']} pairs; lines: all pairs."
    )


def plot(documents: list[Mapping[str, Any]], peer: str, path: Path) -> None:
    """A panel for each test that was made; PNG or SVG, by the name's end."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ggufkit"  # equal results, equal file
    from matplotlib import pyplot

    panels = {title: found for test, title in TITLES.items() if (found := rows(documents, test, peer))}
    height = 1.4 + 0.3 * max(map(len, panels.values()))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(11, height), layout="constrained", squeeze=False)
    for axes, (title, found) in zip(grid[0], panels.items(), strict=True):
        for y, (_, ratio, low, high) in enumerate(found):
            axes.plot([low, high], [y, y], color="#9ecae1", lw=4, solid_capstyle="round", zorder=2)
            axes.plot(ratio, y, "o", color="#08519c", ms=8, zorder=3)
            axes.annotate(f"{ratio:.2f}", (max(high, ratio), y), (8, 0), textcoords="offset points", va="center")
        axes.axvline(1, color="#444", lw=1, zorder=1)
        axes.set_yticks(range(len(found)), [name for name, *_ in found])
        axes.set(xlim=(min(0.8, *(row[2] for row in found)), 1.12 * max(row[3] for row in found)))
        axes.set(ylim=(len(found) - 0.4, -0.6), xlabel="times the speed of llama.cpp")
        axes.set_title(title, loc="left")
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel(about(documents[0], peer), fontsize=8, x=0.01, ha="left")
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FILE.svg")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--peer", default="native", help="native (built on the machine) or xllamacpp (the wheel)")
    args = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in args.results]
    if not any(rows(documents, test, args.peer) for test in TITLES):
        parser.error(f"no prefill or decode beside {args.peer} in these files")
    plot(documents, args.peer, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
