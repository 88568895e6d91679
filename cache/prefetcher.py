"""Reads rows before they are needed, so that waiting for a disk is never the batch's business.

`submit` returns at once; whoever's rows in `PendingRows` are not ready simply is not scheduled. Rows that
are in memory are not read here at all: they are copied when they are used. Which rows a model
sees never depends on what was prefetched. Knows row ids, not sequences.
"""

from __future__ import annotations

import queue
import threading
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.cache.fgram_table import FGramTable, Ids
from scone.cache.queued_rows import QueuedRows
from scone.kernels.gather import decode_rows
from scone.kernels.row_codec import RowCodec
from scone.kernels.row_target import RowTarget


class PendingRows:
    """Rows under way; used by one thread, besides the worker that reads them.

    Attributes:
        row_ids: (n,) int64: the rows that are read; -1 where nothing was to be waited for.
    """

    def __init__(self, table: FGramTable, row_ids: NDArray[np.int64], *, apart: bool = False) -> None:
        """Use `Prefetcher.submit`."""
        self.row_ids = row_ids
        self._table = table
        self._apart = apart
        self._done = threading.Event()
        self._cancelled = np.zeros(len(row_ids), np.bool_)
        self._failed: dict[int, RowReadError] = {}  # by row id
        self._rows = torch.empty(0, table.dim, dtype=table.dtype)  # those read, once each
        self._places = np.full(len(row_ids), -1, np.int64)  # where in _rows each one is

    def num_under_way(self) -> int:
        """How many of the rows have neither been read nor failed. Never blocks."""
        return 0 if self._done.is_set() else int((self.row_ids >= 0).sum())

    def ready(self, begin: int, end: int) -> bool:
        """Whether rows [begin, end), which come together with all others, have been read, or failed."""
        return self._done.is_set()

    def wait(self, begin: int, end: int, timeout: float | None = None) -> bool:
        """Blocks until `ready`, or for `timeout` seconds; returns `ready`."""
        return self._done.wait(timeout)

    def error(self, begin: int, end: int) -> RowReadError | None:
        """Why some of rows [begin, end) could not be read; None if all of them were. They must be ready."""
        for row_id in self.row_ids[begin:end].tolist() if self._failed else ():
            if row_id in self._failed:
                return self._failed[row_id]
        return None

    def copy_into(self, picks: NDArray[np.int64], out: Tensor) -> None:
        """Writes row row_ids[picks[i]] to out[i], cast; they must be ready and without error.

        Args:
            picks: (n,) int64; where it is -1, out[i] stays untouched.
            out: (n, dim) float32, bfloat16 or float16 on the CPU.
        """
        codec = RowCodec("raw", self._table.manifest.dtype, self._table.dim)
        places = np.where(picks < 0, -1, self._places[picks])
        staged = self._rows.view(torch.uint8).reshape(-1).numpy()
        decode_rows(staged, np.where(places < 0, -1, places * codec.row_bytes), codec, out)

    def gather_newest(
        self,
        ids: NDArray[np.int64],
        places: NDArray[np.int64],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> bool:
        """As `QueuedRows.gather_newest`: never at once."""
        return False

    def cancel(self, begin: int, end: int) -> None:
        """Gives rows [begin, end) up: they are not read unless that has begun."""
        self._cancelled[begin:end] = True

    def _read(self) -> str:
        """Runs on a worker; returns the result for the statistics."""
        try:
            row_ids = np.where(self._cancelled, -1, self.row_ids)
            wanted, places = np.unique(row_ids, return_inverse=True)
            if len(wanted) and wanted[0] < 0:
                wanted, places = wanted[1:], places - 1
            if not len(wanted):
                return "cancelled"
            self._table.stats.add_requested(int((places >= 0).sum()), len(wanted))
            self._table.will_need(wanted)  # without it, each row's page fault waits for the one before
            self._rows = self._read_rows(wanted)
            self._places = places
        except BaseException as error:  # a worker must never leave a sequence waiting
            reason = RowReadError(f"reading rows failed unexpectedly: {error!r}")
            self._failed = dict.fromkeys(self.row_ids.tolist(), reason)
        finally:
            self._done.set()
        return "failed" if self._failed else "read"

    def _read_rows(self, wanted: NDArray[np.int64]) -> Tensor:
        """(len(wanted), dim); those that cannot be read are left out and noted as failed."""
        try:
            return self._table.rows(wanted)
        except RowReadError as error:
            if not self._apart or len(wanted) == 1:
                self._failed = dict.fromkeys(wanted.tolist(), error)
                return self._rows
        rows = torch.zeros(len(wanted), self._table.dim, dtype=self._table.dtype)
        for i, row_id in enumerate(wanted.tolist()):
            try:
                rows[i] = self._table.rows([row_id])[0]
            except RowReadError as error:
                self._failed[row_id] = error
        return rows


class Prefetcher:
    """Worker threads that read rows of one table.

    Args:
        num_workers: reads that may wait for the disk at the same time.
    """

    def __init__(self, table: FGramTable, num_workers: int = 2) -> None:
        self._table = table
        self._queue = table.open_queue()
        self._jobs: queue.SimpleQueue[PendingRows | None] = queue.SimpleQueue()  # None: the end
        self._workers = [
            threading.Thread(target=self._work, name=f"scone-rows-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, row_ids: Ids) -> PendingRows | None:
        """Begins to read those rows that may have to be waited for; None if there are none. Never waits.

        Args:
            row_ids: (n,) int64, -1 where no row is wanted.
        """
        return self._submit(row_ids, apart=False)

    def submit_apart(self, row_ids: NDArray[np.int64]) -> PendingRows | QueuedRows | None:
        """As `submit`, for rows (n,) that different parties want at once; from one thread only.

        One that cannot be read fails by itself. Where the disk has a queue no worker stands between, and what
        is returned can gather the rows in memory with the others.
        """
        if self._queue is None or self._table.never_waits:
            return self._submit(row_ids, apart=True)
        queued = self._queue.submit(row_ids, self._table.num_memory_rows)
        if queued is None:
            return self._submit(row_ids, apart=True)
        if not queued.num_reads:
            self._table.stats.add_prefetch("inline")
        return queued

    def _submit(self, row_ids: Ids, *, apart: bool) -> PendingRows | None:
        ids = np.array(row_ids, np.int64)  # a copy: the caller may reuse its buffer
        awaited = self._table.may_wait(ids)
        if not awaited.any():
            self._table.stats.add_prefetch("inline")
            return None
        ids[~awaited] = -1
        pending = PendingRows(self._table, ids, apart=apart)
        self._jobs.put(pending)
        return pending

    def close(self) -> None:
        """Finishes what was submitted and ends the workers."""
        if self._queue is not None:
            self._queue.close()
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while (pending := self._jobs.get()) is not None:
            self._table.stats.add_prefetch(pending._read())
