"""Residuals: trained vectors beside the f-gram model, of which an f-gram takes those of its suffixes.

An f-gram model of a few million weights says what f-grams have in common; residuals hold what is true of one.
An f-gram's row takes those of all its suffixes, down to its last token: `a b c` has that of `a b c`, that of
`b c` and that of `c`. So a rare f-gram, which training meets a few times, begins where its frequent suffixes
are, and is trained itself on what it has beyond them only. It is a row of the table all the same, so
inference costs the same with and without.

The paper (SCONE, arXiv 2502.01637) trains the f-gram model only; n-gram embeddings that are trained directly,
without such a model, and summed over the n-grams that end at a token, are those of arXiv 2501.16975.

Only the rows of a batch's f-grams get a gradient: `gather` hands them out as leaves, and row_adagrad.py
moves them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scone.model_store.fgram_set import MIN_N, FGramSet
from scone.model_store.set_matcher import SetMatcher


class FGramResiduals(nn.Module):
    """One vector for each token sequence that was trained with one; zero for all others.

    Attributes:
        values: (num_residuals, dim).
        tokens, lengths: the sequences, as in FGramSet; single tokens are among them. In the control that sees
            only the last token of each f-gram they are all there is.
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
    def zeros(cls, fgrams: FGramSet, dim: int, *, last_token_only: bool = False) -> FGramResiduals:
        """Of each f-gram of a set and of the tokens that they end in; of those alone in the control."""
        last_tokens = np.unique(_last_tokens(fgrams.tokens, fgrams.lengths)).astype(np.int32)
        tokens, lengths = last_tokens[:, None], np.ones(len(last_tokens), np.uint8)
        if not last_token_only:
            padding = ((0, 0), (0, fgrams.tokens.shape[1] - 1))
            tokens = np.concatenate((np.pad(tokens, padding, constant_values=-1), fgrams.tokens))
            lengths = np.concatenate((lengths, fgrams.lengths))
        return cls(torch.zeros(len(tokens), dim), torch.from_numpy(tokens), torch.from_numpy(lengths))

    def check(self, dim: int) -> None:
        """Raises ValueError if the arrays do not belong together, or to a model of this width."""
        num_residuals = len(self.tokens)
        if self.values.shape != (num_residuals, dim) or self.lengths.shape != (num_residuals,):
            raise ValueError(
                f"residuals have values {tuple(self.values.shape)} and lengths {tuple(self.lengths.shape)},"
                f" wanted ({num_residuals}, {dim}) and ({num_residuals},)"
            )

    def find(self, tokens: NDArray[np.int32], lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(m, max_n) int64: which residuals f-grams (as in FGramSet) take, -1 for none.

        Column n is that of the suffix of n + 1 tokens; -1 too where an f-gram is shorter.
        """
        found = np.full((len(lengths), self.tokens.shape[1]), -1, np.int64)
        found[:, 0] = self._find_tokens(_last_tokens(tokens, lengths))
        for n in range(MIN_N, found.shape[1] + 1):
            long_enough = np.flatnonzero(lengths >= n)
            starts = lengths[long_enough].astype(np.int64) - n
            suffixes = tokens[long_enough[:, None], starts[:, None] + np.arange(n)]
            found[long_enough, n - 1] = self._find_suffixes(suffixes)
        return found

    def gather(self, ids: Tensor) -> Tensor:
        """Residuals (m, dim) float32 of distinct ids (m,).

        Where gradients are wanted they can be read off the result after `backward`.
        """
        return self.values[ids].float().requires_grad_(torch.is_grad_enabled())

    def trained(self) -> FGramResiduals:
        """Those that a training has moved."""
        moved = self.values.any(dim=1)
        return FGramResiduals(self.values[moved], self.tokens[moved], self.lengths[moved])

    def _find_tokens(self, token_ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """(m,) of single tokens (m,)."""
        singles, ids = self._singles
        if not len(singles):
            return np.full(len(token_ids), -1, np.int64)
        at = np.minimum(np.searchsorted(singles, token_ids), len(singles) - 1)
        return np.where(singles[at] == token_ids, ids[at], -1)

    def _find_suffixes(self, suffixes: NDArray[np.int32]) -> NDArray[np.int64]:
        """(m,) of sequences of one length (m, n), n at least MIN_N."""
        matcher, ids = self._sequences
        if matcher is None or not len(suffixes):
            return np.full(len(suffixes), -1, np.int64)
        ranks = matcher.find(suffixes, np.full(len(suffixes), suffixes.shape[1], np.uint8))
        return np.where(ranks >= 0, ids[ranks], -1)

    @cached_property
    def _singles(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Tokens that have a residual, in ascending order, and which it is."""
        ids = np.flatnonzero(self.lengths.cpu().numpy() == 1)
        token_ids = self.tokens.cpu().numpy()[ids, 0]
        order = np.argsort(token_ids)
        return token_ids[order], ids[order]

    @cached_property
    def _sequences(self) -> tuple[SetMatcher | None, NDArray[np.int64]]:
        """Finds the others by rank, and which residual each rank is."""
        lengths = self.lengths.cpu().numpy()
        ids = np.flatnonzero(lengths >= MIN_N)
        if not len(ids):
            return None, ids
        counts = np.zeros(len(ids), np.int64)
        longer = FGramSet(self.tokens.cpu().numpy()[ids], lengths[ids], counts, "", 0, 0)
        return SetMatcher(longer), ids


def _last_tokens(tokens: NDArray[np.int32], lengths: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(m,)."""
    return tokens[np.arange(len(lengths)), lengths.astype(np.int64) - 1]
