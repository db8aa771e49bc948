"""Compare the runtime with llama.cpp on one model: logits, greedy text, perplexity, speed.

    python tools/check_runtime.py logits MODEL.gguf --text TEXT      KL to the F32 reference, ours and llama.cpp's
    python tools/check_runtime.py greedy MODEL.gguf --text TEXT      20 prompts of 64 tokens, where they part
    python tools/check_runtime.py perplexity MODEL.gguf --text TEXT  llama-perplexity's definition through llama.cpp
    python tools/check_runtime.py speed MODEL.gguf                   interleaved pairs, medians and ratio

Needs the extra `test` (xllamacpp). The reference is the same file dequantized to float32, run in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ggufkit_runtime import evaluate, generate
from ggufkit_runtime.sampler import Sampler
from oracles.llama import Llama


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) of logits, (n,)."""
    p, q = evaluate.log_softmax(reference), evaluate.log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=1)


def logits(args: argparse.Namespace) -> None:
    model, reference = generate.load(args.model, threads=args.threads), generate.load(args.model, device="reference")
    text = Path(args.text).read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text[:20000])
    ours, theirs, steps, their_steps, same = [], [], [], [], []
    with Llama(args.model, n_ctx=args.ctx, n_threads=args.threads) as oracle:
        for i in range(args.chunks):
            chunk = ids[i * args.ctx : (i + 1) * args.ctx]
            expected, mine = reference.logits(chunk), model.logits(chunk)
            ours.append(divergence(expected, mine))
            other = oracle.logits(chunk)
            theirs.append(divergence(expected, other))
            same.append(mine.argmax(axis=1) == other.argmax(axis=1))
            cache, n = model.cache(), 48  # token by token takes other kernels than a batch
            one = np.concatenate([model.forward([t], cache) for t in chunk[:n]])
            steps.append(divergence(expected[:n], one))
            their_steps.append(divergence(expected[:n], oracle.logits_one_by_one(chunk[:n])))
    ours, theirs, steps = np.concatenate(ours), np.concatenate(theirs), np.concatenate(steps)
    print(f"{args.model}: {len(ours)} tokens")
    print(f"KL(reference ‖ ours)       mean {ours.mean():.3e}  p99 {np.quantile(ours, 0.99):.3e}")
    print(f"KL(reference ‖ ours), n=1  mean {steps.mean():.3e}  ({len(steps)} tokens)")
    print(f"KL(reference ‖ llama.cpp), n=1  mean {np.concatenate(their_steps).mean():.3e}")
    print(f"KL(reference ‖ llama.cpp)  mean {theirs.mean():.3e}  p99 {np.quantile(theirs, 0.99):.3e}")
    print(f"ratio {ours.mean() / theirs.mean():.3f}; same top token as llama.cpp {np.concatenate(same).mean():.4f}")


def greedy(args: argparse.Namespace) -> None:
    model = generate.load(args.model, threads=args.threads)
    text = Path(args.text).read_text(encoding="utf-8")
    prompts = [text[i * 2500 : i * 2500 + 160] for i in range(20)]
    parted = 0
    with Llama(args.model, n_ctx=1024, n_threads=args.threads) as oracle:
        for number, prompt in enumerate(prompts):
            ids = model.tokenizer.encode(prompt)
            assert ids == oracle.tokenize([prompt])[0]
            theirs = oracle.greedy(ids, 64, stop=False)
            session = model.session(1024)
            model.tokenizer.eog_ids, saved = frozenset(), model.tokenizer.eog_ids
            ours = list(session.stream(ids, Sampler(temperature=0), 64))
            model.tokenizer.eog_ids = saved
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            if at is None:
                continue
            parted += 1
            top = np.sort(evaluate.log_softmax(oracle.logits(ids + theirs[:at])[-1:])[0])
            print(f"prompt {number}: part at token {at}, llama.cpp's top two {top[-1] - top[-2]:.4f} apart")
    print(f"{args.model}: {parted} of 20 part within 64 tokens")


def perplexity(args: argparse.Namespace) -> None:
    model = generate.load(args.model, threads=args.threads)
    text = Path(args.text).read_text(encoding="utf-8")[:60000]
    ours = evaluate.perplexity(model, text, args.ctx, args.chunks or None)
    total, count = 0.0, 0
    with Llama(args.model, n_ctx=args.ctx, n_threads=args.threads) as oracle:
        for window in evaluate.windows(model, text, args.ctx, args.chunks or None):
            half = args.ctx // 2
            log_p = evaluate.log_softmax(oracle.logits(window)[half:-1])
            total -= log_p[np.arange(len(log_p)), window[half + 1 :]].sum()
            count += len(log_p)
    theirs = float(np.exp(total / count))
    print(f"{args.model}: ours {ours.perplexity:.4f} ± {ours.stderr:.4f}, llama.cpp {theirs:.4f}, "
          f"{100 * (ours.perplexity / theirs - 1):+.3f} % ({ours.n_tokens} tokens, {ours.n_chunks} windows)"
    )  # fmt: skip


def speed(args: argparse.Namespace) -> None:
    model = generate.load(args.model, threads=args.threads)
    ours: dict[str, list[float]] = {"pp512": [], "tg64": []}
    theirs: dict[str, list[float]] = {"pp512": [], "tg64": []}
    with Llama(args.model, n_ctx=1024, n_threads=args.threads) as oracle:
        for _ in range(args.pairs):
            for result in evaluate.bench(model, 512, 64, 1):
                ours[result.test].append(result.tokens_per_s)
            for test, rates in oracle.bench(pp=512, tg=64, reps=1).items():
                theirs[test] += rates
    for test in ours:
        ratio = np.median(np.array(ours[test]) / np.array(theirs[test]))
        print(f"{args.model} {test}: ours {np.median(ours[test]):.1f}, "
              f"llama.cpp {np.median(theirs[test]):.1f} tokens/s, "
              f"median ratio {ratio:.2f} ({args.pairs} pairs)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["logits", "greedy", "perplexity", "speed"])
    parser.add_argument("model")
    parser.add_argument("--text", help="a UTF-8 text")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    globals()[args.check](args)


if __name__ == "__main__":
    main()
