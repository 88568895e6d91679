"""The forward pass on a CPU: a decoder's weights packed, all layers in one native call."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from scone.kernels.native_decoder import LayerWeights, NativeDecoder
from scone.kernels.packed_linear import PackedLinear, WeightKind, Workspace
from scone.kernels.paged_attention import PagedBatch
from scone.model_store.decoder import Block, Decoder
from scone.server.engine.engine_config import Quantization

logger = logging.getLogger(__name__)

NUM_SAMPLED_ROWS = 32
"""Rows of a weight that are tried when its format is to be found out."""


class NativeForward:
    """Keeps nothing of the decoder but its embedding and head, so that the rest can be freed.

    Attributes:
        kinds: format of each layer's q, k, v, o, gate, up and down maps, layer after layer.
        arithmetic: names all that the bits of its results depend on besides weights and inputs.
    """

    def __init__(
        self, decoder: Decoder, quantization: Quantization, num_threads: int, max_model_len: int
    ) -> None:
        config = decoder.config
        with ThreadPoolExecutor(num_threads) as pool:
            layers = list(pool.map(partial(_pack, quantization=quantization), decoder.layers))
        # The head decides among all tokens at once: 4 bits would cost more quality than they save time.
        head_kind = _kind_of([decoder.lm_head], "int8" if quantization == "int4" else quantization)
        self._workspace = Workspace(num_threads)
        self._embed_tokens = decoder.embed_tokens
        self._head_weight = decoder.lm_head.weight
        self._head = PackedLinear(decoder.lm_head.weight, head_kind)
        cos, sin = (x[:, 0, : config.head_dim // 2] for x in decoder.rope(torch.arange(max_model_len)))
        self._decoder = NativeDecoder(
            self._workspace,
            layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            final_norm=decoder.norm.weight,
            cos=cos,
            sin=sin,
        )
        self.kinds = [linear.kind for layer in layers for linear in layer.maps]
        digest = hashlib.sha256(" ".join([*self.kinds, head_kind]).encode()).hexdigest()[:16]
        self.arithmetic = f"native {self._workspace.instruction_set}, maps {digest}"
        logger.info(
            "native %s kernels, %d thread(s); maps of the layers: %s; head: %s",
            self._workspace.instruction_set,
            num_threads,
            ", ".join(f"{number} {kind}" for kind, number in Counter(self.kinds).most_common()),
            head_kind,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """(n,) -> (n, dim) float32."""
        return self._embed_tokens(input_ids).float()  # type: ignore[no-any-return]

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
        """Hidden states (num_tokens, dim), in the memory of the embeddings; as `TorchForward.forward`."""
        return self._decoder.forward(embeddings, positions, batch, k_cache, v_cache, num_layers, first_layer)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32."""
        return self._head(self._workspace, hidden)

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """(n, len(token_ids)) float32; no other row of the head is read."""
        return torch.nn.functional.linear(hidden, self._head_weight[list(token_ids)].float())


def _pack(block: nn.Module, quantization: Quantization) -> LayerWeights:
    assert isinstance(block, Block)
    # Maps that read the same inputs share their kind, so that these are prepared once.
    groups = (
        [block.q_proj, block.k_proj, block.v_proj],
        [block.o_proj],
        [block.gate_proj, block.up_proj],
        [block.down_proj],
    )
    maps = []
    for group in groups:
        kind = _kind_of(group, quantization)
        maps += [PackedLinear(linear.weight, kind, linear.bias) for linear in group]
    return LayerWeights(
        attention_norm=block.attention_norm.weight,
        ffn_norm=block.ffn_norm.weight,
        q_norm=None if block.q_norm is None else block.q_norm.weight,
        k_norm=None if block.k_norm is None else block.k_norm.weight,
        maps=tuple(maps),
    )


def _kind_of(linears: Sequence[nn.Linear], quantization: Quantization) -> WeightKind:
    """The kind that a setting means for these maps."""
    if quantization == "none":
        return "f32"
    if quantization != "auto":
        return quantization
    kinds: tuple[WeightKind, ...] = ("int4", "int8")
    for kind in kinds:
        if all(_keeps(linear.weight, kind) for linear in linears):
            return kind
    return "f32"


def _keeps(weight: Tensor, kind: WeightKind) -> bool:
    """Whether rounding changes nothing; some rows tell, since values never rounded do not fit by chance."""
    sample = weight[:NUM_SAMPLED_ROWS].float()
    error = (PackedLinear(sample, kind).weight() - sample).abs().max()
    return bool(error <= 1e-6 * sample.abs().max())
