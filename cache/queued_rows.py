"""A few rows that a disk is asked for without a thread in between: those of the tokens sampled last.

A decode step's cold rows stand between two steps of everybody, so what counts is the time from the sampled
token to the row: one system call asks for all of them, the engine goes on, and the disk's answer is found
when the next step is made. Larger reads are the workers' (prefetcher.py). Each row is ready and fails by
itself. Knows row ids, not sequences.
"""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.cache.stats import TableStats
from scone.kernels.gather import CHECK_BYTES, decode_rows
from scone.kernels.read_queue import DAMAGED, SHORT_READ, UNDER_WAY, ReadQueue, open_read_queue
from scone.model_store.table_files import TableFiles
from scone.model_store.table_header import HEADER_BYTES

NUM_SLOTS = 256
"""Rows under way or arrived and not used yet; beyond that, workers read."""


class RowQueue:
    """The queue of one rows.bin. For one thread, the engine's."""

    def __init__(self, files: TableFiles, reads: ReadQueue, stats: TableStats) -> None:
        """Use `open`."""
        self.codec = files.manifest.row_codec
        self.reads = reads
        self.stats = stats
        self.path = files.rows_path

    @classmethod
    def open(cls, files: TableFiles, fd: int, stats: TableStats) -> RowQueue | None:
        """None where the table or the machine has no such way: an LMDB table, no io_uring."""
        manifest = files.manifest
        if manifest.backend != "mmap":
            return None
        reads = open_read_queue(
            fd,
            NUM_SLOTS,
            (manifest.row_bytes - 2) // CHECK_BYTES + 2,  # as many pages as a row can touch
            files.page_sums,
            begin=HEADER_BYTES,
            size=manifest.stream_bytes,
        )
        return None if reads is None else cls(files, reads, stats)

    def submit(self, row_ids: NDArray[np.int64]) -> QueuedRows | None:
        """Begins to read rows (n,), -1 where none is wanted; None if there is no room. Never waits."""
        ids = row_ids.tolist()
        wanted = list(dict.fromkeys([row_id for row_id in ids if row_id >= 0]))
        row_bytes = self.codec.row_bytes
        first_byte = np.array(wanted, np.int64) * row_bytes
        first_page = first_byte // CHECK_BYTES
        slots = self.reads.submit(first_page, (first_byte + row_bytes - 1) // CHECK_BYTES - first_page + 1)
        if slots is None:
            return None
        begins = slots * self.reads.slot_bytes + first_byte % CHECK_BYTES
        places = {row_id: place for place, row_id in enumerate(wanted)}
        self.stats.add_requested(len(ids) - ids.count(-1), len(wanted))
        return QueuedRows(self, row_ids, [places.get(row_id, -1) for row_id in ids], slots, begins)

    def close(self) -> None:
        """Waits for the reads under way; no other call may follow."""
        self.reads.close()


class QueuedRows:
    """Rows under way; the same as `prefetcher.PendingRows` for whoever waits for them.

    Attributes:
        row_ids: (n,) int64: the rows that are read; -1 where nothing was to be waited for.
    """

    def __init__(
        self,
        queue: RowQueue,
        row_ids: NDArray[np.int64],
        places: list[int],
        slots: NDArray[np.int64],
        begins: NDArray[np.int64],
    ) -> None:
        """Use `RowQueue.submit`. Row row_ids[i] lies, or will, at begins[places[i]] of the queue's memory."""
        self.row_ids = row_ids
        self._queue, self._places, self._begins = queue, places, begins
        self._slots: NDArray[np.int64] = slots
        self._submitted_at = time.perf_counter()
        self._is_counted = False

    def __del__(self) -> None:
        self._queue.reads.release(self._slots)

    def ready(self, begin: int, end: int) -> bool:
        """Whether rows [begin, end) have been read, or failed. Never blocks."""
        self._queue.reads.poll()
        status = self._queue.reads.status
        is_ready = all([status[slot] != UNDER_WAY for slot in self._slots_of(begin, end)])
        if is_ready and not self._is_counted:
            self._count()
        return is_ready

    def wait(self, begin: int, end: int, timeout: float) -> bool:
        """Blocks until `ready`, or for `timeout` seconds; returns `ready`."""
        self._queue.reads.wait(np.array(self._slots_of(begin, end), np.int64), timeout)
        return self.ready(begin, end)

    def error(self, begin: int, end: int) -> RowReadError | None:
        """Why some of rows [begin, end) could not be read; None if all of them were. They must be ready."""
        for place in self._places[begin:end]:
            status = int(self._queue.reads.status[self._slots[place]]) if place >= 0 else 0
            if status:
                return RowReadError(f"{self._queue.path}: {_reason(status)}")
        return None

    def copy_into(self, picks: NDArray[np.int64], out: Tensor) -> None:
        """Writes row row_ids[picks[i]] to out[i], cast; they must be ready and without error.

        Args:
            picks: (n,) int64; where it is -1, or row_ids is, out[i] stays untouched.
            out: (n, dim) float32, bfloat16 or float16 on the CPU.
        """
        places = [-1 if pick < 0 else self._places[pick] for pick in picks.tolist()]
        offsets = [-1 if place < 0 else self._begins[place] for place in places]
        decode_rows(self._queue.reads.memory, np.array(offsets, np.int64), self._queue.codec, out)

    def cancel(self, begin: int, end: int) -> None:
        """Gives rows [begin, end) up; their memory is free when the last user of these rows is gone."""

    def _slots_of(self, begin: int, end: int) -> list[int]:
        return [int(self._slots[place]) for place in self._places[begin:end] if place >= 0]

    def _count(self) -> None:
        """Once all have arrived, whoever asks first."""
        status = self._queue.reads.status[self._slots]
        if (status == UNDER_WAY).any():
            return
        self._is_counted = True
        num_rows = int((status == 0).sum())
        seconds = time.perf_counter() - self._submitted_at
        self._queue.stats.add_read("disk", num_rows, num_rows * self._queue.codec.row_bytes, seconds)
        self._queue.stats.add_prefetch("read" if num_rows == len(status) else "failed")


def _reason(status: int) -> str:
    if status == DAMAGED:
        return "a page of the rows does not fit its checksum; check the table with `scone verify`"
    if status == SHORT_READ:
        return "the file ended early; check the table with `scone verify`"
    return f"a row cannot be read: {os.strerror(status)}"
