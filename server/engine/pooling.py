"""From the hidden states of a sequence, chunk by chunk, to the one vector that was asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.server.sequence import PoolingParams


class Pooler:
    """Takes the chunks of one sequence in order; after preemption they begin at 0 again."""

    def __init__(self, params: PoolingParams) -> None:
        self.params = params
        self._num_tokens = 0
        self._state: NDArray[np.float64] = np.zeros(0)

    def add(self, start: int, hidden: Tensor) -> None:
        """Hidden states (num_tokens, dim) of the positions from `start` on."""
        rows = hidden.double().cpu().numpy()
        if self.params.kind == "last":
            self._state = rows[-1].copy()
            return
        if start == 0:
            self._num_tokens, self._state = 0, np.zeros(rows.shape[1])
        assert start == self._num_tokens, "a mean needs every position"
        # Along the first axis numpy adds row after row: the same bits however the prompt is cut into chunks.
        self._state = np.add.reduce(np.concatenate((self._state[None], rows)), axis=0)
        self._num_tokens += len(rows)

    def result(self) -> NDArray[np.float32]:
        """(dim,)."""
        mean = self._state / self._num_tokens if self.params.kind == "mean" else self._state
        return mean.astype(np.float32)
