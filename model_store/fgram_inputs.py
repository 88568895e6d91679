"""Model inputs whose f-grams are computed and not looked up: what training and evaluation feed the model.

This is the paper's training-time input layer (arXiv 2502.01637, Algorithm 1): at each position the longest
f-gram that ends there, embedded by the f-gram model, replaces the token embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import MIN_N, FGramSet
from scone.model_store.set_matcher import SetMatcher


@dataclass(frozen=True, slots=True)
class MatchedBatch:
    """A batch and the f-grams in it, each distinct one once.

    Attributes:
        input_ids: (batch, seq) int64.
        fgrams: token ids (m, n) int64, one tensor for each length that occurs.
        places: (num_matched,) int64, indices into the flattened batch.
        rows: (num_matched,) int64, which of all `fgrams`, one tensor after the other, ends there.
        residual_ids: (num_residuals,) int64, distinct; what FGramResiduals.gather takes.
        residual_rows: (num_fgrams, any) int64, which of those each of `fgrams` takes, counted from 1;
            0 for none. Empty, like `residual_ids`, where the model has no residuals.
    """

    input_ids: Tensor
    fgrams: tuple[Tensor, ...]
    places: Tensor
    rows: Tensor
    residual_ids: Tensor
    residual_rows: Tensor

    @property
    def match_rate(self) -> float:
        """The share of positions where an f-gram ends."""
        return len(self.places) / self.input_ids.numel()

    def to(self, device: torch.device) -> MatchedBatch:
        """On `device`; to a GPU through pinned memory, so that nobody waits for the copies."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

        fgrams = tuple(moved(part) for part in self.fgrams)
        others = (self.places, self.rows, self.residual_ids, self.residual_rows)
        return MatchedBatch(moved(self.input_ids), fgrams, *map(moved, others))


class FGramInputs:
    """Embeds input ids with f-grams of one set through one f-gram model."""

    def __init__(self, fgrams: FGramSet, model: FGramModel) -> None:
        self._model = model
        self._fgrams = fgrams
        self._matcher = SetMatcher(fgrams)
        self._residual_ids: NDArray[np.int64] | None = None
        if model.residuals is not None:
            self._residual_ids = model.residuals.find(fgrams.tokens, fgrams.lengths)

    def match(self, input_ids: NDArray[np.integer]) -> MatchedBatch:
        """The f-grams of sequences (batch, seq) that know nothing of each other, on the CPU."""
        row_ids = self._matcher.match_all(input_ids).reshape(-1)
        places = np.flatnonzero(row_ids >= 0)
        distinct, inverse = np.unique(row_ids[places], return_inverse=True)
        lengths = self._fgrams.lengths[distinct]
        by_length = np.argsort(lengths, kind="stable")
        rank_of = np.empty_like(by_length)
        rank_of[by_length] = np.arange(len(by_length))
        tokens = self._fgrams.tokens[distinct].astype(np.int64)
        parts = [
            tokens[lengths == n, :n] for n in range(MIN_N, self._fgrams.max_n + 1) if np.any(lengths == n)
        ]
        return MatchedBatch(
            torch.from_numpy(input_ids.astype(np.int64)),
            tuple(torch.from_numpy(part) for part in parts),
            torch.from_numpy(places),
            torch.from_numpy(rank_of[inverse]),
            *self._residuals_of(distinct[by_length]),
        )

    def _residuals_of(self, row_ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """`residual_ids` and `residual_rows` of a batch with these f-grams."""
        if self._residual_ids is None:
            none = torch.empty(0, dtype=torch.int64)
            return none, none
        of_fgrams = self._residual_ids[row_ids]
        distinct, inverse = np.unique(of_fgrams[of_fgrams >= 0], return_inverse=True)
        rows = np.zeros(of_fgrams.shape, np.int64)
        rows[of_fgrams >= 0] = inverse + 1
        return torch.from_numpy(distinct), torch.from_numpy(rows)

    def embedding_of(self, decoder: Decoder) -> Callable[[NDArray[np.int32]], Tensor]:
        """`match` and `embed` in one: of (batch, seq), (batch, seq, dim)."""

        def embed(input_ids: NDArray[np.int32]) -> Tensor:
            return self.embed(decoder, self.match(input_ids).to(decoder.device))

        return embed

    def gather_residuals(self, batch: MatchedBatch) -> Tensor | None:
        """Residuals (num_residuals, dim) of the batch's f-grams, for `embed`; None if the model has none."""
        if self._model.residuals is None:
            return None
        return self._model.residuals.gather(batch.residual_ids)

    def embed(self, decoder: Decoder, batch: MatchedBatch, residuals: Tensor | None = None) -> Tensor:
        """Embeddings (batch, seq, dim), where the decoder is; differentiable in weights and residuals.

        Who wants the gradient of the batch's residuals has gathered them before and gives them.
        """
        if residuals is None:
            residuals = self.gather_residuals(batch)
        embeddings = decoder.embed(batch.input_ids)
        if not batch.fgrams:
            return embeddings
        rows = torch.cat([self._model(part) for part in batch.fgrams])
        if residuals is not None:
            none = residuals.new_zeros(1, residuals.shape[1])
            padded = torch.cat((none, residuals))
            rows = rows + embedding_bag(batch.residual_rows, padded, mode="sum", padding_idx=0)
        flat = embeddings.flatten(0, 1)
        flat = flat.index_copy(0, batch.places, rows[batch.rows].to(embeddings.dtype))
        return flat.view_as(embeddings)
