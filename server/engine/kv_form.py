"""Blocks kept as keys and values: the bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from scone.cache.device import Device, Stream
from scone.server.engine import scheduler
from scone.server.engine.block_form import FormName, Held, Landing
from scone.server.engine.block_landing import KvLanding, open_landings
from scone.server.engine.finite import is_finite
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.model_runner import BlockMemory

MOST_HELD = 0.25
"""Share of the pool that may be held for the writer; beyond it, blocks are dropped."""


class KvForm:
    """See `BlockForm`."""

    name: FormName = "kv"
    work_seconds = 0.0
    laid_beside_others = 8  # less than a millisecond
    laying_share = 0.05

    def __init__(self, memory: BlockMemory, device: Device, pool: BlockPool) -> None:
        self.block_bytes = memory.block_bytes
        self._memory, self._device, self._pool = memory, device, pool
        self._landings = open_landings(memory, device, pool)
        self._computed = device.event()
        self._num_held = 0

    @property
    def staging_bytes(self) -> int:
        return self._landings.num_bytes

    @property
    def num_landings(self) -> int:
        return self._landings.num_in_use

    def key(self, block_hash: bytes) -> bytes:
        return block_hash

    def reserve(self, block_id: int, first_position: int) -> Landing | None:
        return self._landings.reserve(block_id)

    def lay(self, landings: Sequence[Landing]) -> None:
        for landing in landings:
            cast(KvLanding, landing).lay()

    def expect(self, seq: scheduler.Sequence, begin: int, end: int) -> None:
        pass

    def hold(self, seq: scheduler.Sequence, block: int) -> Held | None:
        """The block itself, while a reference keeps it from being reused."""
        if self._num_held >= MOST_HELD * self._pool.num_blocks:
            return None
        self._device.record(self._computed, Stream.COMPUTE)
        self._num_held += 1
        self._pool.share(seq.block_ids[block])
        return _HeldBlock(self, seq.block_ids[block])

    def forget(self, seq: scheduler.Sequence, end: int | None = None) -> None:
        pass

    def payload(self, block_id: int) -> NDArray[np.uint8]:
        """See `Held`."""
        copy = self._device.copy_to_host(self._memory.block(block_id), self._computed).numpy()
        if not is_finite(copy, self._memory.kv_dtype):
            raise ValueError(f"block {block_id} holds values that are not finite: it is not kept")
        return copy

    def release(self, block_id: int) -> None:
        """See `Held`."""
        self._num_held -= 1
        self._pool.release([block_id])


class _HeldBlock:
    def __init__(self, form: KvForm, block_id: int) -> None:
        self._form, self._block_id = form, block_id

    def payload(self) -> NDArray[np.uint8]:
        return self._form.payload(self._block_id)

    def release(self) -> None:
        self._form.release(self._block_id)
