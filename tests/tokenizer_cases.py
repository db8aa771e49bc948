"""Vocabularies from installed packages, GGUF files holding a vocabulary alone, and strings to try on them."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# --- vocabularies: tokenizer.ggml.* keys as a dict ---


def mistral_data(name: str) -> Path:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "data" / name


def from_sentencepiece(path: Path) -> dict[str, Any]:
    """The `llama` kind, from a SentencePiece model."""
    import sentencepiece

    sp: Any = sentencepiece.SentencePieceProcessor()
    sp.LoadFromFile(str(path))
    n = sp.vocab_size()
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    types = [next((t for test, t in kinds if test(i)), 1) for i in range(n)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in range(n)], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }


def from_ranks(ranks: list[bytes], special: list[str], pre: str, special_first: bool) -> dict[str, Any]:
    """The `gpt2` kind from tiktoken's ranks: a token's merge is what the tokens of lower rank make of its bytes."""
    alphabet = byte_characters()
    rank_of = {token: rank for rank, token in enumerate(ranks)}

    def text(raw: bytes) -> str:
        return "".join(alphabet[b] for b in raw)

    merges = []
    for rank, token in enumerate(ranks):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [rank_of.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(f"{text(parts[0])} {text(parts[1])}")
    tokens = [text(token) for token in ranks]
    types = [1] * len(tokens)
    control = [3] * len(special)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": special + tokens if special_first else tokens + special,
        "tokenizer.ggml.token_type": np.array(control + types if special_first else types + control, np.int32),
        "tokenizer.ggml.merges": merges,
    }


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    out, n = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            out.append(chr(byte))
        else:
            out.append(chr(256 + n))
            n += 1
    return out


def tekken(n: int | None = None, pre: str = "tekken") -> dict[str, Any]:
    """Mistral's tekken vocabulary, the first `n` of its ranks."""
    data = json.loads(mistral_data("tekken_240911.json").read_text())
    count = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
    ranks = [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"][: n or count]]
    special = [entry["token_str"] for entry in data.get("special_tokens", [])]
    special += [f"<SPECIAL_{i}>" for i in range(len(special), data["config"]["default_num_special_tokens"])]
    keys = from_ranks(ranks, special, pre, special_first=True)
    return keys | {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def from_tiktoken(path: Path, special: list[str], pre: str) -> dict[str, Any]:
    """A vocabulary in tiktoken's file format (Qwen's, Llama 3's), special tokens behind it."""
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = [base64.b64decode(token) for token, _ in sorted(lines, key=lambda line: int(line[1]))]
    keys = from_ranks(ranks, special, pre, special_first=False)
    return keys | {"tokenizer.ggml.bos_token_id": len(ranks), "tokenizer.ggml.eos_token_id": len(ranks)}


def write_gguf(path: Path, keys: Mapping[str, Any]) -> Path:
    """A GGUF file with metadata alone, written by the `gguf` package."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """The tokenizer's keys of a GGUF file, by the `gguf` package (tokens as a list of str)."""
    import gguf

    out: dict[str, Any] = {}
    for key, entry in gguf.GGUFReader(path).fields.items():
        if key.startswith(("tokenizer.", "general.name")):
            value = entry.contents()
            out[key] = np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
    return out


def differences(ours: Any, oracle: Any, texts: list[str]) -> list[tuple[str, str, Any, Any]]:
    """(text, what, ours, llama.cpp's) wherever encoding, with and without parse_special, or decoding differs."""
    out: list[tuple[str, str, Any, Any]] = []
    for parse in (False, True):
        theirs = oracle.tokenize(texts, True, parse)
        back = oracle.detokenize(theirs)
        for text, ids, shown in zip(texts, theirs, back, strict=True):
            mine = ours.encode(text, True, parse)
            decoded = ours.decode(ids)
            if mine != ids:
                out.append((text, f"parse_special={parse}", mine, ids))
            elif decoded != shown.decode("utf-8", "replace"):
                out.append((text, "decode", decoded, shown))
    return out


# --- strings ---

SENTENCES = """The quick brown fox jumps over the lazy dog. It's what we'd call "typical", isn't it?
Über Größe streiten sich die Ärzte; naïve façades coûtent 12,50 € à l'œil.
Быстрая коричневая лиса перепрыгивает через ленивую собаку. Съешь ещё этих мягких булок!
Η γρήγορη αλεπού πηδάει πάνω από το σκυλί· τι ωραία μέρα.
敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园吧！二〇二四年
素早い茶色の狐はのろまな犬を飛び越える。カタカナとひらがな、半角ｶﾅも。
빠른 갈색 여우가 게으른 개를 뛰어넘습니다. 한국어 띄어쓰기!
الثعلب البني السريع يقفز فوق الكلب الكسول. ١٢٣٤٥٦٧٨٩
השועל החום המהיר קופץ מעל הכלב העצלן. שָׁלוֹם עֲלֵיכֶם
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। क्षत्रिय ज्ञान १२३
สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ ๑๒๓
ভাষা আন্দোলন বাংলা যুক্তাক্ষর; தமிழ் மொழி; తెలుగు భాష
def f(x: int) -> str:\n\treturn f"{x!r:>{10}}"  # comment\n\n    if x != 0 and y >= 1e-5:
for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; } // done\r\n
SELECT * FROM t WHERE id = 42 AND name LIKE '%O''Brien%';
<html><body class="a-b_c">&amp; &lt;p&gt; </body></html>
{"key": [1, 2.5, null, true], "path": "C:\\\\Users\\\\me"}
$\\sum_{i=0}^{n} x_i^2 \\leq \\alpha$ and ~/bin/*.sh | grep -v '^#' > /dev/null 2>&1
I'LL we've you'Re he'D she'S they'M 'tis rock'n'roll O'Neill’s ‘quoted’ l’été D'Artagnan
HTTPServer camelCaseWord snake_case_word UPPER lowerUPPER ÀÉÎõü ΑΒΓαβγ АБВабв ǅ ʰ ª º
3.14159 1,000,000 2024-01-01T12:34:56Z 1234567890123 ½ ² ³ ⅧⅨ ①② ٣٤ １２３ 0b1010
Łódź Nguyễn Việt Nam Türkçe İstanbul ığüşöç Čeština řeřicha magyarország Íslenska þorn"""

EMOJI = [
    "😀",
    "🤦🏽\u200d♂\ufe0f",
    "👨\u200d👩\u200d👧\u200d👦",
    "🇩🇪🇯🇵",
    "❤\ufe0f",
    "☕",
    "✨🎉",
    "1\ufe0f⃣",
    "⚡\ufe0f",
    "🫠",
]
EMOJI += ["🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "🧑\u200d🚀"]
BLANKS = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\x0b", "\x0c"]
BLANKS += ["\x85", "\u2009", "\u200b", "\ufeff", "\x1c", "\x1f", "    ", "        ", " \n", "\n ", "\t\t"]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—–“”‘’«»、。！？·•§©™°±×÷←→∑√≠■◆♥"
MARKS = "\u0301\u0308\u0327\u20d0\u0e31\u0e34\u093f\u094d\u0651\u05b8\u0489\u200d\ufe0f\u1abe"
CASES = ["'s", "'T", "'re", "'VE", "'m", "'Ll", "'d", "'\u017f", "’s", "'", "''", "'x", "'r", "'l"]
CODE_POINTS = [
    (0x00, 0x20),
    (0x7F, 0xA1),
    (0xA1, 0x250),
    (0x250, 0x590),
    (0x590, 0x1100),
    (0x1100, 0x2000),
    (0x2000, 0x2C00),
    (0x2C00, 0x3100),
    (0x3100, 0xD800),
    (0xE000, 0x10000),
    (0x10000, 0x12000),
    (0x12000, 0x20000),
    (0x1C80, 0x1C90),
    (0xA7C0, 0xA7F0),
    (0x1F300, 0x1FB00),
    (0x20000, 0x33000),
    (0x33000, 0x110000),
]


def strings(n: int, seed: int, special: list[str] | None = None) -> Iterator[str]:
    """`n` strings of mixed kinds, the same for the same seed. `special`: token texts to put among them."""
    rng = random.Random(seed)
    lines = SENTENCES.split("\n")
    words = [word for line in lines for word in line.split()]
    special = (special or []) + ["<|im_start|>", "<s>", "</s>", "<0x0A>", "<unk>", "▁", "Ġ", "[INST]", "<|"]

    def character() -> str:
        low, high = rng.choice(CODE_POINTS)
        return chr(rng.randrange(low, high))

    def repeated(choices: Any, most: int) -> str:
        return "".join(rng.choice(choices) for _ in range(rng.randint(1, most)))

    kinds = [
        lambda: rng.choice(lines),
        lambda: " ".join(rng.choice(words) for _ in range(rng.randint(1, 6))),
        lambda: rng.choice(words),
        lambda: " " + rng.choice(words).upper(),
        lambda: rng.choice(words).lower() + rng.choice(CASES),
        lambda: repeated(BLANKS, 5),
        lambda: " " * rng.randint(1, 30),
        lambda: repeated("0123456789", 12),
        lambda: repeated("0123456789٣१๓３²Ⅷ", 6),
        lambda: repeated(PUNCTUATION, 6),
        lambda: rng.choice(EMOJI),
        lambda: rng.choice(words) + repeated(MARKS, 3),
        lambda: "".join(character() for _ in range(rng.randint(1, 8))),
        lambda: repeated([chr(c) for c in range(33)], 4),
        lambda: rng.choice(special),
        lambda: rng.choice(special)[: rng.randint(1, 8)],
        lambda: rng.choice("aAéя中あ \n-=_!") * rng.randint(1, 40),
        lambda: rng.choice([" ", "\n", ""]).join([rng.choice(special), rng.choice(words), rng.choice(special)]),
        lambda: rng.choice(CASES),
        lambda: character() + rng.choice(words) + character(),
    ]
    for _ in range(n):
        yield "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 7)))
