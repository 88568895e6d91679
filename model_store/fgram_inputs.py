"""Model inputs whose f-grams are computed and not looked up: what training and evaluation feed the model.

This is the paper's training-time input layer (arXiv 2502.01637, Algorithm 1): at each position the longest
f-gram that ends there, embedded by the f-gram model, replaces the token embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.model_store.decoder import Decoder
from scone.model_store.fgram_model import FGramModel
from scone.model_store.fgram_set import FGramSet


class FGramInputs:
    """Embeds input ids with f-grams of one set through one f-gram model."""

    def __init__(self, fgrams: FGramSet, model: FGramModel) -> None:
        self._model = model
        self._tokens = torch.from_numpy(fgrams.tokens.astype(np.int64))
        self._lengths = torch.from_numpy(fgrams.lengths.astype(np.int64))
        self._max_n = fgrams.max_n
        self._row_ids = {
            tuple(tokens[:n]): row
            for row, (tokens, n) in enumerate(
                zip(fgrams.tokens.tolist(), fgrams.lengths.tolist(), strict=True)
            )
        }

    def match(self, input_ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Row ids (num_tokens,) of the longest f-gram ending at each input id (num_tokens,); -1 is none."""
        ids = input_ids.tolist()
        rows = np.full(len(ids), -1, dtype=np.int64)
        for end in range(2, len(ids) + 1):
            for n in range(min(self._max_n, end), 1, -1):
                row = self._row_ids.get(tuple(ids[end - n : end]))
                if row is not None:
                    rows[end - 1] = row
                    break
        return rows

    def embed(self, decoder: Decoder, input_ids: NDArray[np.integer]) -> tuple[Tensor, float]:
        """Embeddings (batch, seq, dim) of input_ids (batch, seq), and the share of positions matched.

        Differentiable in the f-gram model's weights. Each distinct f-gram is embedded once.
        """
        row_ids = torch.from_numpy(np.stack([self.match(sequence) for sequence in input_ids])).flatten()
        matched = (row_ids >= 0).nonzero().squeeze(1)
        embeddings = decoder.embed(torch.from_numpy(input_ids.astype(np.int64)))
        if not len(matched):
            return embeddings, 0.0
        distinct, inverse = torch.unique(row_ids[matched], return_inverse=True)
        rows = self._model(self._tokens[distinct], self._lengths[distinct])[inverse]
        flat = embeddings.flatten(0, 1).index_copy(0, matched, rows.to(embeddings.dtype))
        return flat.view_as(embeddings), len(matched) / len(row_ids)
