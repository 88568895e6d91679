"""The RAM tier: the most frequent rows in this process's own memory, in huge pages where the kernel gives
them.

Filled by a thread of its own while the table already serves: rows that have not arrived are read from disk.
Every page is checked as it arrives and never again. Unlike the page cache this memory is not taken back by
the kernel, and one row costs no page fault.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.huge_pages import map_memory
from scone.kernels.gather import CHECK_BYTES, RowMemory
from scone.model_store.errors import TableError
from scone.model_store.table_files import TableFiles

_logger = logging.getLogger(__name__)

_PAGES_PER_READ = (8 << 20) // CHECK_BYTES
_FIRST_BLOCK = np.zeros(1, np.uint64)


class RamRows:
    """Rows [0, num_loaded) of a table; `num_loaded` grows to `num_rows`. Thread-safe.

    Attributes:
        memory: the rows; only those loaded may be read.
        num_shrinks: rises when rows are given up, before their memory is: whoever has read meanwhile what it
            took to be loaded reads again.
    """

    tier = "ram"
    name = "ram"

    def __init__(self, files: TableFiles, num_rows: int, num_threads: int = 1) -> None:
        """Reserves the memory and begins to fill it."""
        self.num_rows = num_rows
        self.num_loaded = 0
        self.num_shrinks = 0
        self._files = files
        self._num_threads = num_threads
        self._row_bytes = files.manifest.row_bytes
        self._num_pages = -(-num_rows * self._row_bytes // CHECK_BYTES)
        num_bytes = min(self._num_pages * CHECK_BYTES, files.manifest.stream_bytes)
        self._mapping = map_memory(num_bytes, "the table's RAM tier")
        self._data: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8, num_bytes)
        self.memory = RowMemory(
            self._data,
            _FIRST_BLOCK,
            num_rows,
            num_rows,
            files.manifest.row_codec,
            None,
            num_ids=files.manifest.num_fgrams,
        )
        self._loading = threading.Lock()
        self._stopped = threading.Event()
        self._loader = threading.Thread(target=self._load, name="scone-ram-tier", daemon=True)
        self._loader.start()

    @property
    def num_bytes(self) -> int:
        """Memory reserved; it is in use as far as rows are loaded."""
        return self.bytes_for(self.num_rows)

    def bytes_for(self, num_rows: int) -> int:
        """What so many rows take."""
        return min(-(-num_rows * self._row_bytes // CHECK_BYTES) * CHECK_BYTES, len(self._data))

    def rows_in(self, num_bytes: int) -> int:
        """How many rows lie within the first `num_bytes`."""
        return num_bytes // self._row_bytes

    def shrink_to(self, num_rows: int) -> None:
        """Gives up all rows from `num_rows` on, and their memory; waits for the part being loaded."""
        with self._loading:
            self.num_rows = min(num_rows, self.num_rows)
            self.num_loaded = min(self.num_rows, self.num_loaded)
            self.num_shrinks += 1
            first = self.num_bytes
            if first < len(self._data):
                self._mapping.madvise(mmap.MADV_DONTNEED, first, len(self._data) - first)

    def read_into(self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor) -> int:
        """As RowReader.read_into; [begin, end) must be loaded."""
        return self.memory.gather(row_ids, begin, end, out, self._num_threads)

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Whether the tier is full after at most `timeout` seconds; False also if a read failed."""
        self._loader.join(timeout)
        return self.num_loaded == self.num_rows

    def close(self) -> None:
        """Ends the loading."""
        self._stopped.set()
        self._loader.join()

    def _load(self) -> None:
        try:
            for first in range(0, self._num_pages, _PAGES_PER_READ):
                if self._stopped.is_set():
                    return
                begin, end = (
                    first * CHECK_BYTES,
                    min((first + _PAGES_PER_READ) * CHECK_BYTES, len(self._data)),
                )
                part = self._data[begin:end]
                with self._loading:
                    if begin >= self.num_bytes:
                        break
                    self._files.read_stream(begin, part.data)
                    self._files.check_pages(first, part)
                    self.num_loaded = min(self.num_rows, end // self._row_bytes)
                    if end > self.num_bytes:  # shrunk since: the part's end is not wanted
                        self._mapping.madvise(
                            mmap.MADV_DONTNEED, self.num_bytes, len(self._data) - self.num_bytes
                        )
        except (OSError, TableError) as error:
            # Not fatal: these rows stay on disk, and whoever asks for a damaged one is told so.
            _logger.error("the RAM tier of %s ends at row %d: %s", self._files.path, self.num_loaded, error)
        # The page cache holds a second copy of what was just read.
        os.posix_fadvise(self._files.rows_fd, 0, 0, os.POSIX_FADV_DONTNEED)
