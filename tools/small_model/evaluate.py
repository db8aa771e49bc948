"""Perplexities of the small model and of the n-gram baseline, on the same tokens; one JSON document on stdout.

    python -m tools.small_model.evaluate --text web.txt wiki.txt --model tests/data/small-model

The weights are those of the folder, bf16, computed with in float32. The tokens that are scored are llama-perplexity's:
windows of 512 tokens, the first replaced by BOS, the second half of each scored; and, under "every_token", all but the
first of each window. The n-gram model sees the whole stream and is asked for the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from . import text
from .network import Llama, Shape, losses
from .ngram import KneserNey

BOS = 1


def load(folder: Path) -> Llama:
    network = Llama(Shape())
    network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return network


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """llama-perplexity's windows (n, length) of a stream without BOS: one BOS before it, whole windows only."""
    stream = np.concatenate([[BOS], tokens])
    rows = stream[: len(stream) // length * length].reshape(-1, length).copy()
    rows[:, 0] = BOS
    return rows


def figures(all_losses: np.ndarray) -> dict:
    """From −ln p of the tokens 1 … length − 1 of each window."""
    scored = all_losses[:, (all_losses.shape[1] + 1) // 2 :]  # tokens 257 … 511 of 512
    return {
        "perplexity": math.exp(scored.mean()),
        "n_tokens": scored.size,
        "n_chunks": len(all_losses),
        "every_token": math.exp(all_losses.mean()),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", nargs="+", type=Path, required=True, help="the texts that the model was trained from")
    p.add_argument("--model", type=Path, required=True, help="the model's folder")
    p.add_argument("--order", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    network, tokenizer = load(args.model), (args.model / "tokenizer.model").read_bytes()
    parts = text.read(args.text)
    train, validation, held_out = (text.encode(tokenizer, t) for t in (parts.train, parts.validation, parts.held_out))
    length = Shape.max_position_embeddings
    baseline = KneserNey(train, Shape.vocab_size, args.order)
    report: dict = {
        "n_parameters": sum(p.numel() for p in network.parameters()),
        "tokens": {"train": len(train), "validation": len(validation), "held_out": len(held_out)},
    }
    for name, tokens in (("train", train[: len(held_out)]), ("validation", validation), ("held_out", held_out)):
        rows = windows(tokens, length)
        network_losses = losses(network, torch.from_numpy(rows)).double().numpy()
        # token i of the stream stands at i + 1 of the windows laid end to end
        theirs = np.concatenate([[0.0], baseline.losses(tokens)])[: rows.size].reshape(rows.shape)[:, 1:]
        report[name] = {"network": figures(network_losses), f"{args.order}-gram": figures(theirs)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
