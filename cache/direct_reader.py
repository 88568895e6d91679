"""Reads rows past the kernel's page cache: O_DIRECT, many at a time, each page checked each time.

A cold prompt is one deep-queued read at the disk's own speed, and memory stays what the caller gave
(kernels/row_reads.py plans it). Only for rows.bin: its pages lie where the checksums' pages lie.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.cache.queued_rows import RowQueue
from scone.cache.ram_rows import RamRows
from scone.cache.stats import TableStats
from scone.kernels.checksum import crc32c_pages
from scone.kernels.disk_read import RowsOut, SpanReader, open_span_reader
from scone.kernels.gather import CHECK_BYTES, check_ids
from scone.kernels.row_reads import RowReads, plan_row_reads
from scone.model_store.table_files import TableFiles
from scone.model_store.table_header import HEADER_BYTES

_logger = logging.getLogger(__name__)


class DirectReader:
    """Reads rows of one rows.bin. Thread-safe: each call reads into a buffer of its own."""

    tier = "disk"
    name = "direct"

    def __init__(self, files: TableFiles, depth: int) -> None:
        self._files = files
        self._codec = files.manifest.row_codec
        self._fd = _open_direct(files)
        self._reader: SpanReader = open_span_reader(self._fd, depth)
        if self._reader.name != "io_uring":
            _logger.info("io_uring is not available: reading %s with threads", files.rows_path)
        self._buffers: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    @property
    def method(self) -> str:
        """`io_uring` or `pread`."""
        return self._reader.name

    def read_into(self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor) -> int:
        check_ids(row_ids, self._files.manifest.num_fgrams)
        plan = plan_row_reads(row_ids, begin, end, self._codec.row_bytes)
        num_rows = len(plan.targets)
        if num_rows == 0:
            return 0
        buffer = self._take_buffer(len(plan.pages) * CHECK_BYTES)
        try:
            self._read(plan, buffer, RowsOut(plan.row_offsets, plan.targets, self._codec, out))
        finally:
            self._return_buffer(buffer)
        return num_rows

    def may_wait(self, row_ids: NDArray[np.int64], begin: int, end: int) -> NDArray[np.bool_]:
        return (row_ids >= begin) & (row_ids < end)

    def will_need(self, row_ids: NDArray[np.int64], begin: int, end: int) -> None:
        """Nothing: a read asks for all its rows at once."""

    def open_queue(self, stats: TableStats, ram: RamRows | None) -> RowQueue | None:
        return RowQueue.open(self._files, self._fd, stats, ram)

    def close(self) -> None:
        """Closes the file; no read may be under way."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, plan: RowReads, buffer: NDArray[np.uint8], rows: RowsOut) -> None:
        """Reads what was planned into `buffer`, decodes the rows, checks the pages."""
        pages = plan.pages
        sums = np.empty(len(pages), np.uint32)
        try:
            in_file = plan.spans._replace(offsets=plan.spans.offsets + HEADER_BYTES)
            self._reader.read(in_file, buffer, sums, rows)
        except OSError as error:
            raise RowReadError(f"cannot read {self._files.rows_path}: {error.strerror}") from None
        wrong = sums != self._files.page_sums[pages]
        last = len(self._files.page_sums) - 1
        if pages[-1] == last:
            # the checksum of the last page does not cover the zeros that fill it up
            size = self._files.manifest.stream_bytes - last * CHECK_BYTES
            begin = (len(pages) - 1) * CHECK_BYTES
            wrong[-1] = crc32c_pages(buffer[begin : begin + size], size)[0] != self._files.page_sums[last]
        if np.any(wrong):
            page = int(pages[wrong.argmax()])
            raise RowReadError(
                f"{self._files.rows_path}: page {page} of the rows is damaged: it does not fit its checksum;"
                " check the table with `scone verify`"
            )

    def _take_buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        """A page-aligned buffer, as direct reads need: a used one if it is large enough."""
        with self._lock:
            for i, buffer in enumerate(self._buffers):
                if len(buffer) >= num_bytes:
                    return self._buffers.pop(i)
        return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)

    def _return_buffer(self, buffer: NDArray[np.uint8]) -> None:
        with self._lock:
            self._buffers.append(buffer)
            self._buffers.sort(key=len)
            # one for each reading thread in the usual case; never more memory than the largest reads took
            del self._buffers[:-4]


def _open_direct(files: TableFiles) -> int:
    """The rows' file opened anew for direct reads or, where the file system has none, for ordinary ones."""
    # through /proc, so that it is the file that was checked, whatever has its name by now
    path = f"/proc/self/fd/{files.rows_fd}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        _logger.info("no direct reads of %s (%s): using the page cache", files.rows_path, error.strerror)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
