"""States after some layer of whole texts, kept for others that share the layers below.

The method of Embedding Recycling (arXiv 2207.04993): what the lower layers make of a text is kept, and a
later question about the same text runs only the layers above. Here the layer is the one that a request asks
its vectors of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.server.engine.recycled_results import named


def states_name(root: bytes, layer: int, token_ids: Sequence[int]) -> bytes:
    """What the states (num_tokens, dim) of a text after so many layers are stored under."""
    return named(root, "states", str(layer), token_ids)


class LayerStates:
    """States of one text, taken chunk by chunk; after preemption they begin at 0 again."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def add(self, start: int, hidden: Tensor) -> None:
        """Of the positions from `start` on (num_tokens, dim); copied, since the model reuses their memory."""
        if start == 0:
            self._chunks.clear()
        self._chunks.append(hidden.to("cpu", copy=True))

    def payload(self) -> NDArray[np.uint8]:
        """All of them, as bytes."""
        return torch.cat(self._chunks).view(torch.uint8).reshape(-1).numpy()


def unpack_states(payload: NDArray[np.uint8], num_tokens: int, dtype: torch.dtype) -> Tensor:
    """(num_tokens, dim), from what `LayerStates.payload` gave."""
    # Copied: the store's array is shared, and torch takes only memory that may be written.
    return torch.from_numpy(payload.copy()).view(dtype).reshape(num_tokens, -1)
