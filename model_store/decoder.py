"""The Llama-family decoder in plain torch: Llama, Mistral, Qwen2, Qwen3, SmolLM2.

Knows nothing of caches, batches or tables: it turns embeddings into hidden states, and asks an `Attend`
for the attention of each layer. Training passes whole sequences with `CausalAttention`; the engine passes
flat tokens with an `Attend` over its paged cache. Everything acts on the last dimensions, so both fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scone.model_store.errors import CheckpointError
from scone.model_store.kronecker import KroneckerEmbedding
from scone.model_store.model_config import ModelConfig
from scone.model_store.rope import inverse_frequencies, rotate


class Attend(Protocol):
    """Attention of one layer over whatever context the caller keeps."""

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (..., num_heads, head_dim), k and v (..., num_kv_heads, head_dim), rotated; gives q's shape."""
        ...


class CausalAttention:
    """Causal attention within each row of a (batch, seq, ...) tensor; nothing is kept."""

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[-2] // k.shape[-2]
        k, v = (x.repeat_interleave(group, dim=-2).transpose(-3, -2) for x in (k, v))
        out = functional.scaled_dot_product_attention(q.transpose(-3, -2), k, v, is_causal=True)
        return out.transpose(-3, -2)


class Linear(nn.Linear):
    """torch's, but for a start without random numbers on the "meta" device: they cost 2 s of imports."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """torch's, with the same exception as `Linear`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Block(nn.Module):
    """One layer: attention and gated feed-forward, each behind its norm and beside the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.head_dim
        q_dim, kv_dim = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.head_dim = head_dim
        self.attention_norm = RMSNorm(dim, config.norm_eps)
        self.q_proj = Linear(dim, q_dim, bias=config.attention_bias)
        self.k_proj = Linear(dim, kv_dim, bias=config.attention_bias)
        self.v_proj = Linear(dim, kv_dim, bias=config.attention_bias)
        self.o_proj = Linear(q_dim, dim, bias=config.output_bias)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.ffn_norm = RMSNorm(dim, config.norm_eps)
        self.gate_proj = Linear(dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = Linear(dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, dim, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], layer_id: int, attend: Attend) -> Tensor:
        """hidden (..., dim) -> (..., dim); rope is `Decoder.rope(positions)`."""
        x = self.attention_norm(hidden)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = attend(layer_id, rotate(q, *rope), rotate(k, *rope), v)
        hidden = hidden + self.o_proj(attended.flatten(-2))
        x = self.ffn_norm(hidden)
        return hidden + cast(Tensor, self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm and head.

    The token embedding may be replaced row by row before `forward`: that is where f-gram rows go in.

    >>> decoder = Decoder(config)
    >>> hidden = decoder(decoder.embed(input_ids), positions, CausalAttention())
    >>> logits = decoder.logits(hidden[:, -1])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: Embedding | KroneckerEmbedding
        if config.byte_positions is None:
            self.embed_tokens = Embedding(config.vocab_size, config.dim)
        else:
            self.embed_tokens = KroneckerEmbedding(config.vocab_size, config.dim, config.byte_positions)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if isinstance(self.embed_tokens, Embedding) and config.tied_head:
            self.lm_head.weight = self.embed_tokens.weight
        with torch.device("cpu"):  # real values also while the weights are still on "meta"
            self._frequencies, self._rope_factor = inverse_frequencies(config)

    @classmethod
    def from_tensors(
        cls, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
    ) -> Decoder:
        """A decoder holding `tensors` (named as this module names them); raises CheckpointError."""
        with torch.device("meta"):
            decoder = cls(config)
        state = {name: tensor.to(dtype) for name, tensor in tensors}
        if config.tied_head:
            state.setdefault("lm_head.weight", state.get("embed_tokens.weight", torch.empty(0)))
        for name, parameter in decoder.state_dict().items():
            if name not in state:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint")
            if state[name].shape != parameter.shape:
                raise CheckpointError(
                    f"tensor {name} has shape {tuple(state[name].shape)}, wanted {tuple(parameter.shape)}"
                )
        extra = sorted(set(state) - set(decoder.state_dict()))
        if extra:
            raise CheckpointError(f"the checkpoint holds tensors this decoder has no place for: {extra[:5]}")
        decoder.load_state_dict(state, assign=True)
        if isinstance(decoder.embed_tokens, Embedding) and config.tied_head:
            decoder.lm_head.weight = decoder.embed_tokens.weight
        return decoder.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def precompute_embeddings(self) -> None:
        """Replaces Kronecker embeddings by the table that they come to; an ordinary table stays."""
        if isinstance(self.embed_tokens, KroneckerEmbedding):
            table = self.embed_tokens.dense()
            with torch.device("meta"):
                self.embed_tokens = Embedding(*table.shape)
            self.embed_tokens.weight = nn.Parameter(table, requires_grad=False)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (..., 1, head_dim) of positions (...,)."""
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions.float().unsqueeze(-1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
        cos, sin = angles.cos() * self._rope_factor, angles.sin() * self._rope_factor
        return cos.to(self.dtype), sin.to(self.dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings (..., dim) of input_ids (...,)."""
        return cast(Tensor, self.embed_tokens(input_ids))

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        attend: Attend,
        num_layers: int | None = None,
        first_layer: int = 0,
    ) -> Tensor:
        """Hidden states (..., dim) after the final norm; positions (...,) are absolute.

        Stops after `num_layers`, before the final norm, if that is less than all. With `first_layer`,
        `embeddings` are the states after so many layers, and only the layers from there on are run.
        """
        rope = self.rope(positions)
        hidden = embeddings
        for layer_id, block in enumerate(self.layers[first_layer:num_layers], first_layer):
            hidden = block(hidden, rope, layer_id, attend)
        if num_layers not in (None, self.config.num_layers):
            return hidden
        return cast(Tensor, self.norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities (..., vocab_size) of the next token."""
        return cast(Tensor, self.lm_head(hidden))
