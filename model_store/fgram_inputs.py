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
from scone.model_store.set_matcher import SetMatcher


class FGramInputs:
    """Embeds input ids with f-grams of one set through one f-gram model."""

    def __init__(self, fgrams: FGramSet, model: FGramModel) -> None:
        self._model = model
        self._tokens = torch.from_numpy(fgrams.tokens.astype(np.int64))
        self._lengths = torch.from_numpy(fgrams.lengths.astype(np.int64))
        self._matcher = SetMatcher(fgrams)

    def embed(self, decoder: Decoder, input_ids: NDArray[np.integer]) -> tuple[Tensor, float]:
        """Embeddings (batch, seq, dim) of input_ids (batch, seq), and the share of positions matched.

        Differentiable in the f-gram model's weights. Each distinct f-gram is embedded once.
        """
        row_ids = torch.from_numpy(self._matcher.match_all(input_ids)).flatten()
        matched = (row_ids >= 0).nonzero().squeeze(1)
        embeddings = decoder.embed(torch.from_numpy(input_ids.astype(np.int64)))
        if not len(matched):
            return embeddings, 0.0
        distinct, inverse = torch.unique(row_ids[matched], return_inverse=True)
        rows = self._model(self._tokens[distinct], self._lengths[distinct])[inverse]
        flat = embeddings.flatten(0, 1).index_copy(0, matched, rows.to(embeddings.dtype))
        return flat.view_as(embeddings), len(matched) / len(row_ids)
