r"""How byte-level BPE cuts text into words before merging: one table of names, as in `tokenizer.ggml.pre`.

Patterns are applied one after the other; each cuts the pieces that the one before left into matches and what lies
between. Names, groups and settings are llama.cpp's (its `llama-vocab.cpp`), since the name in a GGUF file means
what llama.cpp does. Where its pattern differs from the checkpoint's own `tokenizer.json` (tekken's and gpt-4o's
upper and lower case know ASCII only), llama.cpp's is taken. Class names are those of `unicode15.expand`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ggufkit_formats.errors import UnsupportedError
from ggufkit_formats.gguf_strings import quote


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A pre-tokenizer and the vocabulary settings that its name implies."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise
    clean_spaces: bool = True  # detokenizing drops the blank in " ." " 's" and their like
    no_bos: bool = False  # no token is the BOS by default


CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Letters by case as llama.cpp's regular expressions see them: letters outside ASCII are both.
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{L-az}]*[\p{L-AZ}]+%(tail)s|[^\r\n\p{L}\p{N}]?[\p{L-az}]+[\p{L-AZ}]*%(tail)s"
    r"|\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
LLAMA3 = CONTRACTION + "|" + WORDS % "{1,3}"
QWEN2 = CONTRACTION + "|" + WORDS % ""
QWEN35 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
TEKKEN = CASED % {"tail": "", "digits": ""}
GPT4O = CASED % {"tail": CONTRACTION + "?", "digits": "{1,3}"}
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
)
CJK_WORDS = "[一-龥\u3040-ゟ゠-ヿ]+"
# [一-龥ࠀ-一가-퟿] without the blanks among them, which llama.cpp does not see there.
DEEPSEEK_WIDE = (
    "[一-龥\u0800-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff\u3001-一가-\ud7ff]+"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
JAIS2_SPACES = "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"\s{1,2}(?!\S)|\s"
JAIS2 = CONTRACTION + "|" + (WORDS % "{1,3}").replace(r"\s+(?!\S)|\s+", JAIS2_SPACES)

llama3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
gpt2 = PreTokenizer((GPT2,))
gpt2_raw = PreTokenizer((GPT2,), clean_spaces=False)
digits = PreTokenizer((r"\p{N}", GPT2))
digits_raw = PreTokenizer((r"\p{N}", GPT2), clean_spaces=False)
qwen2 = PreTokenizer((QWEN2,), clean_spaces=False)
cased = PreTokenizer((GPT4O,), clean_spaces=False)
deepseek3 = PreTokenizer((r"\p{N}{1,3}", CJK_WORDS, DEEPSEEK3), clean_spaces=False)
bailing = PreTokenizer(
    (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    clean_spaces=False,
)


def named(pre: PreTokenizer, names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre)


TABLE: dict[str, PreTokenizer] = {
    "default": DEFAULT,
    **named(llama3, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    **named(gpt2, "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert"),
    **named(gpt2, "jina-v1-en jina-v2-code roberta-bpe mpt olmo jais exaone4"),
    **named(gpt2_raw, "trillion granite-docling"),
    **named(digits, "starcoder refact codeshell exaone minerva-7b mellum2"),
    **named(digits_raw, "smollm command-r"),
    **named(qwen2, "qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan grok-2 solar-open"),
    **named(PreTokenizer((QWEN2,)), "stablelm2 megrez"),
    "qwen35": PreTokenizer((QWEN35,), clean_spaces=False),
    **named(PreTokenizer((LLAMA3,)), "dbrx smaug-bpe"),
    "chatglm-bpe": PreTokenizer((LLAMA3,), no_bos=True),
    **named(PreTokenizer((LLAMA3,), ignore_merges=True, no_bos=True), "glm4 glm5"),
    "jais-2": PreTokenizer((JAIS2,)),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True, clean_spaces=False),
    **named(cased, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    **named(deepseek3, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_WIDE, r"\p{N}"), clean_spaces=False
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    **named(bailing, "bailingmoe bailingmoe2 llada-moe"),
    "seed-coder": PreTokenizer(
        (CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES,),
        clean_spaces=False,
    ),
    "ufakzeka": PreTokenizer((WORDS % "",), clean_spaces=False),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", QWEN2), clean_spaces=False),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", CONTRACTION + "|" + WORDS % "+"), ignore_merges=True),
    "exaone-moe": PreTokenizer(
        (
            CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "poro-chat": PreTokenizer((BLOOM,), clean_spaces=False),
    **named(PreTokenizer((BLOOM,)), "bloom gpt3-finnish"),
    "viking": PreTokenizer((BLOOM, r"\p{N}"), clean_spaces=False),
}


def find(name: str) -> PreTokenizer:
    """The pre-tokenizer called `name`, the empty name being llama.cpp's default. UnsupportedError otherwise."""
    pre = TABLE.get(name or "default")
    if pre is None:
        raise UnsupportedError(f"unknown pre-tokenizer {quote(name)}{nearest(name)}")
    return pre


def nearest(name: str) -> str:
    """The end of an error message: the nearest names, and the way out."""
    close = difflib.get_close_matches(name[:80].lower(), TABLE, n=4, cutoff=0.5)
    known = f"nearest known: {', '.join(close)}" if close else f"known: {', '.join(sorted(TABLE))}"
    return f" ({known}; --pre-tokenizer NAME chooses one)"
