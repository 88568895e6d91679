"""Reads the chunks of a state from the file of an LMDB environment, past LMDB's own map of it.

A page fault in the map would wait for the disk with the interpreter's lock held, and stop every thread; and
asked for a value, LMDB's binding touches each of its pages. So LMDB is asked for the entry, which names the
pages; they are read with system calls, straight to where they are wanted, chunks that follow each other
together. Whoever calls holds a snapshot: no page of it is used again meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from scone.cache.recycled_layout import PAGE_BYTES, PAGE_HEADER_BYTES, Entry, cut
from scone.cache.recycled_record import SUMMED_BYTES, Bytes
from scone.kernels.state_read import read_state, will_need

_PAGE_HEADER = struct.Struct("<QHHI")
_OVERFLOW = 0x04


class ChunkReader:
    """Of one file; thread-safe but for `close`."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # What the kernel would read beyond a chunk is seldom wanted.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def file_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, entry: Entry, ids: Bytes, payload: Bytes) -> NDArray[np.uint32]:
        """Fills both; returns the checksums of the payload's pages.

        Args:
            payload: flat, or rows that are contiguous each.

        Raises:
            OSError: they cannot be read, or are not there; their bytes are then undefined.
        """
        sizes, tail = cut(entry.num_bytes).sizes, np.frombuffer(entry.tail, np.uint8)
        rows = payload.reshape(1, -1) if payload.ndim == 1 else payload
        return read_state(self._fd, entry.offsets, sizes, PAGE_HEADER_BYTES, tail, ids, rows, SUMMED_BYTES)

    def will_need(self, entry: Entry) -> None:
        """Has the kernel read a state's pages ahead."""
        will_need(self._fd, entry.offsets, cut(entry.num_bytes).sizes, PAGE_HEADER_BYTES)

    def close(self) -> None:
        os.close(self._fd)


def page_of(value: memoryview) -> int:
    """The page that a value with pages of its own begins at, also one that is not committed yet.

    LMDB's header of the page says so, which lies before the value: number, padding, flags, number of pages
    (`MDB_page` in LMDB's mdb.c, the same in all files of its version 1). Raises lmdb.CorruptedError where it
    says something else.
    """
    address: int = np.frombuffer(value, np.uint8).__array_interface__["data"][0]
    header = ctypes.string_at(address - PAGE_HEADER_BYTES, PAGE_HEADER_BYTES)
    number, _, flags, num_pages = _PAGE_HEADER.unpack(header)
    wanted = -(-(len(value) + PAGE_HEADER_BYTES) // PAGE_BYTES)
    if not flags & _OVERFLOW or num_pages != wanted:
        raise lmdb.CorruptedError(f"a value of {len(value)} bytes has {num_pages} pages, wanted {wanted}")
    return int(number)
