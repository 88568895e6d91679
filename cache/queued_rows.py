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
from scone.cache.ram_rows import RamRows
from scone.cache.stats import TableStats
from scone.kernels.gather import RowMemory, decode_rows
from scone.kernels.read_queue import (
    DAMAGED,
    NO_SLOT,
    SHORT_READ,
    SOUND,
    ReadQueue,
    open_read_queue,
)
from scone.kernels.row_target import RowTarget
from scone.model_store.table_files import TableFiles
from scone.model_store.table_header import HEADER_BYTES

I64 = NDArray[np.int64]

NUM_SLOTS = 256
"""Rows under way or arrived and not used yet; beyond that, workers read."""


class RowQueue:
    """The queue of one rows.bin. For one thread, the engine's.

    Attributes:
        ram: the table's RAM tier.
        mapped: the rows as they are mapped, where those that are in the page cache are read there.
    """

    def __init__(
        self,
        files: TableFiles,
        reads: ReadQueue,
        stats: TableStats,
        ram: RamRows | None,
        mapped: RowMemory | None,
    ) -> None:
        """Use `open`."""
        self.codec = files.manifest.row_codec
        self.reads = reads
        self.stats = stats
        self.path = files.rows_path
        self.ram = ram
        self.mapped = mapped

    @classmethod
    def open(
        cls,
        files: TableFiles,
        fd: int,
        stats: TableStats,
        ram: RamRows | None,
        mapped: RowMemory | None = None,
    ) -> RowQueue | None:
        """None where the table or the machine has no such way: an LMDB table, no io_uring."""
        manifest = files.manifest
        if manifest.backend != "mmap":
            return None
        reads = open_read_queue(
            fd,
            NUM_SLOTS,
            manifest.row_codec,
            files.page_sums,
            begin=HEADER_BYTES,
            size=manifest.stream_bytes,
        )
        return None if reads is None else cls(files, reads, stats, ram, mapped)

    def submit(self, row_ids: I64, first_row: int = 0) -> QueuedRows | None:
        """Begins to read rows (n,), -1 where none is wanted; None if there is no room. Never waits.

        Rows before `first_row`, and those that lie in the page cache and are mapped, are not read.
        """
        slots, begins = np.empty((2, len(row_ids)), np.int64)
        awaited = row_ids.copy()
        taken = self.reads.submit(awaited, first_row, self.mapped, slots, begins)
        if taken is None:
            return None
        num_reads, num_awaited = taken
        if num_reads:
            self.stats.add_requested(num_awaited, num_reads)
        return QueuedRows(self, awaited, slots, begins, num_reads)

    def close(self) -> None:
        """Waits for the reads under way; no other call may follow."""
        self.reads.close()


class QueuedRows:
    """Rows under way; the same as `prefetcher.PendingRows` for whoever waits for them.

    Attributes:
        row_ids: (n,) int64: the rows that are read; -1 where nothing was to be waited for.
        num_reads: how many these are, each counted once.
    """

    def __init__(self, queue: RowQueue, row_ids: I64, slots: I64, begins: I64, num_reads: int) -> None:
        """Row row_ids[i] goes to slot slots[i] and begins at begins[i] of the queue's memory."""
        self.row_ids, self.num_reads = row_ids, num_reads
        self._queue, self._slots, self._begins = queue, slots, begins
        self._submitted_at = time.perf_counter()
        self._is_counted = num_reads == 0

    def __del__(self) -> None:
        self._queue.reads.release(self._slots)

    def num_under_way(self) -> int:
        """How many of the rows have neither been read nor failed. Never blocks."""
        return self._queue.reads.num_under_way(self._slots)

    def ready(self, begin: int, end: int) -> bool:
        """Whether rows [begin, end) have been read, or failed. Never blocks."""
        return not self._queue.reads.num_under_way(self._slots[begin:end])

    def wait(self, begin: int, end: int, timeout: float) -> bool:
        """Blocks until `ready`, or for `timeout` seconds; returns `ready`."""
        return not self._queue.reads.wait(self._slots[begin:end], timeout)

    def error(self, begin: int, end: int) -> RowReadError | None:
        """Why some of rows [begin, end) could not be read; None if all of them were. They must be ready."""
        for slot in self._slots[begin:end].tolist():
            status = int(self._queue.reads.status[slot]) if slot != NO_SLOT else SOUND
            if status != SOUND:
                self._count_ended()
                return RowReadError(f"{self._queue.path}: {_reason(status)}")
        return None

    def copy_into(self, picks: I64, out: Tensor) -> None:
        """Writes row row_ids[picks[i]] to out[i], cast; they must be ready and without error.

        Args:
            picks: (n,) int64; where it is -1, or row_ids is, out[i] stays untouched.
            out: (n, dim) float32, bfloat16 or float16 on the CPU.
        """
        self._count_ended()
        offsets = np.where(picks < 0, -1, self._begins[picks])
        decode_rows(self._queue.reads.memory, offsets, self._queue.codec, out)

    def gather_newest(
        self, ids: I64, places: I64, row_ids: list[list[int]], positions: list[int], out: RowTarget
    ) -> bool:
        """Writes all rows to `out`, those in memory too; false if that cannot be done at once.

        Args:
            ids: (n,) what was submitted.
            places: (n,) which sequence of the step wants each.
            row_ids, positions: of each sequence its row ids, and which input it computes.
        """
        queue, ram = self._queue, self._queue.ram
        num_shrinks, num_loaded = (0, 0) if ram is None else (ram.num_shrinks, ram.num_loaded)
        began = time.perf_counter()
        found = queue.reads.gather_newest(
            None if ram is None else ram.memory,
            num_loaded,
            queue.mapped,
            row_ids,
            positions,
            ids,
            places,
            self._slots,
            self._begins,
            out,
        )
        if found is None or (ram is not None and ram.num_shrinks != num_shrinks):
            return False  # rows may have been given up before they were copied
        seconds = time.perf_counter() - began
        for tier, num_rows in zip(("ram", "disk"), found, strict=True):
            if num_rows:
                queue.stats.add_read(tier, num_rows, num_rows * queue.codec.row_bytes, seconds)
        self._count(0)
        return True

    def cancel(self, begin: int, end: int) -> None:
        """Gives rows [begin, end) up; their memory is free when the last user of these rows is gone."""

    def _count_ended(self) -> None:
        """Counts the read if all of it has ended."""
        if not self._is_counted and not self.num_under_way():
            status = self._queue.reads.status
            slots = {slot for slot in self._slots.tolist() if slot != NO_SLOT}
            self._count(sum(int(status[slot]) != SOUND for slot in slots))

    def _count(self, num_failed: int) -> None:
        """Notes in the statistics how the read has ended; once, when its rows are used or found missing."""
        if self._is_counted:
            return
        self._is_counted = True
        num_rows = self.num_reads - num_failed
        seconds = time.perf_counter() - self._submitted_at
        self._queue.stats.add_read("disk", num_rows, num_rows * self._queue.codec.row_bytes, seconds)
        self._queue.stats.add_prefetch("failed" if num_failed else "read")


def _reason(status: int) -> str:
    if status == DAMAGED:
        return "a page of the rows does not fit its checksum; check the table with `scone verify`"
    if status == SHORT_READ:
        return "the file ended early; check the table with `scone verify`"
    return f"a row cannot be read: {os.strerror(status)}"
