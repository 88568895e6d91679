"""Stores for tests: opened again and again, damaged, or slow to answer."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_store import RecycledStore

RAM_BYTES = 64 << 20


class Restarts:
    """A store in a folder, opened again and again as by one process after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._store: RecycledStore | None = None

    def open(self, ram_bytes: int = RAM_BYTES, kind: type[RecycledStore] = RecycledStore) -> RecycledStore:
        self.close()
        config = RecycledConfig(disk_bytes=256 << 20)
        self._store = kind.open(self.folder, config, MemoryBudget(ram_bytes))
        return self._store

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def flip_bits(self, payload: bytes) -> int:
        """Flips one bit wherever `payload` lies in the store's files; returns in how many places."""
        self.close()
        count = 0
        for path in self.folder.iterdir():
            data = bytearray(path.read_bytes())
            at = data.find(payload)
            while at >= 0:
                data[at] ^= 0x10
                count += 1
                at = data.find(payload, at + 1)
            path.write_bytes(data)
        return count

    def remove(self) -> None:
        """Deletes the store."""
        self.close()
        shutil.rmtree(self.folder)


class SlowStore(RecycledStore):
    """Reads and look-ups of `held` kinds of call do not end until `released` is set."""

    held: frozenset[str] = frozenset()
    released: threading.Event

    def read(self, *args: Any) -> NDArray[np.uint8] | None:
        self._wait("read")
        return super().read(*args)

    def locate(self, *args: Any, **options: Any) -> Any:
        self._wait("locate")
        return super().locate(*args, **options)

    def _wait(self, call: str) -> None:
        if call in self.held:
            assert self.released.wait(60)
