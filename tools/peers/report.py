"""What was measured, as a table for people and as a document for programs. No measuring here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ggufkit.cli import screen

from .measure import OURS, Facts, Result, Series


def compare(series: Series, peer: str) -> dict[str, float] | None:
    """Ours over a peer's: ratio of medians, smallest and largest ratio of a pair. None where one is missing."""
    ours, theirs = series.values.get(OURS), series.values.get(peer)
    if not ours or not theirs:
        return None
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    return {"ratio": statistics.median(ours) / statistics.median(theirs), "min": min(pairs), "max": max(pairs)}


def medians(series: Series) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in series.values.items()}


def series_document(series: Series) -> dict[str, Any]:
    found = medians(series)
    return {
        "test": series.name,
        "unit": series.unit,
        "less_is_better": series.less_is_better,
        "contenders": {
            name: {"median": found[name], "values": values, **(compare(series, name) or {} if name != OURS else {})}
            for name, values in series.values.items()
        },
    }


def limits(result: Result) -> dict[str, Any]:
    """Shares of what the machine can do: bytes of weights while decoding, operations while reading a prompt."""
    facts, found = result.facts, dict[str, Any]()
    if result.bandwidth:
        best = {streams: statistics.median(rates) for streams, rates in result.bandwidth.items()}
        found["bandwidth"] = {"streams": best, "best": max(best.values())}
        series = next((s for name, s in result.series.items() if name.startswith("tg") and "@" not in name), None)
        rounds = [max(rates) for rates in zip(*result.bandwidth.values(), strict=True)]
        for name, rate in medians(series).items() if series else ():
            moved = rate * facts.bytes_per_token
            entry = found["bandwidth"][name] = {"bytes_per_s": moved, "share": moved / max(best.values())}
            values = series.values[name] if series else []
            if len(values) == len(rounds):  # memory is not as fast in one round as in the next
                pairs = zip(values, rounds, strict=True)
                entry["paired"] = statistics.median(value * facts.bytes_per_token / limit for value, limit in pairs)
    if result.peak:
        best = {name: statistics.median(rates) for name, rates in result.peak.items()}
        found["int8"] = {"instructions": best, "best": max(best.values())}
        series = next((s for name, s in result.series.items() if name.startswith("pp")), None)
        for name, rate in medians(series).items() if series and facts.quantized > 0.9 else ():
            done = rate * operations_per_token(facts, int(series.name[2:]) if series else 1)
            found["int8"][name] = {"operations_per_s": done, "share": done / max(best.values())}
    return found


def operations_per_token(facts: Facts, n_tokens: int) -> float:
    """Operations of the matmuls in reading n_tokens, for each: the output matrix meets the last token only."""
    return 2 * (facts.layer_weights + facts.output_weights / n_tokens)


def growth(result: Result) -> dict[str, float]:
    """Time of a token after a long context over that of one after none, of each contender."""
    plain = next((s for name, s in result.series.items() if name.startswith("tg") and "@" not in name), None)
    deep = next((s for name, s in result.series.items() if "@" in name), None)
    if plain is None or deep is None:
        return {}
    now, then = medians(plain), medians(deep)
    return {name: now[name] / then[name] for name in now if name in then}


def model_document(result: Result, n_ctx: int) -> dict[str, Any]:
    facts = result.facts
    return {
        "file": facts.path.name,
        "type": facts.type,
        "n_bytes": facts.n_bytes,
        "bytes_per_token": facts.bytes_per_token,
        "layer_weights": facts.layer_weights,
        "output_weights": facts.output_weights,
        "memory_allowed": memory_allowed(facts, n_ctx),
        "results": [series_document(series) for series in result.series.values()],
        "growth": growth(result),
        "limits": limits(result),
        "notes": result.notes,
    }


def memory_allowed(facts: Facts, n_ctx: int) -> float:
    """What ggufkit may take: 1.1 times the weights, a float16 cache of n_ctx positions, 300 MB."""
    return 1.1 * facts.n_bytes + 2 * facts.n_kv * n_ctx + 300e6


# -- for people ------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three to four figures."""
    places = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:.{places}f}"


def table(series: Sequence[Series], peers: Sequence[str]) -> str:
    """One row a quantity; for each peer its median, ours over it, and the range of that ratio over the pairs."""
    present = [peer for peer in peers if any(peer in s.values for s in series)]
    rows = []
    for each in series:
        found = medians(each)
        row = [
            each.name,
            each.unit + (" ↓" if each.less_is_better else ""),
            number(found[OURS]) if OURS in found else "-",
        ]
        for peer in present:
            ratio = compare(each, peer)
            row.append(number(found[peer]) if peer in found else "-")
            row += [f"{ratio['ratio']:.2f}", f"{ratio['min']:.2f}–{ratio['max']:.2f}"] if ratio else ["-", "-"]
        rows.append(row)
    header = ["test", "unit", OURS, *(h for peer in present for h in (peer, "ratio", "pairs"))]
    return screen.table(rows, header, right=range(2, len(header)))


def model_text(result: Result, peers: Sequence[str], n_ctx: int) -> str:
    """The table of a model and the lines below it."""
    facts = result.facts
    lines = [f"{facts.path.name}: {facts.type}, {screen.size(facts.n_bytes)} of weights", ""]
    lines.append(table(list(result.series.values()), peers))
    if any(s.less_is_better for s in result.series.values()):
        lines.append("↓ less is better; ratios are ours over theirs everywhere")
    if "peak memory" in result.series:
        lines.append(f"peak memory allowed: {memory_allowed(facts, n_ctx) / 1e6:.0f} MB "
                     "(1.1 × weights + cache + 300 MB)")  # fmt: skip
    if grown := growth(result):
        lines.append("time a token after the long context over that after none: "
                     + ", ".join(f"{name} {value:.2f}" for name, value in grown.items()))  # fmt: skip
    lines += limits_text(limits(result))
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)


def limits_text(found: dict[str, Any]) -> list[str]:
    lines = []
    for key, title, what, unit in (
        ("bandwidth", "reading: streams a thread", "weights decoded, of it:", "GB/s"),
        ("int8", "int8 multiply-adds:", "prefill, of it:", "GOP/s"),
    ):
        part = found.get(key)
        if not part:
            continue
        measured = part["streams"] if key == "bandwidth" else part["instructions"]
        lines.append(f"{title} " + ", ".join(f"{name} {rate / 1e9:.1f} {unit}" for name, rate in measured.items()))
        shares = {name: value for name, value in part.items() if isinstance(value, dict) and "share" in value}
        if shares:
            rates = {name: next(iter(value.values())) / 1e9 for name, value in shares.items()}
            told = [
                f"{name} {rates[name]:.1f} {unit} = {value['share']:.2f}"
                + (f" (round by round {value['paired']:.2f})" if "paired" in value else "")
                for name, value in shares.items()
            ]
            lines.append(f"  {what} {', '.join(told)}")
    return lines


def encode_text(series: Sequence[Series], differ: dict[str, list[str]], peers: Sequence[str]) -> str:
    lines = ["encode, one thread", "", table(series, peers)]
    for type_name, names in differ.items():
        if names:
            lines.append(f"note: {type_name}: other bytes than ours from {', '.join(names)}")
    return "\n".join(lines)


def idle_notes(shares: dict[str, float]) -> list[str]:
    """A line for every worker that computed while it was another one's turn."""
    return [
        f"note: {name} took {share:.0%} of a processor while others were measured: the figures suffer"
        for name, share in shares.items()
        if share > 0.05
    ]
