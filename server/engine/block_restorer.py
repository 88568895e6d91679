"""Blocks of the KV cache that are fetched from a store instead of computed.

A worker thread reads each block into a slot of a staging ring; between two steps the engine's thread lays
what has come into the KV cache. No step waits for a read: a sequence whose blocks are under way is RESTORING
to the scheduler. A block that cannot be read, or does not come in time, ends its sequence's restore there:
the rest is computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache.device import Device
from scone.cache.recycled_store import RecycledStore
from scone.cache.staging_ring import Slot, StagingRing
from scone.server.engine import scheduler
from scone.server.engine.model_runner import BlockMemory
from scone.server.engine.scheduler import SchedulerState

STAGING_BYTES = 32 << 20
"""What blocks under way may take: some hundreds of tokens of a small model, about a step's worth."""

MOST_SLOTS = 64
NUM_WORKERS = 2

LAID_BESIDE_OTHERS = 8
LAYING_SHARE = 0.05
"""What others may be delayed by: so many blocks (less than a millisecond), or this share of their step."""

Post = Callable[[Callable[[], None]], None]
"""Has something run on the engine's thread, soon; may be called from any thread."""


@dataclass(eq=False, slots=True)
class _Restore:
    """One sequence's blocks from number `first` on, on their way.

    Attributes:
        num_wanted: blocks to fetch; cut back to those before the first one that cannot be had.
        num_asked: reads issued.
        laid: which are in the KV cache, counted from `first`.
        patience: it is given up when the store has delivered nothing, to anybody, for so many seconds.
        is_over: what still arrives is thrown away.
    """

    seq: scheduler.Sequence
    first: int
    num_wanted: int
    began: float
    patience: float
    num_asked: int = 0
    laid: set[int] = field(default_factory=set)
    is_over: bool = False

    def num_laid(self) -> int:
        """From the first on, without a gap."""
        return next((i for i in range(self.num_wanted) if i not in self.laid), self.num_wanted)


class BlockRestorer:
    """Restores blocks for one engine; for its thread."""

    def __init__(
        self,
        store: RecycledStore,
        memory: BlockMemory,
        device: Device,
        state: SchedulerState,
        post: Post,
        on_restored: Callable[[scheduler.Sequence, int, float, bool], None],
    ) -> None:
        """`on_restored` is told of each restore that ends: sequence, blocks, seconds, whether in time."""
        self._store, self._memory, self._device, self._state = store, memory, device, state
        self._post, self._on_restored = post, on_restored
        num_slots = min(max(3, STAGING_BYTES // memory.block_bytes), MOST_SLOTS)
        self.ring = StagingRing(device, 1, memory.block_bytes, torch.uint8, num_slots)
        self._readers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="scone-blocks")
        self._restores: dict[scheduler.Sequence, _Restore] = {}
        self._arrived: deque[tuple[_Restore, int, Slot]] = deque()
        self._num_reading = 0
        self._delivered_at = 0.0

    def close(self) -> None:
        """Waits for reads under way; nothing may be asked for afterwards."""
        self._readers.shutdown(cancel_futures=True)

    @property
    def is_busy(self) -> bool:
        """Whether reads are under way, for whomever."""
        return bool(self._restores) or self._num_reading > 0

    def begin(self, seq: scheduler.Sequence, patience_seconds: float) -> None:
        """Fetches the blocks that a restoring sequence waits for."""
        now = time.monotonic()
        first = seq.num_computed_tokens // self._state.pool.block_size
        self._restores[seq] = _Restore(seq, first, len(seq.block_ids) - first, now, patience_seconds)
        self._ask()

    def cancel(self, seq: scheduler.Sequence) -> None:
        """The sequence was finished or preempted."""
        restore = self._restores.pop(seq, None)
        if restore is not None:
            restore.is_over = True

    def poll(self, step_seconds: float) -> None:
        """Lays what has arrived, ends what is complete or overdue, asks for what there is room for.

        Args:
            step_seconds: what a step of the sequences that run takes.
        """
        if not self._restores and not self._arrived:
            return
        some_run = len(self._state.running) > len(self._restores)
        began, num_laid = time.monotonic(), 0
        while self._arrived:
            is_late = time.monotonic() - began > LAYING_SHARE * step_seconds
            if some_run and is_late and num_laid >= LAID_BESIDE_OTHERS:
                break
            self._lay(*self._arrived.popleft())
            num_laid += 1
        now = time.monotonic()
        for restore in list(self._restores.values()):
            num_laid = restore.num_laid()
            in_time = num_laid == restore.num_wanted
            if in_time or now - max(restore.began, self._delivered_at) > restore.patience:
                self.cancel(restore.seq)
                scheduler.end_restoring(self._state, restore.seq, num_laid)
                self._on_restored(restore.seq, num_laid, now - restore.began, in_time)
        self._ask()

    def _ask(self) -> None:
        """Issues reads, oldest restore first, while there are free slots."""
        size = self._state.pool.block_size
        for restore in self._restores.values():
            while restore.num_asked < restore.num_wanted:
                slot = self.ring.reserve(1, wait=False)
                if slot is None:
                    return
                index, seq = restore.num_asked, restore.seq
                block = restore.first + index
                ids = np.array(seq.token_ids[block * size : (block + 1) * size], np.int32)
                out = slot.host_rows.numpy()[0]
                restore.num_asked += 1
                self._num_reading += 1
                self._readers.submit(self._read, restore, index, slot, seq.block_hashes[block], ids, out)

    def _read(
        self,
        restore: _Restore,
        index: int,
        slot: Slot,
        key: bytes,
        ids: NDArray[np.int32],
        out: NDArray[np.uint8],
    ) -> None:
        """On a worker: reads one block into its slot."""
        is_there = False
        try:
            is_there = not restore.is_over and self._store.read("blocks", key, ids, out) is not None
        finally:
            self._post(partial(self._arrive, restore, index, slot, is_there))

    def _arrive(self, restore: _Restore, index: int, slot: Slot, is_there: bool) -> None:
        self._num_reading -= 1
        self._delivered_at = time.monotonic()
        if not is_there:
            restore.num_wanted = min(restore.num_wanted, index)
        if is_there and index < restore.num_wanted and not restore.is_over:
            self._arrived.append((restore, index, slot))
        else:
            self.ring.release(slot)

    def _lay(self, restore: _Restore, index: int, slot: Slot) -> None:
        """Copies a block from its slot to its place in the KV cache, on the compute stream."""
        try:
            if restore.is_over or index >= restore.num_wanted:
                return
            block_id = restore.seq.block_ids[restore.first + index]
            tag = np.array([block_id], np.int64)
            self.ring.commit(slot, tag, tag)
            staged, _ = self.ring.use(slot, tag)
            target = self._memory.block(block_id)
            self._device.launch(partial(target.copy_, staged.view(target.shape)))
            restore.laid.add(index)
        finally:
            self.ring.release(slot)
