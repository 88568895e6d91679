"""The forward pass in plain torch, on any device: the oracle of the native one and of Triton's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from scone.kernels.paged_attention import PagedBatch, paged_attention_reference, write_kv
from scone.model_store.decoder import Decoder


class TorchForward:
    """A decoder with attention over a paged cache.

    Attributes:
        arithmetic: names all that its results depend on, up to rounding, besides weights and inputs.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.arithmetic = f"torch {torch.__version__} on {decoder.embed_tokens.weight.device.type}"
        self._decoder = decoder
        self._scale = decoder.config.head_dim**-0.5

    def embed(self, input_ids: Tensor) -> Tensor:
        """(n,) -> (n, dim)."""
        return self._decoder.embed(input_ids)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        batch: PagedBatch,
        k_cache: Tensor,
        v_cache: Tensor,
        num_layers: int | None = None,
        first_layer: int = 0,
    ) -> Tensor:
        """Hidden states (num_tokens, dim), normalised unless `num_layers` is less than all.

        Of the layers from `first_layer` on, whose inputs `embeddings` then are.
        """

        def attend(layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            write_kv(k, v, k_cache[layer_id], v_cache[layer_id], batch.slots)
            return paged_attention_reference(q, k_cache[layer_id], v_cache[layer_id], batch, self._scale)

        return cast(Tensor, self._decoder(embeddings, positions, attend, num_layers, first_layer))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32."""
        return self._decoder.logits(hidden).float()

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) with the highest logits, and these (n,)."""
        values, token_ids = self.logits(hidden).max(dim=-1)
        return token_ids, values

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """(n, len(token_ids)) float32; no other row of the head is read."""
        return torch.nn.functional.linear(hidden, self._decoder.lm_head.weight[list(token_ids)]).float()
