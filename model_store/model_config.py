"""The shape of a Llama-family decoder, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder's shape. Field names follow the field's usage, not any one file format.

    Attributes:
        dim: width of the residual stream and of every embedding row.
        head_dim: width of one head; need not be dim / num_heads.
        rope_scaling: Hugging Face's `rope_scaling` object (`linear`, `llama3`, `yarn`), or None.
        max_position: longest context the weights were made for, in tokens.
        byte_positions: bytes of a token that its Kronecker embedding sees; None: an ordinary token table.
        tied_head: the output head is the token embedding itself.
        attention_bias: q, k and v projections carry a bias (Qwen2).
        output_bias: the attention output projection carries one (Llama with `attention_bias`).
        mlp_bias: the three feed-forward projections carry one.
        qk_norm: RMS norm over each head of q and k before rotation (Qwen3).
    """

    architecture: str
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: Mapping[str, Any] | None = None
    byte_positions: int | None = None
    tied_head: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, wanted a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.byte_positions is not None and self.byte_positions < 1:
            raise ValueError(f"byte_positions is {self.byte_positions}, wanted at least 1")
        if self.byte_positions is not None and self.tied_head:
            raise ValueError("tied_head is true, wanted false: Kronecker embeddings are no output head")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, wanted an even number (rotary pairs)")

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values, as numbers, that one token adds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
