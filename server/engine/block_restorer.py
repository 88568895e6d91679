"""Blocks of the KV cache that are fetched from a store instead of computed.

Worker threads read blocks, some at a time, to where their form has them land; between two steps the engine's
thread lays what has come into the KV cache. No step waits for a read: a sequence whose blocks are
under way is RESTORING to the scheduler. A block that cannot be read, or does not come in time, ends its
sequence's restore there: the rest is computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from scone.cache.recycled_store import RecycledStore
from scone.server.engine import scheduler
from scone.server.engine.block_form import BlockForm, Landing
from scone.server.engine.scheduler import SchedulerState

NUM_WORKERS = 2

READ_TOGETHER_BYTES = 4 << 20
"""What a worker asks the disk for at a time. While it copies its own, the other worker's are under way."""

Post = Callable[[Callable[[], None]], None]
"""Has something run on the engine's thread, soon; may be called from any thread."""


@dataclass(eq=False, slots=True)
class _Restore:
    """One sequence's blocks from number `first` on, on their way.

    Attributes:
        forms: of each block.
        num_wanted: blocks to fetch; cut back to those before the first one that cannot be had.
        num_asked: reads issued.
        laid: which are in the KV cache, counted from `first`.
        patience: it is given up when the store has delivered nothing, to anybody, for so many seconds.
        is_over: what still arrives is thrown away.
    """

    seq: scheduler.Sequence
    first: int
    forms: Sequence[BlockForm]
    num_wanted: int
    began: float
    patience: float
    num_asked: int = 0
    laid: set[int] = field(default_factory=set)
    is_over: bool = False

    def num_laid(self) -> int:
        """From the first on, without a gap."""
        return next((i for i in range(self.num_wanted) if i not in self.laid), self.num_wanted)


@dataclass(eq=False, slots=True)
class _Read:
    """One block of a restore, its number counted from the restore's first."""

    restore: _Restore
    index: int
    form: BlockForm
    landing: Landing
    key: bytes
    ids: NDArray[np.int32]
    is_there: bool = False


class BlockRestorer:
    """Restores blocks for one engine; for its thread."""

    def __init__(
        self,
        store: RecycledStore,
        state: SchedulerState,
        post: Post,
        on_restored: Callable[[scheduler.Sequence, int, float, bool], None],
    ) -> None:
        """`on_restored` is told of each restore that ends: sequence, blocks, seconds, whether in time."""
        self._store, self._state = store, state
        self._post, self._on_restored = post, on_restored
        self._readers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="scone-blocks")
        self._restores: dict[scheduler.Sequence, _Restore] = {}
        self._arrived: deque[_Read] = deque()
        self._num_reading = 0
        self._delivered_at = 0.0

    def close(self) -> None:
        """Waits for reads under way; nothing may be asked for afterwards."""
        self._readers.shutdown(cancel_futures=True)

    @property
    def is_busy(self) -> bool:
        """Whether reads are under way, for whomever."""
        return bool(self._restores) or self._num_reading > 0

    def begin(self, seq: scheduler.Sequence, forms: Sequence[BlockForm], patience_seconds: float) -> None:
        """Fetches the blocks that a restoring sequence waits for, each in its form."""
        first = seq.num_computed_tokens // self._state.pool.block_size
        assert len(forms) == len(seq.block_ids) - first
        now = time.monotonic()
        self._restores[seq] = _Restore(seq, first, forms, len(forms), now, patience_seconds)
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
            form = self._arrived[0].form
            spare = form.laying_share * step_seconds - (time.monotonic() - began)
            most = len(self._arrived)
            if some_run:
                most = min(most, max(form.laid_beside_others - num_laid, _num_laid_in(form, spare)))
            if most <= 0:
                break
            num_laid += self._lay(form, most)
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
        """Issues reads, oldest restore first, while there is room for what they bring."""
        for restore in self._restores.values():
            while restore.num_asked < restore.num_wanted:
                reads = self._next_reads(restore)
                if not reads:
                    return
                self._num_reading += len(reads)
                self._readers.submit(self._read, reads)

    def _next_reads(self, restore: _Restore) -> list[_Read]:
        """The restore's next blocks, as many as are to be read together and have room."""
        seq, size, reads = restore.seq, self._state.pool.block_size, list[_Read]()
        num_bytes = 0
        while restore.num_asked < restore.num_wanted:
            block, form = restore.first + restore.num_asked, restore.forms[restore.num_asked]
            num_bytes += form.block_bytes
            if reads and num_bytes > READ_TOGETHER_BYTES:
                break
            landing = form.reserve(seq.block_ids[block], block * size)
            if landing is None:
                break
            ids = np.array(seq.token_ids[block * size : (block + 1) * size], np.int32)
            key = form.key(seq.block_hashes[block])
            reads.append(_Read(restore, restore.num_asked, form, landing, key, ids))
            restore.num_asked += 1
        return reads

    def _read(self, reads: Sequence[_Read]) -> None:
        """On a worker: reads blocks of one restore to where they land."""
        try:
            if not reads[0].restore.is_over:
                self._store.announce("blocks", [read.key for read in reads])
            for read in reads:
                if read.restore.is_over:
                    break
                out = read.landing.out
                read.is_there = self._store.read("blocks", read.key, read.ids, out) is not None
                if not read.is_there:
                    out[:] = 0  # whatever lies there may be no numbers
                    break
        finally:
            self._post(partial(self._arrive, reads))

    def _arrive(self, reads: Sequence[_Read]) -> None:
        self._num_reading -= len(reads)
        self._delivered_at = time.monotonic()
        restore = reads[0].restore
        for read in reads:
            if not read.is_there:
                restore.num_wanted = min(restore.num_wanted, read.index)
        for read in reads:
            if read.index < restore.num_wanted and not restore.is_over:
                self._arrived.append(read)
            else:
                read.landing.release()

    def _lay(self, form: BlockForm, most: int) -> int:
        """Puts blocks of this form that have come first in their places in the KV cache; how many."""
        reads: list[_Read] = []
        while self._arrived and self._arrived[0].form is form and len(reads) < most:
            reads.append(self._arrived.popleft())
        wanted = [r for r in reads if not r.restore.is_over and r.index < r.restore.num_wanted]
        try:
            form.lay([read.landing for read in wanted])
            for read in wanted:
                read.restore.laid.add(read.index)
        finally:
            for read in reads:
                read.landing.release()
        return len(reads)


def _num_laid_in(form: BlockForm, seconds: float) -> int:
    """How many blocks of the form that time is enough for, one by one where it is not known."""
    if seconds <= 0:
        return 0
    return int(seconds / form.work_seconds) if form.work_seconds else 1
