"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a main model: the usual way to tune one, beside f-grams.

Only for training: merged into the weights afterwards, an adaptation costs nothing at inference.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from scone.model_store.decoder import Block, Decoder, Linear

_SCALE = 2.0
"""Factor of the product of the two matrices: alpha / rank of the paper, with alpha twice the rank."""

_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A linear map that stays as it is, plus one of low rank that starts at zero."""

    def __init__(self, base: Linear, rank: int) -> None:
        super().__init__()
        self._base = [base]  # in a list, so that its weights are not registered as ours
        out_dim, in_dim = base.weight.shape
        self.down = nn.Parameter(torch.empty(rank, in_dim, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(out_dim, rank, device=base.weight.device))
        nn.init.normal_(self.down, std=in_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return cast(Tensor, self._base[0](x)) + _SCALE * low

    @torch.no_grad()
    def merged(self) -> Linear:
        """The base with the adaptation added to its weights."""
        base = self._base[0]
        base.weight += (_SCALE * self.up @ self.down).to(base.weight.dtype)
        return base


def add_lora(decoder: Decoder, rank: int) -> nn.ModuleList:
    """Adapts every linear map of every layer in place; gives the adaptations, which are what is trained."""
    adaptations = nn.ModuleList()
    for block in cast("list[Block]", decoder.layers):
        for name in _MAPS:
            adaptation = LoraLinear(getattr(block, name), rank)
            setattr(block, name, adaptation)
            adaptations.append(adaptation)
    return adaptations


def merge_lora(decoder: Decoder) -> None:
    """Adds every adaptation to the weights that it adapts, and takes it off."""
    for block in cast("list[Block]", decoder.layers):
        for name in _MAPS:
            part = getattr(block, name)
            if isinstance(part, LoraLinear):
                setattr(block, name, part.merged())
