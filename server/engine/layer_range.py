"""Which layers of the decoder a sequence goes through."""

from __future__ import annotations

from typing import NamedTuple


class LayerRange(NamedTuple):
    """Layers [first, end).

    Attributes:
        first: 0 begins with embeddings; otherwise the input is the states after so many layers.
        end: None is all layers and the final norm.
    """

    first: int = 0
    end: int | None = None


ALL_LAYERS = LayerRange()
