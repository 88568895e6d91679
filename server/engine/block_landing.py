"""Where keys and values of a block are read to, and how they get from there into the KV cache.

On a CPU they are read into the cache itself; on other devices into a slot of a staging ring, from which the
device copies them. Knows nothing of who reads.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache.device import CpuDevice, Device
from scone.cache.staging_ring import Slot, StagingRing
from scone.server.engine.block_form import Landing
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.model_runner import BlockMemory

UNDER_WAY_BYTES = 32 << 20
"""What blocks under way may take: some hundreds of tokens of a small model, about a step's worth."""

MOST_UNDER_WAY = 64

MOST_HELD = 0.25
"""Share of the KV cache that may be held for reads into it."""


class KvLanding(Landing, Protocol):
    """Of one block."""

    def lay(self) -> None:
        """Puts what is in `out` in its place in the KV cache."""


class Landings(Protocol):
    """As many as may be under way at a time."""

    @property
    def num_bytes(self) -> int:
        """Host memory beside the KV cache."""

    @property
    def num_in_use(self) -> int: ...

    def reserve(self, block_id: int) -> KvLanding | None:
        """A place for a block that nobody reads; None if too many are under way: come back later."""


def open_landings(memory: BlockMemory, device: Device, pool: BlockPool) -> Landings:
    """Those that fit the device."""
    most = min(max(3, UNDER_WAY_BYTES // memory.block_bytes), MOST_UNDER_WAY)
    if isinstance(device, CpuDevice):
        return _DirectLandings(memory, pool, min(most, max(1, int(MOST_HELD * pool.num_blocks))))
    return _StagedLandings(memory, device, most)


class _DirectLandings:
    """In the cache itself: what is read there is the block, once its reader calls it sound."""

    num_bytes = 0

    def __init__(self, memory: BlockMemory, pool: BlockPool, most: int) -> None:
        self.memory, self.pool, self._most = memory, pool, most
        self.num_in_use = 0

    def reserve(self, block_id: int) -> _DirectLanding | None:
        if self.num_in_use == self._most:
            return None
        self.num_in_use += 1
        return _DirectLanding(self, block_id)


class _DirectLanding:
    def __init__(self, landings: _DirectLandings, block_id: int) -> None:
        self._landings, self._block_id = landings, block_id
        # Held: its sequence may end while the block is being written, and then it must not be another's.
        landings.pool.share(block_id)
        block = landings.memory.block(block_id)
        self.out: NDArray[np.uint8] = block.view(block.shape[0] * block.shape[1], -1).numpy()

    def lay(self) -> None:
        pass

    def release(self) -> None:
        self._landings.num_in_use -= 1
        self._landings.pool.release([self._block_id])


class _StagedLandings:
    """In the slots of a ring."""

    def __init__(self, memory: BlockMemory, device: Device, most: int) -> None:
        self.memory, self.device = memory, device
        self.ring = StagingRing(device, 1, memory.block_bytes, torch.uint8, most)

    @property
    def num_bytes(self) -> int:
        return self.ring.num_bytes

    @property
    def num_in_use(self) -> int:
        return self.ring.num_in_use

    def reserve(self, block_id: int) -> _StagedLanding | None:
        slot = self.ring.reserve(1, wait=False)
        return None if slot is None else _StagedLanding(self, slot, block_id)


class _StagedLanding:
    def __init__(self, landings: _StagedLandings, slot: Slot, block_id: int) -> None:
        self._landings, self._slot, self._block_id = landings, slot, block_id
        self.out: NDArray[np.uint8] = slot.host_rows.numpy()

    def lay(self) -> None:
        """By a copy on the compute stream."""
        ring, device, tag = self._landings.ring, self._landings.device, np.array([self._block_id], np.int64)
        ring.commit(self._slot, tag, tag)
        staged, _ = ring.use(self._slot, tag)
        target = self._landings.memory.block(self._block_id)
        device.launch(partial(target.copy_, staged.view(target.shape)))

    def release(self) -> None:
        self._landings.ring.release(self._slot)
