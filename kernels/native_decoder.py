"""A Llama-family decoder as one native call a step, over packed weights and a paged cache.

Native (native/decoder.cpp, native/decoder_pass.hpp). The oracle is `scone.model_store.decoder.Decoder` with
paged attention in torch, on the same rounded weights. Every element of the result is computed in an order
that depends on its own sequence alone, so that a token's hidden state is the same bit for bit in any batch
and chunking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.packed_linear import PackedLinear, Workspace
from scone.kernels.paged_attention import PagedBatch

ATTENTION_SPAN: int = 0 if native is None else native.ATTENTION_SPAN
"""Tokens of a context that attention takes together: sums of spans are added front to back."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: norms float32; maps q, k, v, o, gate, up, down."""

    attention_norm: Tensor
    ffn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    maps: tuple[PackedLinear, ...]


class NativeDecoder:
    """All layers and the final norm; one caller at a time."""

    def __init__(
        self,
        workspace: Workspace,
        layers: list[LayerWeights],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        final_norm: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """cos and sin (positions, head_dim / 2): the rotation of each position that may occur."""
        assert native is not None, "needs the native extension"
        self._num_layers = len(layers)
        down = layers[0].maps[-1]
        self._native: Any = native.NativeDecoder(
            workspace.native,
            down.num_outputs,
            num_heads,
            num_kv_heads,
            head_dim,
            down.num_inputs,
            norm_eps,
            final_norm.float().contiguous(),
            cos.float().contiguous(),
            sin.float().contiguous(),
        )
        for layer in layers:
            self._native.add_layer(
                layer.attention_norm.float().contiguous(),
                layer.ffn_norm.float().contiguous(),
                None if layer.q_norm is None else layer.q_norm.float().contiguous(),
                None if layer.k_norm is None else layer.k_norm.float().contiguous(),
                [linear.native for linear in layer.maps],
            )

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
        """Turns embeddings (num_tokens, dim) float32 into hidden states, in place; stores keys and values.

        positions (num_tokens,) int32; caches (num_layers, num_blocks, num_kv_heads, block_size, head_dim)
        float32 or bfloat16, to which keys and values are rounded then, before any query meets them. A
        block's keys are stored the other way round, (head_dim, block_size): copy whole blocks only.
        Stops after `num_layers`, before the final norm, if that is less than all. With `first_layer`,
        `embeddings` are the states after so many layers, and only the layers from there on are run. Of tokens
        that are not wanted (`batch.num_wanted`) the last of them computes no more than keys and values. The
        inputs of layers go to `batch.states` on the way, where they are asked for.
        """
        self._native.forward(
            embeddings,
            positions,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            batch.num_wanted,
            k_cache,
            v_cache,
            first_layer,
            self._num_layers if num_layers is None else num_layers,
            None if batch.state_rows is None else batch.states,
            batch.state_rows,
        )
        return embeddings

    def restore(
        self,
        states: Tensor,
        slots: Tensor,
        block_ids: Tensor,
        first_positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        """Computes keys and values of whole blocks, bit for bit, from inputs of layers that `forward` kept.

        Of states (num_slots, num_layers, block_size, dim) float32 those in slots (n,) go to the blocks
        block_ids (n,), whose first tokens are at first_positions (n,); all int32.
        """
        self._native.restore(states, slots, block_ids, first_positions, k_cache, v_cache)
