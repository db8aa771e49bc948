"""Train the small model on CPU and write it as a Hugging Face folder, bf16.

    python -m tools.small_model.train --text web.txt wiki.txt --out tests/data/small-model --work /tmp/small-model

Needs torch, safetensors, sentencepiece, numpy. Seeds are fixed; with the same versions and one thread a run gives the
same weights. A checkpoint is kept in --work every evaluation, and a run that was cut off goes on from it.

Matrices of the layers are trained by Muon, embedding, output and norms by AdamW; the rate warms up, then falls along
a cosine. A window is BOS and 511 tokens from a random place; an epoch covers the text once from a random offset.
The weights that are written are those with the lowest loss on the validation stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from . import text
from .muon import Muon
from .network import Llama, Shape, losses

BOS = 1
SEED = 20


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", nargs="+", type=Path, required=True, help="UTF-8 texts")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    p.add_argument("--held-out", type=Path, help="also write the held-out stretch to this file")
    p.add_argument("--epochs", type=float, default=3)
    p.add_argument("--batch", type=int, default=4, help="windows a step")
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--muon-lr", type=float, default=0.015)
    p.add_argument("--adam-lr", type=float, default=0.003)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--every", type=int, default=100, help="steps between evaluations")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--stop-after", type=int, help="stop after this many steps (to measure the speed)")
    return p.parse_args()


def cut_windows(tokens: np.ndarray, length: int, offset: int = 0) -> np.ndarray:
    """(n, length + 1): BOS, then `length` tokens; neighbours, from `offset` on; a short rest is left out."""
    n = (len(tokens) - offset) // length
    rows = tokens[offset : offset + n * length].reshape(n, length)
    return np.concatenate([np.full((n, 1), BOS), rows], axis=1)


def epoch_order(tokens: np.ndarray, length: int, epoch: int) -> np.ndarray:
    """The windows of an epoch in random order; a function of the epoch alone, so that a run can go on."""
    rng = np.random.default_rng((SEED, epoch))
    windows = cut_windows(tokens, length, int(rng.integers(length)))
    return windows[rng.permutation(len(windows))]


def optimizers(network: Llama, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    named = dict(network.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and ".layers." in n]
    tables = [p for n, p in named.items() if p.ndim == 2 and ".layers." not in n]
    norms = [p for p in named.values() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": args.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.98)),
    ]


def rate(step: int, n_steps: int, warmup: int = 60) -> float:
    """Share of the full learning rate: linear warm-up, cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1)))


def train(args: argparse.Namespace, shape: Shape, tokens: np.ndarray, validation: np.ndarray) -> dict:
    """The state dict with the lowest validation loss."""
    torch.manual_seed(SEED)
    network = Llama(shape, args.dropout)
    opts = optimizers(network, args)
    full = [[g["lr"] for g in o.param_groups] for o in opts]
    length = shape.max_position_embeddings - 1
    per_epoch = len(cut_windows(tokens, length, length - 1)) // args.batch
    n_steps = int(args.epochs * per_epoch)
    val = torch.from_numpy(cut_windows(validation, length))
    step, best, best_state = 0, math.inf, network.state_dict()
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        for o, state in zip(opts, saved["optimizers"], strict=True):
            o.load_state_dict(state)
        step, best, best_state = saved["step"], saved["best"], saved["best_state"]
    torch.manual_seed(SEED + step)
    began, first, running = time.perf_counter(), step, 0.0
    print(
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {n_steps} steps, {per_epoch} an epoch",
        flush=True,
    )
    while step < n_steps:
        epoch, at = divmod(step, per_epoch)
        if at == 0 or step == first:
            order = torch.from_numpy(epoch_order(tokens, length, epoch))
        batch = order[at * args.batch : (at + 1) * args.batch]
        for o, lrs in zip(opts, full, strict=True):
            for g, lr in zip(o.param_groups, lrs, strict=True):
                g["lr"] = lr * rate(step, n_steps)
        loss = F.cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for o in opts:
            o.step()
        running += loss.item()
        step += 1
        if step % args.every == 0 or step == n_steps:
            now = losses(network, val).mean().item()
            if now < best:
                best, best_state = now, {k: v.clone() for k, v in network.state_dict().items()}
            speed = (time.perf_counter() - began) / (step - first)
            n = args.every if step % args.every == 0 else n_steps % args.every
            print(
                f"step {step} epoch {step / per_epoch:.2f} train {running / n:.4f} validation {now:.4f} "
                f"(perplexity {math.exp(now):.2f}, best {math.exp(best):.2f}) {speed:.2f} s/step",
                flush=True,
            )
            running = 0.0
            save(checkpoint, network, opts, step, best, best_state)
        if args.stop_after and step - first >= args.stop_after:
            print(f"{(time.perf_counter() - began) / (step - first):.3f} s a step, loss {loss.item():.3f}", flush=True)
            break
    return best_state


def save(path: Path, network: Llama, opts: list, step: int, best: float, best_state: dict) -> None:
    """One checkpoint, replaced whole."""
    part = path.with_suffix(".part")
    states = [o.state_dict() for o in opts]
    torch.save(
        {"network": network.state_dict(), "optimizers": states, "step": step, "best": best, "best_state": best_state},
        part,
    )
    part.replace(path)


def write_folder(out: Path, shape: Shape, state: dict, tokenizer: bytes) -> None:
    """The Hugging Face folder: config, weights in bf16, tokenizer and its companions."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # it is written through a private temporary file
    (out / "tokenizer.model").write_bytes(tokenizer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    companions = {
        "config.json": shape.config(),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            **special,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": shape.max_position_embeddings,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    }
    for name, value in companions.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    parts = text.read(args.text)
    if args.held_out:
        args.held_out.write_text(parts.held_out, encoding="utf-8")
    cached = args.work / "tokenizer.model"
    if not cached.exists():
        cached.write_bytes(text.train_tokenizer(parts.train, shape.vocab_size))
    tokenizer = cached.read_bytes()
    tokens, validation = (text.encode(tokenizer, t) for t in (parts.train, parts.validation))
    print(f"{len(tokens):,} training tokens, {len(validation):,} validation tokens", flush=True)
    state = train(args, shape, tokens, validation)
    write_folder(args.out, shape, state, tokenizer)


if __name__ == "__main__":
    main()
