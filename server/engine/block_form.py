"""In which form the state of a block of tokens is kept, and what a form has to do.

Keys and values can be computed anew from the inputs of the layers by two projections each (HCache, arXiv
2410.05004), a fraction of a forward pass. Each form names its blocks apart from those of others, so that
blocks of several forms lie side by side in a store, and a chain of blocks may be a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from scone.server.engine import scheduler

FormName = Literal["kv", "hidden"]


class Landing(Protocol):
    """Where the bytes of one block are read to. All but writing to `out` is the engine thread's.

    Attributes:
        out: (rows, row_bytes) uint8, each row contiguous: the block's bytes go here, on whatever thread.
    """

    out: NDArray[np.uint8]

    def release(self) -> None:
        """Nothing is written to `out` any more; to be called once, after the form's `lay` if at all."""


class Held(Protocol):
    """The state of one block, which nobody changes before `release`."""

    def payload(self) -> NDArray[np.uint8]:
        """Its bytes, on the writer's thread. Raises ValueError: they hold values that are not finite."""

    def release(self) -> None:
        """On the engine's thread, once."""


class BlockForm(Protocol):
    """One form, for one engine; for its thread.

    Attributes:
        block_bytes: of one block.
        work_seconds: what it takes to make keys and values of one block that was read, as measured.
        laid_beside_others, laying_share: what sequences that run may be delayed by between two steps: so
            many blocks, or this share of a step.
    """

    name: FormName
    block_bytes: int
    work_seconds: float
    laid_beside_others: int
    laying_share: float

    @property
    def staging_bytes(self) -> int:
        """Host memory beside the KV cache."""

    @property
    def num_landings(self) -> int:
        """Those in use."""

    def key(self, block_hash: bytes) -> bytes:
        """What the block with this hash is stored under in this form."""

    def reserve(self, block_id: int, first_position: int) -> Landing | None:
        """A place for what is to become block `block_id`, whose first token is at `first_position`.

        None: too many are under way; come back later.
        """

    def lay(self, landings: Sequence[Landing]) -> None:
        """Fills their blocks of the KV cache from what was read."""

    def expect(self, seq: scheduler.Sequence, begin: int, end: int) -> None:
        """The next step computes (parts of) blocks [begin, end) of a sequence, which are to be held then."""

    def hold(self, seq: scheduler.Sequence, block: int) -> Held | None:
        """The state of a sequence's block that is computed; None: it is not to be had in this form."""

    def forget(self, seq: scheduler.Sequence, end: int | None = None) -> None:
        """No more of the sequence's expected blocks (those before `end`) will be held."""
