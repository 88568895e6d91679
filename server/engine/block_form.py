"""In which form the state of a block of tokens is kept: its keys and values, or the inputs of its layers.

Keys and values can be computed anew from each layer's hidden states by two projections (HCache, arXiv
2410.05004), a fraction of a forward pass. They are smaller where a token's 2 e values of keys and values in a
layer (e = num_kv_heads * head_dim) are more than its d of hidden state: with multi-head attention, not with
grouped queries. But the two projections have 2 d e multiplications for 4 (2 e - d) bytes less to read, and a
processor that multiplies a token's in the time in which a disk gives those bytes is an accelerator: on a CPU
it does not pay (docs/recycled.md, `scone bench recycled`), so the form is not built.
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
        """Always `kv`; see `reason`."""
        return "kv"

    @property
    def reason(self) -> str:
        """The arithmetic, in a sentence."""
        sizes = f"a token takes {self.kv_bytes:,} bytes as keys and values, {self.hidden_bytes:,} as states"
        if self.hidden_bytes >= self.kv_bytes:
            return f"{sizes}: keys and values are kept"
        return (
            f"{sizes}, but to compute keys and values from states takes longer than to read the difference: "
            "keys and values are kept"
        )
