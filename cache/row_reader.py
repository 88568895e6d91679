"""What reads rows from disk: the protocol, and the reader of mapped files.

All readers give the same bytes; which one is used never shows in a row.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.cache.queued_rows import RowQueue
from scone.cache.ram_rows import RamRows
from scone.cache.stats import TableStats
from scone.kernels.errors import DamagedDataError
from scone.kernels.gather import RowMemory
from scone.model_store.table_files import TableFiles

_WILL_NEED_ROWS = 32
"""Below this many rows the hint costs more than it saves: a system call for each row."""


class RowReader(Protocol):
    """Reads rows of one table. Thread-safe."""

    @property
    def tier(self) -> str:
        """`ram` or `disk`."""

    @property
    def name(self) -> str:
        """How the rows are read: `ram`, `mmap`, `lmdb` or `direct`."""

    def read_into(self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor) -> int:
        """Writes row row_ids[i] to out[i] wherever begin <= row_ids[i] < end, and nothing elsewhere.

        Returns:
            The number of rows written.

        Raises:
            IndexError: an id is beyond the table; nothing was written.
            RowReadError: a row could not be read or does not fit its checksum.
        """

    def may_wait(self, row_ids: NDArray[np.int64], begin: int, end: int) -> NDArray[np.bool_]:
        """Which of `row_ids` (n,) are in [begin, end) and may have to be waited for."""

    def will_need(self, row_ids: NDArray[np.int64], begin: int, end: int) -> None:
        """Starts reading those of `row_ids` that are in [begin, end), all at once; only a hint."""

    def open_queue(self, stats: TableStats, ram: RamRows | None) -> RowQueue | None:
        """A queue for a few rows at a time, without threads; None where there is no such way.

        `ram` has the rows that need not be read.
        """

    def close(self) -> None: ...


class MappedReader:
    """Reads through the mapping of rows.bin or rows.lmdb and the kernel's page cache.

    A page is checked when it is first read; a page that the kernel drops and reads again is not checked
    again.
    """

    tier = "disk"

    def __init__(self, files: TableFiles, num_threads: int = 1) -> None:
        manifest = files.manifest
        self.name = manifest.backend
        self._path = files.rows_path
        self._num_threads = num_threads
        self._files = files
        self._queue_fd = -1
        self._memory = RowMemory(
            files.rows,
            files.block_offsets,
            manifest.rows_per_block,
            manifest.num_fgrams,
            manifest.row_codec,
            files.page_sums,
        )

    def read_into(self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor) -> int:
        if len(row_ids) >= _WILL_NEED_ROWS and self._memory.absent(row_ids, begin, end).any():
            self._memory.will_need(row_ids, begin, end)
        try:
            return self._memory.gather(row_ids, begin, end, out, self._num_threads)
        except DamagedDataError as error:
            raise RowReadError(f"{self._path}: {error}; check the table with `scone verify`") from None

    def may_wait(self, row_ids: NDArray[np.int64], begin: int, end: int) -> NDArray[np.bool_]:
        return self._memory.absent(row_ids, begin, end)

    def will_need(self, row_ids: NDArray[np.int64], begin: int, end: int) -> None:
        self._memory.will_need(row_ids, begin, end)

    def open_queue(self, stats: TableStats, ram: RamRows | None) -> RowQueue | None:
        """Through the page cache, which then holds the rows for others too."""
        if self._queue_fd < 0:
            # through /proc, so that it is the file that was checked, whatever has its name by now
            self._queue_fd = os.open(f"/proc/self/fd/{self._files.rows_fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._queue_fd, 0, 0, os.POSIX_FADV_RANDOM)
        return RowQueue.open(self._files, self._queue_fd, stats, ram, self._memory)

    def close(self) -> None:
        """The mapping goes with the last view of it."""
        if self._queue_fd >= 0:
            os.close(self._queue_fd)
            self._queue_fd = -1
