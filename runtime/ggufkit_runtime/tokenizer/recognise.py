r"""What the parts of a `tokenizer.json` mean: the pre-tokenizer's name, the blank before a text, BOS and EOS.

A pre-tokenizer is recognised by its structure: the list of its steps, with their regular expressions, is looked up
in a table of the structures that llama.cpp's names stand for. (llama.cpp's converter hashes the ids of a test
string instead, which knows single checkpoints.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ggufkit_formats.errors import FormatError, UnsupportedError

from . import pretokenizers

Step = tuple[str, ...]

ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN35 = ANY_CASE + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%(tail)s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%(tail)s"
    r"|\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
)

BYTES: Step = ("bytes",)
STRUCTURES: dict[tuple[Step, ...], str] = {
    (("split", GPT2), BYTES): "gpt-2",
    (("digits", "1"), ("split", GPT2), BYTES): "smollm",
    (("split", LLAMA3), BYTES): "llama-bpe",
    (("split", QWEN2), BYTES): "qwen2",
    (("split", QWEN35), BYTES): "qwen35",
    (("split", CASED % {"tail": "", "digits": ""}), BYTES): "tekken",
    (("split", CASED % {"tail": ANY_CASE + "?", "digits": "{1,3}"}), BYTES): "gpt-4o",
    (
        ("split", r"\p{N}{1,3}"),
        ("split", "[一-龥\u3040-ゟ゠-ヿ]+"),
        ("split", DEEPSEEK3),
        BYTES,
    ): "deepseek-v3",
    (
        ("split", r"[\r\n]"),
        ("split", r"\s?\p{L}+"),
        ("split", r"\s?\p{P}+"),
        ("split", "[一-龥ࠀ-一가-\ud7ff]+"),
        ("digits", "1"),
        BYTES,
    ): "deepseek-coder",
    (("split", ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES), BYTES): "seed-coder",
}
CLASSES = {"Qwen2Tokenizer": "qwen2", "Qwen2TokenizerFast": "qwen2", "GPT2Tokenizer": "gpt-2"}


def by_class(name: Any) -> str:
    """The pre-tokenizer of a tokenizer class that comes as vocab.json and merges.txt."""
    if not isinstance(name, str) or name not in CLASSES:
        raise UnsupportedError(
            f"the pre-tokenizer of {name or 'a vocab.json without tokenizer_config.json'} is not known: "
            "--pre-tokenizer NAME chooses one"
        )
    return CLASSES[name]


def pre_tokenizer(tokenizer: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name of the pre-tokenizer in a byte-level tokenizer.json. UnsupportedError where it has none."""
    normalizers = [n.get("type") for n in flatten(tokenizer.get("normalizer"), "normalizers")]
    if any(kind != "NFC" for kind in normalizers):  # NFC is left out by llama.cpp, too
        raise UnsupportedError(f"{source}: normalizer {', '.join(map(str, normalizers))} is not supported")
    model = tokenizer.get("model") or {}
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(f"{source}: a BPE with {key} {model[key]!r} is not supported")
    steps = tuple(s for part in flatten(tokenizer.get("pre_tokenizer"), "pretokenizers") for s in step(part, source))
    name = STRUCTURES.get(steps) or by_patterns().get(steps)
    if name is None:
        raise UnsupportedError(f"{source}: unknown pre-tokenizer {describe(steps)}{nearest(steps)}")
    if name == "llama-bpe" and not model.get("ignore_merges"):
        return "smaug-bpe"  # the same cuts, without the rule that words which are tokens are not merged
    return name


@cache
def by_patterns() -> dict[tuple[Step, ...], str]:
    """The structures that `written` makes of pre-tokenizers that no checkpoint in STRUCTURES has."""
    return {patterns(pre): name for name, pre in reversed(pretokenizers.TABLE.items())}


def patterns(pre: pretokenizers.PreTokenizer) -> tuple[Step, ...]:
    return (*(("split", canonical(pattern)) for pattern in pre.patterns), BYTES)


