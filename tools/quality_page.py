"""What tools/quality.py makes of its results: a line each, a Markdown table, a plot."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ggufkit_formats.errors import UsageError
from ggufkit_runtime.evaluate import Z95

from ggufkit import quality
from ggufkit.quantize.file_types import PLAIN

Result = Mapping[str, Any]
HEADER = ("type", "bits/weight", "MB", "perplexity", "KL divergence", "KL, with importance", "same top token",
          "error of weights", "fell back")  # fmt: skip


def line(result: Result) -> str:
    """A result as it stands on the terminal."""
    label = quality.of(result).label
    if "error" in result:
        return f"{label}: {result['error']}"
    return (f"{label}: {result['bits_per_weight']:.2f} bits/weight, perplexity {result['perplexity']:.2f}, "
            f"KL {divergence(result)}, same top token {100 * result['same_top']:.1f} %")  # fmt: skip


def divergence(result: Result | None) -> str:
    """Mean KL with half the width of its 95 % interval, as many digits as that leaves."""
    if result is None:
        return "-"
    mean, spread = result["kl_mean"], Z95 * result["kl_stderr"]
    if mean < 1e-4 or not spread > 0:
        return f"{mean:.2g} ± {spread:.1g}"
    places = max(0, -math.floor(math.log10(spread)))
    return f"{mean:.{places}f} ± {spread:.{places}f}"


def rows(document: Mapping[str, Any]) -> Iterable[tuple[str, Result | None, Result | None, str]]:
    """(label, result, the one with importance, why there is neither), a type each."""
    by_label: dict[str, dict[bool, Result]] = {}
    for result in document["results"]:
        variant = quality.of(result)
        label = variant.label if variant.ternary != "ggml" else variant.type
        by_label.setdefault(label, {})[variant.importance] = result
    for label, found in by_label.items():
        good = {key: result for key, result in found.items() if "error" not in result}
        why = next((result["error"] for result in found.values() if "error" in result), "")
        yield label, good.get(False), good.get(True), why


def table(document: Mapping[str, Any]) -> str:
    """Markdown: a row a type."""
    reference = document["reference"]
    lines = [f"| {' | '.join(HEADER)} |", "|---|" + "--:|" * (len(HEADER) - 2) + "---|"]
    bits = 8 * reference["n_bytes"] / reference["n_parameters"]
    lines.append(_row("F32, the reference", bits, reference["n_bytes"], reference, "0", "", "100 %", "0", ""))
    for label, plain, weighted, why in rows(document):
        result = plain or weighted
        if result is None:
            lines.append(f"| {label} |" + " - |" * (len(HEADER) - 2) + f" not made: {why} |")
            continue
        fallen = f"{100 * result['fallback']:.0f} % to {', '.join(result['instead'])}" if result["instead"] else ""
        top, off = f"{100 * result['same_top']:.1f} %", f"{100 * result['rel_rmse']:.2f} %"
        lines.append(_row(label, result["bits_per_weight"], result["n_bytes"], result, divergence(plain),
                          divergence(weighted), top, off, fallen))  # fmt: skip
    return "\n".join(lines)


def _row(label: str, bits: float, nbytes: int, result: Result, *rest: str) -> str:
    perplexity = f"{result['perplexity']:.2f}" if result["perplexity"] < 1e5 else f"{result['perplexity']:.1e}"
    return f"| {' | '.join((label, f'{bits:.2f}', f'{nbytes / 1e6:.1f}', perplexity, *rest))} |"


def insert(page: Path, name: str, text: str) -> None:
    """Put the table between the marks of that name."""
    old = page.read_text(encoding="utf-8")
    new = inserted(old, name, text)
    if new is None:
        raise UsageError(f"{page}: has no place <!-- quality: {name} --> … <!-- end -->")
    page.write_text(new, encoding="utf-8")


def inserted(page: str, name: str, text: str) -> str | None:
    """The page with the text between the marks of that name; None where there are none."""
    pattern = re.compile(rf"(<!-- quality: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page) if pattern.search(page) else None


# -- the plot --------------------------------------------------------------------------------------

FAMILIES = (  # prefix of the type's name, family, colour (Okabe and Ito's, which the colour-blind can tell apart)
    (("IQ",), "IQ types", "#0072B2"),
    (("TQ", "Q1_0", "Q2_0"), "one to three levels", "#CC79A7"),
    (("MXFP4", "NVFP4", "NF4"), "4-bit floats, NF4", "#009E73"),
    (tuple(f"Q{n}_K" for n in range(2, 7)), "K types", "#D55E00"),
    (("Q",), "one scale a block", "#E69F00"),
)
TICKS = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 16)  # bits a weight


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def caption(document: Mapping[str, Any]) -> str:
    """What was compared, on what; a rescaled reference is said to be one."""
    n = document["reference"]["n_tokens"]
    text = f"{n} tokens of {document['text']['name']} in windows of {document['ctx_size']}; bars: 95 % intervals."
    floats = [f"{label} {plain['kl_mean']:.1g}" for label, plain, *_ in rows(document) if plain and label in PLAIN]
    if floats:
        text += f" Not drawn: {', '.join(floats)}."
    seed = document["rescale_seed"]
    if seed is None:
        return f"Reference: the model as F32. {text}"
    return (
        "The model was quantized already, which would flatter the type that it had: the reference is the dequantized "
        f"model after a random rescaling that\npreserves its function (factors in [0.8, 1.25] moved between tensors, "
        f"seed {seed}). {text}"
    )


def points(document: Mapping[str, Any]) -> list[tuple[str, Result, bool]]:
    """(label, result, whether it has importance); of a type that has both, the label stands at the lower one.

    F16 and BF16, at 16 bits and next to nothing, would only push the others together, and stand in the caption.
    """
    found = []
    for label, plain, weighted, _ in rows(document):
        if label in PLAIN:
            continue
        both = [(r, kind) for r, kind in ((plain, False), (weighted, True)) if r is not None]
        lowest = min((result["kl_mean"] for result, _ in both), default=0)
        found += [(label if result["kl_mean"] == lowest else "", result, kind) for result, kind in both]
    return found


def plot(document: Mapping[str, Any], path: Path, title: str) -> list[tuple[float, ...]]:
    """KL divergence against bits a weight, both logarithmic; PNG or SVG, by the name's end.

    Returns where the labels stand: (left, bottom, right, top), in pixels.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ggufkit"  # equal results, equal file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 8), layout="constrained")
    drawn = points(document)
    for _, result, weighted in drawn:
        colour = family(result["type"])[1]
        x, y, spread = result["bits_per_weight"], result["kl_mean"], Z95 * result["kl_stderr"]
        axes.errorbar(x, y, yerr=min(spread, 0.9 * y), fmt="^" if weighted else "o", ms=6, color=colour, elinewidth=1,
                      mfc="white" if result["instead"] else colour, zorder=3)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="bits per weight (whole file)",
             ylabel="mean KL divergence from the reference, nats per token")  # fmt: skip
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    bits = [result["bits_per_weight"] for _, result, _ in drawn]
    axes.set_xlim(0.88 * min(bits), 1.14 * max(bits))
    axes.grid(alpha=0.3)
    axes.set_title(f"{title}: what each file type costs", loc="left", fontsize=14)
    _legend(axes, drawn)
    figure.supxlabel(caption(document), fontsize=8, x=0.01, ha="left")
    figure.canvas.draw()
    boxes = _label(
        figure, axes, [(label, r["bits_per_weight"], r["kl_mean"], family(r["type"])[1]) for label, r, _ in drawn]
    )
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return boxes


