"""Sequences that follow a text, so that their tokens meet f-grams as those of real text do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.server.engine.layer_range import ALL_LAYERS, LayerRange
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk


class Texts:
    """The text that each request follows, by the order of arrival."""

    def __init__(self, tokens: NDArray[np.int64], max_len: int) -> None:
        """No request is longer than `max_len`."""
        self._tokens = tokens
        self._num_starts = len(tokens) - max_len
        self.num_requests = 0

    def prompt(self, length: int) -> tuple[int, ...]:
        """Of the next request; requests must be submitted in the order in which this is called."""
        start = self._start(self.num_requests)
        self.num_requests += 1
        return tuple(self._tokens[start : start + length].tolist())

    def token(self, request: int, place: int) -> int:
        return int(self._tokens[self._start(request) + place])

    def _start(self, request: int) -> int:
        return request * 7919 % self._num_starts


class TextFollower(ModelRunner):
    """Makes the next token of its text each sequence's likeliest; mixed in before what computes."""

    texts: Texts

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange = ALL_LAYERS) -> Tensor:
        self._next = [
            self.texts.token(c.seq.arrival, c.start + c.num_tokens) for c in chunks if c.reaches_end
        ]
        return super().forward(chunks, embeddings, layers)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        tokens = torch.tensor(self._next).to(logits.device, non_blocking=True)
        return logits.scatter_(1, tokens[:, None], 1e4)

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, token_ids = self.logits(hidden).max(dim=-1)  # as the forward passes that it is mixed into
        return token_ids, values
