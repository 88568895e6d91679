"""The header of a store on disk: what the processes that share it must agree on, in memory that they share.

One page, mapped by all: format version, byte budget, and the generation of each shard. A shard's file is
never shrunk or repaired in place: it is replaced by one of the next generation, and everybody, looking here
before each access, changes over.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scone.cache.errors import CacheError, StoreVersionError

FORMAT_VERSION = 2
NUM_SHARDS = 8
HEADER_NAME = "header"
LOCK_NAME = "lock"
HEADER_BYTES = 4096

_MAGIC = b"scone-recycled\n\0"
_START = struct.Struct("<16sII")
_DISK_BYTES = struct.Struct("<Q")
_DISK_BYTES_AT = 24
_GENERATIONS = struct.Struct(f"<{NUM_SHARDS}I")
_GENERATIONS_AT = 64


class RecycledHeader:
    """Of the store in one folder. Reading is one look into memory; changes are made under `locked`."""

    def __init__(self, folder: Path) -> None:
        """Maps the header, making it first where there is none; raises CacheError."""
        self._folder = folder
        with self.locked():
            path = folder / HEADER_NAME
            if not path.exists():
                fresh = path.with_name(f"{HEADER_NAME}.new")
                start = _START.pack(_MAGIC, FORMAT_VERSION, NUM_SHARDS)
                fresh.write_bytes(start.ljust(HEADER_BYTES, b"\0"))
                os.replace(fresh, path)
            self._map = _map(path)

    @property
    def disk_bytes(self) -> int:
        number: int = _DISK_BYTES.unpack_from(self._map, _DISK_BYTES_AT)[0]
        return number

    @property
    def generations(self) -> tuple[int, ...]:
        return _GENERATIONS.unpack_from(self._map, _GENERATIONS_AT)

    def set_disk_bytes(self, disk_bytes: int) -> None:
        _DISK_BYTES.pack_into(self._map, _DISK_BYTES_AT, disk_bytes)

    def set_generation(self, shard: int, generation: int) -> None:
        struct.pack_into("<I", self._map, _GENERATIONS_AT + 4 * shard, generation)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time, and only one thread of it; given up if the process dies."""
        with (self._folder / LOCK_NAME).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self._map.close()


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        start = file.read(_START.size).ljust(_START.size, b"\0")
        magic, version, num_shards = _START.unpack(start)
        if magic != _MAGIC or path.stat().st_size != HEADER_BYTES:
            raise CacheError(f"{path} is not the header of a store of recycled states: name another folder")
        if (version, num_shards) != (FORMAT_VERSION, NUM_SHARDS):
            raise StoreVersionError(
                f"the recycled states in {path.parent} have format version {version}, this program has"
                f" {FORMAT_VERSION}: remove them with `scone recycled clear`, or name another folder"
            )
        return mmap.mmap(file.fileno(), HEADER_BYTES)
