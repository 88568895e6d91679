"""Adagrad for a matrix of which a step touches few rows: one sum of squares a row, no work on the others.

Source: Adagrad, Duchi et al., JMLR 12 (2011); one accumulator a row is how embedding tables of recommendation
models are trained (`EXACT_ROWWISE_ADAGRAD` of FBGEMM, arXiv 2101.05615).
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowAdagrad:
    """Moves rows of `values` in place. A row's first step has root-mean-square `learning_rate`."""

    def __init__(self, values: Tensor, learning_rate: float) -> None:
        self._values = values
        self._learning_rate = learning_rate
        self._sums = torch.zeros(len(values), device=values.device)

    @torch.no_grad()
    def step(self, ids: Tensor, gradients: Tensor, scale: float) -> None:
        """One step of the distinct rows `ids` (m,) along gradients (m, dim), with `scale` times the rate."""
        sums = self._sums[ids] + gradients.square().mean(1)
        self._sums[ids] = sums
        # a gradient of zeros divides by zero once: such rows stay where they are
        rates = torch.where(sums > 0, scale * self._learning_rate * sums.rsqrt(), 0.0)
        self._values[ids] -= (rates.unsqueeze(1) * gradients).to(self._values.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sums.copy_(state["sums"])