def written(pre: pretokenizers.PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json: that of the checkpoints it comes from, where they are known.

    These may cut characters that are newer than llama.cpp's tables, or cased letters outside ASCII, as the model was
    trained and not as llama.cpp does (docs/tokenizers.md has the list).
    """
    same = [name for name in STRUCTURES.values() if pretokenizers.TABLE[name].patterns == pre.patterns]
    steps = next((steps for steps, name in STRUCTURES.items() if name in same), None) or patterns(pre)
    joined = len(steps) > 1 and steps[-2:] == (("split", GPT2), BYTES)  # ByteLevel has this expression inside
    parts = [as_json(step) for step in (steps[:-2] if joined else steps[:-1])]
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": joined})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def as_json(step: Step) -> dict[str, Any]:
    kind, value = step
    if kind == "digits":
        return {"type": "Digits", "individual_digits": value == "1"}
    return {"type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}


def flatten(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, sequences opened."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(key)
    return [step for item in inner for step in flatten(item, key)] if isinstance(inner, list) else []


def step(part: Mapping[str, Any], source: str) -> list[Step]:
    """One step of a pre-tokenizer in a form that compares: what cuts, and the change to the byte alphabet."""
    kind = part.get("type")
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            raise UnsupportedError(f"{source}: a byte-level pre-tokenizer with add_prefix_space is not supported")
        return [("split", GPT2), BYTES] if part.get("use_regex", True) else [BYTES]
    if kind == "Digits":
        return [("digits", "1" if part.get("individual_digits") else "+")]
    if kind == "Split":
        pattern = part.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        whole = (part.get("behavior"), bool(part.get("invert")))
        if isinstance(regex, str) and whole in (("Isolated", False), ("Removed", True)):
            return [("split", canonical(regex))]
    return [(str(kind), str({k: v for k, v in part.items() if k != "type"}))]


def canonical(regex: str) -> str:
    """A regular expression in the spelling of the table."""
    spelled_out = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    literal = regex.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    return literal.replace(spelled_out, ANY_CASE).replace(r"\p{N}{1}", r"\p{N}")


def describe(steps: tuple[Step, ...]) -> str:
    text = " + ".join(" ".join(s) for s in steps) or "(none)"
    return text if len(text) < 200 else text[:200] + "…"


def nearest(steps: tuple[Step, ...]) -> str:
    import difflib

    text = describe(steps)
    spelled = {describe(known): name for known, name in STRUCTURES.items()}
    close = [spelled[t] for t in difflib.get_close_matches(text, spelled, n=3, cutoff=0.3)]
    known = f"nearest known: {', '.join(close)}" if close else f"known: {', '.join(STRUCTURES.values())}"
    more = len(pretokenizers.TABLE)
    return f" ({known}; --pre-tokenizer NAME chooses one of {more})"


def space_prefix(tokenizer: Mapping[str, Any], source: str) -> bool:
    """Whether a tokenizer.json with byte fallback puts a blank before the text; UnsupportedError for other changes."""
    prefix = False
    for part in flatten(tokenizer.get("normalizer"), "normalizers"):
        kind = part.get("type")
        if kind == "Prepend" and part.get("prepend") == "▁":
            prefix = True
        elif not (kind == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == "▁"):
            raise UnsupportedError(f"{source}: normalizer {kind} is not supported")
    for part in flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = part.get("type")
        if kind == "Metaspace" and part.get("replacement") == "▁" and not part.get("split", False):
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            prefix = prefix or scheme != "never"
        elif not (kind == "Split" and part.get("pattern") == {"String": " "}):
            raise UnsupportedError(f"{source}: pre-tokenizer {kind} is not supported with byte fallback")
    return prefix


def post_processor(part: Any, config: dict[str, Any], adds: dict[str, bool], types: list[str]) -> None:
    """BOS, EOS and SEP as the post-processor adds them.

    Fills `adds`, may add "eot" or "eom" to `types`, and corrects the special tokens in `config` (a copy of
    tokenizer_config.json, empty where there is none) where the template uses others: llama.cpp's rules.
    """
    had_config = bool(config)
    for name, stand_in in (("bos", "cls"), ("eos", "sep")):
        if had_config and not config.get(f"{name}_token") and config.get(f"{stand_in}_token"):
            config[f"{name}_token"] = config[f"{stand_in}_token"]
    for processor in flatten(part, "processors"):
        kind = processor.get("type")
        if kind == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            adds |= {"bos": True, "eos": True, "sep": True}
        elif kind == "TemplateProcessing":
            single = processor.get("single")
            if isinstance(single, list) and len(single) > 1:
                template(single, config, had_config, adds, types)
            pair_separator(processor, config, adds)


def special_at(entry: Any) -> str | None:
    found = entry.get("SpecialToken") if isinstance(entry, dict) else None
    name = found.get("id") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def template(
    single: list[Any], config: dict[str, Any], had_config: bool, adds: dict[str, bool], types: list[str]
) -> None:
    """The tokens around a single text in TemplateProcessing."""
    first, last = special_at(single[0]), special_at(single[-1])
    if first:
        known = [text(config.get("bos_token")), text(config.get("cls_token"))]
        if first not in known:
            for name in ("bos_token", "cls_token"):
                if not config.get(name):
                    config[name] = first
        known = [text(config.get("bos_token")), text(config.get("cls_token"))]
        adds["bos"] = first in known
    if last:
        if had_config and last != text(config.get("eos_token")):
            name = next((n for n in ("eot", "eom") if n not in types), None)
            if name:
                types.append(name)
                config[f"{name}_token"] = config.get("eos_token")
        config["eos_token"] = last
        adds["eos"] = True
    if not had_config:
        config.clear()


def text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def pair_separator(processor: Mapping[str, Any], config: Mapping[str, Any], adds: dict[str, bool]) -> None:
    """Whether a separator stands between two texts in TemplateProcessing."""
    single, pair = processor.get("single"), processor.get("pair")
    if not isinstance(single, list) or not isinstance(pair, list) or not pair:
        return
    first = special_at(single[0]) if len(single) > 1 else None
    last = special_at(single[-1]) if len(single) > 1 else None
    start = 1 if first and special_at(pair[0]) == first else 0
    stop = len(pair) - 1 if last and special_at(pair[-1]) == last else len(pair)
    inner = pair[start:stop]
    if len(inner) < 3 or sequence_at(inner[0]) != "A" or sequence_at(inner[-1]) != "B":
        return
    ends = (text(config.get("sep_token")), text(config.get("eos_token")))
    middle = inner[1:-1]
    found = special_at(middle[0])
    adds["sep"] = bool(found in ends and found and not last)
    if len(middle) == 2 and special_at(middle[1]) in ends and special_at(middle[1]):
        adds["sep"] = True


def sequence_at(entry: Any) -> str | None:
    found = entry.get("Sequence") if isinstance(entry, dict) else None
    if found is not None and not isinstance(found, dict):
        raise FormatError("tokenizer.json: TemplateProcessing with a Sequence that is no object")
    return found.get("id") if found else None
