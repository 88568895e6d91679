"""The index in this process's own memory, in huge pages where the kernel gives them.

A probe goes to a random line of it: out of the page cache, most of them wait for a translation as well as for
the line, and all of them for the disk once the kernel has dropped the pages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scone.cache.huge_pages import map_memory
from scone.kernels.checksum import crc32c_pages
from scone.kernels.fgram_hash import BUCKET_DTYPE
from scone.kernels.gather import CHECK_BYTES
from scone.kernels.match import BucketIndex
from scone.model_store.table_files import TableFiles

_logger = logging.getLogger(__name__)

_PAGES_PER_READ = (8 << 20) // CHECK_BYTES


class RamIndex:
    """A copy of a table's index, made by a thread of its own and checked page by page."""

    def __init__(self, files: TableFiles, on_loaded: Callable[[BucketIndex], None]) -> None:
        """Begins to copy; `on_loaded` is called, on that thread, with the copy once it is whole and sound."""
        self._files = files
        self._on_loaded = on_loaded
        self._stopped = threading.Event()
        self._loader = threading.Thread(target=self._load, name="scone-ram-index", daemon=True)
        self._loader.start()

    def wait_loaded(self, timeout: float | None = None) -> None:
        """Waits until the copy is in use, or has failed."""
        self._loader.join(timeout)

    def close(self) -> None:
        """Ends the copying."""
        self._stopped.set()
        self._loader.join()

    def _load(self) -> None:
        index, sums = self._files.index, self._files.index_sums
        num_bytes = index.buckets.nbytes
        data = np.frombuffer(map_memory(num_bytes, "the table's index"), np.uint8, num_bytes)
        try:
            for first in range(0, len(sums), _PAGES_PER_READ):
                if self._stopped.is_set():
                    return
                part = data[first * CHECK_BYTES : (first + _PAGES_PER_READ) * CHECK_BYTES]
                self._files.read_index(first * CHECK_BYTES, part.data)
                if not np.array_equal(crc32c_pages(part, CHECK_BYTES), sums[first : first + _PAGES_PER_READ]):
                    raise OSError("a page does not fit its checksum")
        except OSError as error:
            # Not fatal: the file is read as it is, and whoever meets a damaged bucket is told so.
            _logger.error("the index of %s cannot be copied into memory: %s", self._files.path, error)
            return
        # Its pages stay in the page cache, unlike those of the rows: others may match in the file itself.
        self._on_loaded(replace(index, buckets=data.view(BUCKET_DTYPE)))
