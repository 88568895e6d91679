"""The tensors of the engine: the KV cache, one step's inputs, the forward pass, the head.

Knows neither requests nor sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from scone.kernels.paged_attention import PagedBatch, paged_attention_reference, write_kv
from scone.model_store.decoder import Decoder
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.scheduler import Chunk


class PagedAttend:
    """`Attend` over the paged cache for one step's batch."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float) -> None:
        self._k_cache, self._v_cache = k_cache, v_cache
        self._batch = batch
        self._scale = scale

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = self._k_cache[layer_id], self._v_cache[layer_id]
        write_kv(k, v, k_cache, v_cache, self._batch.slots)
        return paged_attention_reference(q, k_cache, v_cache, self._batch, self._scale)


class ModelRunner:
    """A decoder and its KV cache.

    Attributes:
        num_blocks: blocks that `kv_cache_bytes` holds, at most what `max_num_seqs` full sequences need.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        self.decoder = decoder
        self.device = decoder.embed_tokens.weight.device
        self.block_size = config.block_size
        shape = decoder.config
        self.vocab_size = shape.vocab_size
        block_bytes = shape.kv_bytes_per_token // 4 * decoder.dtype.itemsize * config.block_size
        most = config.max_num_seqs * -(-config.max_model_len // config.block_size)
        self.num_blocks = min(config.kv_cache_bytes // block_bytes, most)
        cache_shape = (
            shape.num_layers,
            self.num_blocks,
            shape.num_kv_heads,
            config.block_size,
            shape.head_dim,
        )
        # Zeroed, since masked keys are multiplied by zero and garbage could be NaN.
        self._k_cache = torch.zeros(cache_shape, dtype=decoder.dtype, device=self.device)
        self._v_cache = torch.zeros_like(self._k_cache)
        self._scale = shape.head_dim**-0.5

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Token embeddings (num_tokens, dim) of the chunks, one after the other."""
        input_ids = [t for c in chunks for t in c.seq.token_ids[c.start : c.start + c.num_tokens]]
        return self.decoder.embed(torch.tensor(input_ids, device=self.device))

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor) -> Tensor:
        """Hidden states (num_tokens, dim); stores the chunks' keys and values."""
        positions = [p for c in chunks for p in range(c.start, c.start + c.num_tokens)]
        attend = PagedAttend(self._k_cache, self._v_cache, self._paged_batch(chunks), self._scale)
        return cast(Tensor, self.decoder(embeddings, torch.tensor(positions, device=self.device), attend))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32."""
        return self.decoder.logits(hidden).float()

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """(n, vocab_size) float32; only the head rows of `token_ids` are computed, the rest is -inf."""
        head = self.decoder.lm_head
        ids = torch.tensor(token_ids, device=self.device)
        logits = torch.full((len(hidden), head.weight.shape[0]), -torch.inf, device=self.device)
        logits[:, ids] = torch.nn.functional.linear(hidden, head.weight[ids]).float()
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, target) in all layers."""
        if pairs:
            sources, targets = (list(ids) for ids in zip(*pairs, strict=True))
            self._k_cache[:, targets] = self._k_cache[:, sources]
            self._v_cache[:, targets] = self._v_cache[:, sources]

    def _paged_batch(self, chunks: Sequence[Chunk]) -> PagedBatch:
        size = self.block_size
        width = max(len(c.seq.block_ids) for c in chunks)
        tables = [c.seq.block_ids + [0] * (width - len(c.seq.block_ids)) for c in chunks]
        slots = [
            c.seq.block_ids[p // size] * size + p % size
            for c in chunks
            for p in range(c.start, c.start + c.num_tokens)
        ]
        starts = list(accumulate((c.num_tokens for c in chunks), initial=0))
        contexts = [c.start + c.num_tokens for c in chunks]
        return PagedBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=self.device),
            slots=torch.tensor(slots, device=self.device),
        )
