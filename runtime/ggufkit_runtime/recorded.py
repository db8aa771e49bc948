"""A model's logits over a text, kept in a file: a reference that many models are compared with runs once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats.errors import GgufkitError, UsageError

from .evaluate import batch_of, scored, windows
from .generate import Model


class Recorded:
    """Stands for a model in `evaluate.against`, and answers what the model answered when it was recorded.

    `record` runs the model over a text; after that the model itself is not needed. The file holds float32
    (rows, n_vocab), one row a position whose logits were asked for.
    """

    def __init__(self, model: Model, path: str | os.PathLike[str]):
        self.config, self.tokenizer, self.info, self.n_ctx = model.config, model.tokenizer, model.info, model.n_ctx
        self.ops, self.path = model.ops, Path(path)
        self._model: Model | None = model
        self._rows: dict[bytes, tuple[int, int]] = {}  # all ids so far -> the rows of the last batch
        self._n = 0

    def record(self, text: str, n_ctx: int = 512, n_chunks: int | None = None,
               progress: Callable[[int, int], Any] | None = None) -> None:  # fmt: skip
        """Run the windows that `evaluate.against` will ask for; `progress` is told (windows done, in all).

        Raises UsageError for a text of less than two windows, GgufkitError where the disk is full.
        """
        chunks = windows(self, text, n_ctx, n_chunks)
        with self.path.open("wb") as self._file:
            for done, window in enumerate(chunks, 1):
                for _ in scored(self, window, batch_of(self)):
                    pass
                if progress is not None:
                    progress(done, len(chunks))
        self._model = None

    # -- what evaluate asks of a model -------------------------------------------------------------

    def cache(self, n_ctx: int | None = None) -> Any:
        """The ids so far, and while recording the model's own cache."""
        return _Cache(None if self._model is None else self._model.cache(n_ctx))

    def forward(self, ids: Sequence[int] | np.ndarray, cache: Any, first: int = 0) -> np.ndarray:
        """Logits of ids[first:], float32 (n - first, n_vocab). UsageError for ids that were not recorded."""
        cache.ids += np.asarray(ids, np.int64).tobytes()
        if self._model is not None:
            logits = self._model.forward(ids, cache.of_model, first)
            try:
                self._file.write(np.ascontiguousarray(logits, np.float32).data)
            except OSError as error:
                raise GgufkitError(f"{self.path}: {error.strerror or error}") from None
            self._rows[cache.ids] = self._n, self._n + len(logits)
            self._n += len(logits)
            return logits
        if cache.ids not in self._rows:
            raise UsageError("the reference was recorded over another text")
        start, stop = self._rows[cache.ids]
        n_vocab = self.config.n_vocab
        flat = np.fromfile(self.path, np.float32, (stop - start) * n_vocab, offset=4 * start * n_vocab)
        return flat.reshape(len(ids) - first, n_vocab)


class _Cache:
    def __init__(self, of_model: Any):
        self.of_model, self.ids = of_model, b""
