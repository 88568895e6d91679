"""Residuals: for each f-gram a trained vector of its own, added to what the f-gram model makes of it.

An f-gram model of a few million weights says what f-grams have in common; a residual holds what is true of
one f-gram alone. It is part of the row, so inference costs the same with and without. The paper (SCONE,
arXiv 2502.01637) trains the f-gram model only; tables of n-gram embeddings that are trained directly, without
such a model, are those of arXiv 2501.16975.

Only the rows of a batch's f-grams get a gradient: `gather` hands them out as leaves, and row_adagrad.py
moves them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scone.model_store.fgram_set import FGramSet
from scone.model_store.set_matcher import SetMatcher


class FGramResiduals(nn.Module):
    """One vector for each f-gram that was trained with one; zero for all others.

    Attributes:
        values: (num_residuals, dim).
        tokens, lengths: the f-grams, as in FGramSet. Empty in the control that sees only the last token of
            each f-gram: there `values` has a row for each token of the vocabulary.
    """

    values: Tensor
    tokens: Tensor
    lengths: Tensor

    def __init__(self, values: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("tokens", tokens)
        self.register_buffer("lengths", lengths)

    @classmethod
    def of_fgrams(cls, fgrams: FGramSet, dim: int) -> FGramResiduals:
        """Zeros for each f-gram of a set."""
        return cls(
            torch.zeros(len(fgrams), dim), torch.from_numpy(fgrams.tokens), torch.from_numpy(fgrams.lengths)
        )

    @classmethod
    def of_last_tokens(cls, vocab_size: int, dim: int) -> FGramResiduals:
        """Zeros for each token: the control's."""
        return cls(
            torch.zeros(vocab_size, dim),
            torch.zeros(0, 0, dtype=torch.int32),
            torch.zeros(0, dtype=torch.uint8),
        )

    def check(self, vocab_size: int, dim: int) -> None:
        """Raises ValueError if the arrays do not belong together, or to a model of this shape."""
        num_residuals = len(self.tokens) or vocab_size
        if self.values.shape != (num_residuals, dim) or self.lengths.shape != (len(self.tokens),):
            raise ValueError(
                f"residuals have values {tuple(self.values.shape)} and lengths {tuple(self.lengths.shape)},"
                f" wanted ({num_residuals}, {dim}) and ({len(self.tokens)},)"
            )

    def find(self, tokens: NDArray[np.int32], lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(m,) int64, which residual is that of each f-gram (as in FGramSet), -1 for none."""
        if not len(self.tokens):
            return tokens[np.arange(len(lengths)), lengths.astype(np.int64) - 1].astype(np.int64)
        return self._matcher.find(tokens, lengths)

    def gather(self, ids: Tensor) -> Tensor:
        """Residuals (m, dim) float32 of distinct ids (m,).

        Where gradients are wanted they can be read off the result after `backward`.
        """
        return self.values[ids].float().requires_grad_(torch.is_grad_enabled())

    def trained(self) -> FGramResiduals:
        """Those that a training has moved; all of a control's."""
        if not len(self.tokens):
            return self
        moved = self.values.any(dim=1)
        return FGramResiduals(self.values[moved], self.tokens[moved], self.lengths[moved])

    @cached_property
    def _matcher(self) -> SetMatcher:
        lengths = self.lengths.cpu().numpy()
        counts = np.zeros(len(lengths), np.int64)
        return SetMatcher(FGramSet(self.tokens.cpu().numpy(), lengths, counts, "", 0, 0))
