"""Reads the chunks of a state from the file of an LMDB environment, past LMDB's own map of it.

A page fault in the map would wait for the disk with the interpreter's lock held, and stop every thread. So
LMDB is only asked where the chunks lie; then they are read with system calls, straight to where they are
wanted, chunks that follow each other together. Whoever calls holds a snapshot: no page of it is used again
meanwhile.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from scone.cache.recycled_layout import (
    CHUNK_BYTES,
    IN_LEAF_BYTES,
    PAGE_HEADER_BYTES,
    Entry,
    chunk_key,
    chunks,
)
from scone.cache.recycled_record import Bytes

_MAX_PLACES = 1000
"""preadv takes 1,024 at a time."""


class ChunkReader:
    """Of one file; thread-safe but for `remapped` and `close`."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # What the kernel would read beyond a chunk is seldom wanted.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._map_address: int | None = None

    @property
    def file_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, cursor: Any, entry: Entry, ids: Bytes, payload: Bytes) -> None:
        """Fills both, as far as the chunks are there.

        Args:
            cursor: over the chunks, with buffers, of a snapshot.
        """
        destination = _Destination(ids.data, payload.data)
        runs: list[tuple[int, list[memoryview]]] = []
        run_end = -1
        found = cursor.set_key(chunk_key(entry.state_id, 0))
        for begin, end in chunks(entry.num_bytes):
            if not found:
                break
            value: memoryview = cursor.value()
            if len(value) != end - begin:
                break
            places = destination.places(begin, end)
            if len(value) <= IN_LEAF_BYTES:
                _copy(value, places)
            else:
                offset = self._offset(value)
                if offset == run_end and len(runs[-1][1]) + len(places) < _MAX_PLACES:
                    runs[-1][1].extend((memoryview(bytearray(PAGE_HEADER_BYTES)), *places))
                else:
                    # LMDB's binding touches each page of a value, one fault after the other: the rest of the
                    # state, which mostly follows, is asked of the disk at once.
                    self._will_need(offset, entry.num_bytes - begin)
                    runs.append((offset, places))
                run_end = offset + len(value) + PAGE_HEADER_BYTES
            found = cursor.next()
        self._read_runs(runs)

    def remapped(self) -> None:
        """The environment's map may lie elsewhere from now on."""
        self._map_address = None

    def close(self) -> None:
        os.close(self._fd)

    def _will_need(self, offset: int, num_bytes: int) -> None:
        num_headers = -(-num_bytes // CHUNK_BYTES)
        length = num_bytes + num_headers * PAGE_HEADER_BYTES
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _read_runs(self, runs: list[tuple[int, list[memoryview]]]) -> None:
        for offset, places in runs:
            os.preadv(self._fd, places, offset)

    def _offset(self, value: memoryview) -> int:
        """Where a value lies in the file."""
        address: int = np.frombuffer(value, np.uint8).__array_interface__["data"][0]
        if self._map_address is None:
            self._map_address = _address_of_map(os.fstat(self._fd).st_ino, address)
        return address - self._map_address


def _address_of_map(inode: int, address: int) -> int:
    """Where byte 0 of the mapped file that `address` belongs to lies in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, mapped_inode, *_ = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in addresses.split("-"))
        if begin <= address < end and int(mapped_inode) == inode:
            return begin - int(offset, 16)
    raise lmdb.CorruptedError("a chunk lies outside of the map")


class _Destination:
    """Ids and payload as one range of bytes."""

    def __init__(self, ids: memoryview, payload: memoryview) -> None:
        self._ids, self._payload = ids, payload

    def places(self, begin: int, end: int) -> list[memoryview]:
        num_ids = len(self._ids)
        if begin >= num_ids:
            return [self._payload[begin - num_ids : end - num_ids]]
        if end <= num_ids:
            return [self._ids[begin:end]]
        return [self._ids[begin:], self._payload[: end - num_ids]]


def _copy(value: memoryview, places: list[memoryview]) -> None:
    begin = 0
    for place in places:
        place[:] = value[begin : begin + len(place)]
        begin += len(place)
