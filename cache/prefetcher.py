"""Reads rows before they are needed, so that waiting for a disk is never the batch's business.

`submit` returns at once; a sequence whose `PendingRows` is not ready simply is not scheduled. Rows that
need no disk are not staged at all: they are copied straight to where the model wants them. Demand goes
before speculation, and which rows a model sees never depends on what was prefetched. Knows row ids, not
sequences.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.cache.fgram_table import FGramTable, Ids
from scone.kernels.gather import decode_rows
from scone.kernels.row_codec import RowCodec

DEMAND = "demand"
"""Rows that some sequence cannot go on without; any other reason is speculation."""

_DEFAULT_SPECULATION_BYTES = 64 << 20


class PendingRows:
    """Rows under way, for one reader thread at a time."""

    def __init__(self, table: FGramTable, row_ids: NDArray[np.int64], *, staged: bool) -> None:
        """Use `Prefetcher.submit`; `staged`: a worker will call `_read`."""
        self._table = table
        self._row_ids = row_ids
        self._done = threading.Event() if staged else None
        self._rows: Tensor | None = None
        self._places: NDArray[np.int64] | None = None
        self._error: RowReadError | None = None
        self._cancelled = False

    def ready(self) -> bool:
        """Whether `copy_into` would not wait. Never blocks."""
        return self._done is None or self._done.is_set()

    def copy_into(self, out: Tensor) -> None:
        """Writes the i-th row asked for to out[i], cast; waits until the rows are there.

        Args:
            out: (n, dim) float32, bfloat16 or float16 on the CPU; rows of id -1 stay untouched.

        Raises:
            RowReadError: a row could not be read, or the read was cancelled.
        """
        if self._done is None:
            self._table.read_into(self._row_ids, out)
            return
        if not self._done.is_set():
            started = time.perf_counter()
            self._done.wait()
            self._table.stats.add_wait(time.perf_counter() - started)
        if self._error is not None:
            raise self._error
        assert self._rows is not None
        assert self._places is not None
        codec = RowCodec("raw", self._table.manifest.dtype, self._table.dim)
        staged = self._rows.view(torch.uint8).reshape(-1).numpy()
        offsets = np.where(self._places < 0, -1, self._places * codec.row_bytes)
        decode_rows(staged, offsets, codec, out)

    def cancel(self) -> None:
        """Gives the rows up; a read that has not begun will not."""
        self._cancelled = True

    def _read(self) -> str:
        """Runs on a worker; returns the result for the statistics."""
        assert self._done is not None
        result = "read"
        try:
            if self._cancelled:
                self._error = RowReadError("the read of these rows was cancelled")
                return "cancelled"
            wanted, places = np.unique(self._row_ids, return_inverse=True)
            if len(wanted) and wanted[0] < 0:
                wanted, places = wanted[1:], places - 1
            self._rows = self._table.rows(wanted)
            self._places = places
            self._table.stats.add_requested(int((places >= 0).sum()), len(wanted))
        except RowReadError as error:
            self._error = error
            result = "failed"
        except BaseException as error:  # a worker must never leave a sequence waiting
            self._error = RowReadError(f"reading rows failed unexpectedly: {error!r}")
            result = "failed"
        finally:
            self._done.set()
        return result


class Prefetcher:
    """Worker threads that read rows of one table.

    Args:
        num_workers: reads that may wait for the disk at the same time.
        speculation_bytes: what speculative reads may hold in memory or in the queue; beyond it they are
        dropped.
    """

    def __init__(
        self,
        table: FGramTable,
        num_workers: int = 2,
        speculation_bytes: int = _DEFAULT_SPECULATION_BYTES,
    ) -> None:
        self._table = table
        self._speculation_bytes = speculation_bytes
        self._speculating_bytes = 0
        self._lock = threading.Lock()
        self._order = itertools.count()
        # (0 demand, 1 speculation, 2 stop; order of arrival; rows)
        self._queue: queue.PriorityQueue[tuple[int, int, PendingRows | None]] = queue.PriorityQueue()
        self._workers = [
            threading.Thread(target=self._work, name=f"scone-rows-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, row_ids: Ids, reason: str = DEMAND) -> PendingRows:
        """Begins to read rows; never waits.

        Args:
            row_ids: (n,) int64, -1 where no row is wanted.
            reason: `demand`, or the name of a speculation, which only warms what a later demand will read.
        """
        ids = np.array(row_ids, np.int64)  # a copy: the caller may reuse its buffer
        if not self._table.may_wait(ids):
            self._table.stats.add_prefetch("inline")
            return PendingRows(self._table, ids, staged=False)
        pending = PendingRows(self._table, ids, staged=True)
        if reason == DEMAND:
            self._queue.put((0, next(self._order), pending))
        elif self._reserve(self._bytes(pending)):
            self._queue.put((1, next(self._order), pending))
        else:
            self._table.stats.add_prefetch("dropped")
            pending.cancel()
            pending._read()
        return pending

    def close(self) -> None:
        """Finishes what was submitted and ends the workers."""
        for _ in self._workers:
            self._queue.put((2, next(self._order), None))
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            priority, _, pending = self._queue.get()
            if pending is None:
                return
            self._table.stats.add_prefetch(pending._read())
            if priority == 1:
                with self._lock:
                    self._speculating_bytes -= self._bytes(pending)

    def _reserve(self, num_bytes: int) -> bool:
        with self._lock:
            if self._speculating_bytes + num_bytes > self._speculation_bytes:
                return False
            self._speculating_bytes += num_bytes
            return True

    def _bytes(self, pending: PendingRows) -> int:
        return len(pending._row_ids) * self._table.dim * self._table.dtype.itemsize
