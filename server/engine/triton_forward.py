"""The forward pass on CUDA: torch's products, and between them Triton (kernels/triton_*.py).

Ten launches a layer where plain torch needs some fifty. Its oracle is `TorchForward`, which runs on CUDA too
(`--backend torch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from scone.kernels.paged_attention import PagedBatch
from scone.kernels.triton_attention import paged_attention
from scone.kernels.triton_layer import add_norm, gated_activation, rotate_and_store
from scone.model_store.decoder import Block, Decoder, Embedding


@dataclass(frozen=True, slots=True)
class _Map:
    """Some linear maps of one input, as one product."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[nn.Linear]) -> _Map:
        """Their weights become views of the new one, so that no second copy is held."""
        weights: list[Tensor] = [part.weight for part in parts]
        weight = torch.cat(weights)
        begin = 0
        for part in parts:
            end = begin + len(part.weight)
            part.weight = nn.Parameter(weight[begin:end], requires_grad=False)
            begin = end
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        assert len(biases) in (0, len(parts)), "either all of these maps have a bias or none has"
        return cls(weight, torch.cat(biases) if biases else None)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Layer:
    def __init__(self, block: Block) -> None:
        self.attention_norm, self.ffn_norm = block.attention_norm.weight, block.ffn_norm.weight
        self.qkv = _Map.of([block.q_proj, block.k_proj, block.v_proj])
        self.o = _Map.of([block.o_proj])
        self.gate_up = _Map.of([block.gate_proj, block.up_proj])
        self.down = _Map.of([block.down_proj])
        has_norms = block.q_norm is not None and block.k_norm is not None
        self.norms = (block.q_norm.weight, block.k_norm.weight) if has_norms else None  # type: ignore[union-attr]


class TritonForward:
    """A decoder with attention over a paged cache; as `TorchForward`, and for batches that have tiles.

    Attributes:
        arithmetic: names all that its results depend on, up to rounding, besides weights and inputs.
    """

    def __init__(self, decoder: Decoder, max_model_len: int) -> None:
        config = decoder.config
        device = decoder.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.arithmetic = f"triton, torch {torch.__version__} on {name}"
        self._config = config
        self._embed_tokens, self._head = decoder.embed_tokens, decoder.lm_head
        self._layers = [_Layer(block) for block in decoder.layers]  # type: ignore[arg-type]
        self._norm = decoder.norm.weight
        cos, sin = decoder.rope(torch.arange(max_model_len, device=device))
        half = config.head_dim // 2
        self._cos, self._sin = (x[:, 0, :half].contiguous() for x in (cos, sin))

    def embed(self, input_ids: Tensor) -> Tensor:
        """(n,) -> (n, dim)."""
        embeddings: Tensor = self._embed_tokens(input_ids)
        return embeddings

    def embed_into(self, input_ids: Tensor, out: Tensor) -> None:
        """`embed`, written to out (n, dim)."""
        if isinstance(self._embed_tokens, Embedding):
            torch.index_select(self._embed_tokens.weight, 0, input_ids, out=out)
        else:
            out.copy_(self.embed(input_ids))

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
        """As `TorchForward.forward`; the embeddings' memory is used.

        Positions and slots may go on after those of the tokens, as in a step that was padded.
        """
        config = self._config
        num_tokens, num_heads = len(embeddings), config.num_heads
        hidden, delta = embeddings, None
        attended = torch.empty(
            num_tokens, num_heads, config.head_dim, dtype=hidden.dtype, device=hidden.device
        )
        for layer_id, layer in enumerate(self._layers[first_layer:num_layers], first_layer):
            x = add_norm(hidden, delta, layer.attention_norm, config.norm_eps)
            qkv = layer.qkv(x).view(num_tokens, -1, config.head_dim)
            keys, values = k_cache[layer_id], v_cache[layer_id]
            rotate_and_store(
                qkv,
                positions,
                batch.slots,
                self._cos,
                self._sin,
                layer.norms,
                config.norm_eps,
                keys,
                values,
            )
            paged_attention(qkv[:, :num_heads], positions, batch, keys, values, attended)
            delta = layer.o(attended.view(num_tokens, -1))
            x = add_norm(hidden, delta, layer.ffn_norm, config.norm_eps)
            delta = layer.down(gated_activation(layer.gate_up(x)))
        if num_layers not in (None, config.num_layers):
            return hidden if delta is None else hidden + delta
        return add_norm(hidden, delta, self._norm, config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab_size) float32."""
        logits: Tensor = self._head(hidden)
        return logits.float()

    def best_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) with the highest logits, and these (n,)."""
        values, token_ids = self.logits(hidden).max(dim=-1)
        return token_ids, values

    def logits_of(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """(n, len(token_ids)) float32; no other row of the head is read."""
        ids = torch.tensor(token_ids, device=hidden.device)
        return linear(hidden, self._head.weight.index_select(0, ids)).float()
