"""In which form the state of a block of tokens is kept: its keys and values, or the inputs of its layers.

Keys and values can be computed anew from each layer's hidden states by two projections (HCache, arXiv
2410.05004), a fraction of a forward pass. That is worth it only where hidden states are smaller: a token has
2 e values of keys and values in a layer (e = num_kv_heads * head_dim) and d of hidden state, so only for
e > d / 2: multi-head attention, not grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from scone.model_store.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class BlockForm:
    """The choice for one model.

    Attributes:
        kv_bytes, hidden_bytes: of one token in all layers, in either form.
    """

    kv_bytes: int
    hidden_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, value_bytes: int) -> BlockForm:
        """For values of `value_bytes` each."""
        kv_dim = config.num_kv_heads * config.head_dim
        per_layer = value_bytes * config.num_layers
        return cls(kv_bytes=2 * kv_dim * per_layer, hidden_bytes=config.dim * per_layer)

    @property
    def chosen(self) -> str:
        """Always `kv`: the engine does not keep the inputs of its layers, see `reason`."""
        return "kv"

    @property
    def reason(self) -> str:
        """The arithmetic, in a sentence."""
        sizes = f"a token takes {self.kv_bytes:,} bytes as keys and values, {self.hidden_bytes:,} as states"
        if self.hidden_bytes >= self.kv_bytes:
            return f"{sizes}: keys and values are kept"
        return (
            f"{sizes}, but the engine does not hold the states of all layers, which would take memory beside "
            "its cache: keys and values are kept"
        )
