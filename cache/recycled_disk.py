"""The disk tier of recycled states: one LMDB environment."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np

from scone.cache.errors import CacheError
from scone.cache.recycled_record import Record, kind_of
from scone.cache.recycled_stats import KINDS, Kind, RecycledStats
from scone.cache.state_worth import Worth

_HEAD = struct.Struct("<IIdd")


class RecycledDisk:
    """Records by name, on disk. Thread-safe; one thread writes."""

    def __init__(self, path: Path, disk_bytes: int, stats: RecycledStats) -> None:
        """Opens or makes the store in folder `path`; raises CacheError."""
        self._stats = stats
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(
                str(path), map_size=disk_bytes, metasync=False, readahead=False, max_readers=512
            )
        except (OSError, lmdb.Error) as error:
            raise CacheError(f"cannot open the store of recycled states {path}: {error}") from None

    def held(self, names: Sequence[bytes]) -> list[bool]:
        with self._env.begin(buffers=True) as txn:
            return [txn.get(name) is not None for name in names]

    def get(self, name: bytes) -> tuple[Record, Worth] | None:
        with self._env.begin(buffers=True) as txn:
            value = txn.get(name)
            if value is None:
                return None
            crc, num_ids, density, uses = _HEAD.unpack_from(value)
            body = np.frombuffer(value, np.uint8)[_HEAD.size :].copy()
        return Record(name, body[:num_ids].tobytes(), body[num_ids:], crc), Worth(density, uses)

    def write(self, records: Sequence[tuple[Record, Worth]]) -> None:
        for record, worth in records:
            head = _HEAD.pack(record.crc, len(record.ids), worth.density, worth.uses)
            try:
                with self._env.begin(write=True) as txn:
                    txn.put(record.name, head + record.ids + record.payload.tobytes())
            except lmdb.MapFullError:
                self._stats.add_write(kind_of(record.name), "failed")
            else:
                self._stats.add_stored(kind_of(record.name), "disk", len(record.payload))

    def discard(self, name: bytes) -> None:
        with self._env.begin(write=True) as txn:
            txn.delete(name)

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Entries and payload bytes by kind."""
        found = {kind: [0, 0] for kind in KINDS}
        with self._env.begin(buffers=True) as txn:
            for name, value in txn.cursor():
                num_ids = _HEAD.unpack_from(value)[1]
                found[kind_of(bytes(name))][0] += 1
                found[kind_of(bytes(name))][1] += len(value) - _HEAD.size - num_ids
        return {kind: (entries, num_bytes) for kind, (entries, num_bytes) in found.items()}

    def clear(self, kind: Kind | None = None) -> int:
        with self._env.begin(write=True) as txn:
            names = [bytes(name) for name, _ in txn.cursor()]
            names = [name for name in names if kind is None or kind_of(name) == kind]
            for name in names:
                txn.delete(name)
        return len(names)

    def set_budget(self, disk_bytes: int) -> None:
        self._env.set_mapsize(disk_bytes)

    def close(self) -> None:
        self._env.close()