def family(type_name: str) -> tuple[str, str]:
    """Name and colour."""
    return next((name, colour) for prefixes, name, colour in FAMILIES if type_name.startswith(prefixes))


def _legend(axes: Any, drawn: list[tuple[str, Result, bool]]) -> None:
    from matplotlib.lines import Line2D

    kinds = dict.fromkeys(family(result["type"]) for _, result, _ in drawn)
    handles = [Line2D([], [], marker="s", ls="", color=colour, label=name) for name, colour in kinds]
    if any(weighted for *_, weighted in drawn):
        handles.append(Line2D([], [], marker="o", ls="", color="grey", label="without importance"))
        handles.append(Line2D([], [], marker="^", ls="", color="grey", label="with an importance matrix"))
    if any(result["instead"] for _, result, _ in drawn):
        hollow = Line2D([], [], marker="o", ls="", color="grey", mfc="white", label="hollow: some rows do not fit the "
                        "type's blocks,\nand have another type")  # fmt: skip
        handles.append(hollow)
    axes.legend(handles=handles, fontsize=9, loc="upper right")


def _label(figure: Any, axes: Any, named: list[tuple[str, float, float, str]]) -> list[tuple[float, ...]]:
    """Names beside their points: each where it covers the fewest points and names, with a line where that is far."""
    at = axes.transData.transform([(x, y) for _, x, y, _ in named])
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    frame, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    taken.append((legend.x0, legend.y0, legend.x1, legend.y1))
    scale, found = figure.dpi / 72, []
    for (text, x, y, colour), (px, py) in sorted(zip(named, at.tolist(), strict=True), key=lambda each: each[1][1]):
        if not text:
            continue
        width, height = 5.2 * scale * len(text), 10 * scale
        places = [(r * dx, r * dy) for r in (8, 14, 22, 34, 48, 66) for dx, dy in
                  ((1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1))]  # fmt: skip
        boxes = []
        for dx, dy in places:
            left = px + dx * scale - (0 if dx > 0 else width if dx < 0 else width / 2)
            low = py + dy * scale - height / 2
            boxes.append((left, low, left + width, low + height))
        outside = [b[0] < frame.x0 or b[1] < frame.y0 or b[2] > frame.x1 or b[3] > frame.y1 for b in boxes]
        costs = [1e4 * out + sum(overlap(box, other) for other in taken) + 0.02 * i
                 for i, (box, out) in enumerate(zip(boxes, outside, strict=True))]  # fmt: skip
        best = costs.index(min(costs))
        taken.append(boxes[best])
        found.append(boxes[best])
        dx, dy = places[best]
        far = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=8, color=colour, va="center",
                      ha="left" if dx > 0 else "right" if dx < 0 else "center",
                      arrowprops=far if best >= 16 else None)  # fmt: skip
    return found


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
