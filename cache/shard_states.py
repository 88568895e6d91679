"""The states in one LMDB environment: four databases that agree with each other.

Every method is a part of its caller's transaction, which makes them agree: after a crash all of it is there,
or nothing. Which state is worth its place is the caller's to know.
"""

from __future__ import annotations

import struct
from typing import Any

import lmdb
import numpy as np

from scone.cache.chunk_reader import page_of
from scone.cache.recycled_layout import (
    LEAST_CHUNK_BYTES,
    Entry,
    chunk_key,
    cut,
    name_in_order_key,
    order_key,
    score_in_order_key,
)
from scone.cache.recycled_record import Record, kind_of
from scone.cache.recycled_stats import Kind
from scone.cache.state_worth import Worth

NUM_DATABASES = 4
_NUM_META_PAGES = 2
_CLOCK = b"clock"
_CLOCK_VALUE = struct.Struct("<d")
_USAGE = struct.Struct("<QQ")
_NEXT_ID = b"next"


class ShardStates:
    """Entries by name, names by score, chunks by state, counts; each `txn` is one of the environment.

    What writes raises lmdb.MapFullError where there is no room.
    """

    def __init__(self, env: lmdb.Environment) -> None:
        """Opens the databases, or makes them; raises lmdb.Error."""
        # In a transaction of ours: while it waits for one of its own to begin, LMDB's binding keeps the
        # interpreter's lock, and two processes that each open two files could wait for each other for ever.
        with env.begin(write=True) as txn:
            self.entries = env.open_db(b"entries", txn=txn)
            self._order = env.open_db(b"order", txn=txn)
            self.chunks = env.open_db(b"chunks", txn=txn)
            self._counts = env.open_db(b"counts", txn=txn)

    def entry(self, txn: Any, name: bytes) -> memoryview | None:
        """The bytes of an entry, in a transaction with buffers valid until its end."""
        value: memoryview | None = txn.get(name, db=self.entries)
        return value

    def names(self, txn: Any) -> list[bytes]:
        return list(txn.cursor(self.entries).iternext(values=False))

    def lowest(self, txn: Any) -> tuple[bytes, float] | None:
        """The state of the least score; None if there is none."""
        cursor = txn.cursor(self._order)
        if not cursor.first():
            return None
        return name_in_order_key(cursor.key()), score_in_order_key(cursor.key())

    def put(self, txn: Any, record: Record, worth: Worth) -> None:
        """Stores a state, unless another process was faster; in a transaction with buffers."""
        if self.entry(txn, record.name) is not None:
            return
        state_id = self._next_id(txn)
        self._set_next_id(txn, state_id + 1)
        pieces, pages = cut(record.num_bytes), list[int]()
        for chunk, (begin, end) in enumerate(pieces.bounds):
            key = chunk_key(state_id, chunk)
            part = record.part(begin, end)
            if len(part) < LEAST_CHUNK_BYTES:
                part = bytes(part).ljust(LEAST_CHUNK_BYTES, b"\0")
            txn.put(key, part, db=self.chunks, append=True)
            pages.append(page_of(txn.get(key, db=self.chunks)))
        entry = Entry(
            state_id,
            len(record.ids),
            record.payload.nbytes,
            record.crc,
            worth,
            np.array(pages, np.uint32),
            bytes(record.part(record.num_bytes - pieces.tail_bytes, record.num_bytes)),
        )
        txn.put(record.name, entry.to_bytes(), db=self.entries)
        txn.put(order_key(worth.score, record.name), b"", db=self._order)
        self._count(txn, kind_of(record.name), 1, record.payload.nbytes)

    def delete(self, txn: Any, name: bytes) -> bool:
        """Whether there was such a state."""
        value = txn.pop(name, db=self.entries)
        if value is None:
            return False
        entry = Entry.from_bytes(value)
        txn.delete(order_key(entry.worth.score, name), db=self._order)
        for chunk in range(len(entry.pages)):
            if not txn.delete(chunk_key(entry.state_id, chunk), db=self.chunks):
                break
        self._count(txn, kind_of(name), -1, -entry.num_payload_bytes)
        return True

    def touch(self, txn: Any, name: bytes, number: int, clock: float) -> None:
        """Notes `number` uses of a state, if it is there."""
        value = self.entry(txn, name)
        if value is None:
            return
        entry = Entry.from_bytes(value)
        worth = entry.worth
        for _ in range(number):
            worth = worth.used(clock).limited(clock)
        txn.delete(order_key(entry.worth.score, name), db=self._order)
        txn.put(order_key(worth.score, name), b"", db=self._order)
        txn.put(name, entry.rated(worth).to_bytes(), db=self.entries)

    def clock(self, txn: Any) -> float:
        """How often the file could have been filled by what was offered to it, as far as it was told."""
        turnovers: float = _CLOCK_VALUE.unpack(txn.get(_CLOCK, bytes(_CLOCK_VALUE.size), self._counts))[0]
        return turnovers

    def set_clock(self, txn: Any, turnovers: float) -> None:
        txn.put(_CLOCK, _CLOCK_VALUE.pack(turnovers), db=self._counts)

    def rewrite(self, txn: Any) -> None:
        """Writes something, and changes nothing."""
        self._set_next_id(txn, self._next_id(txn))

    def usage(self, txn: Any, kind: Kind) -> tuple[int, int]:
        """Entries and payload bytes of a kind."""
        entries, num_bytes = _USAGE.unpack(txn.get(kind.encode(), bytes(_USAGE.size), self._counts))
        return entries, num_bytes

    def used_pages(self, txn: Any) -> int:
        """All that are in use."""
        pages = _NUM_META_PAGES + 1
        for database in (self.entries, self._order, self.chunks, self._counts):
            stat = txn.stat(database)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages)

    def _next_id(self, txn: Any) -> int:
        return int.from_bytes(txn.get(_NEXT_ID, bytes(8), self._counts), "little")

    def _set_next_id(self, txn: Any, state_id: int) -> None:
        txn.put(_NEXT_ID, state_id.to_bytes(8, "little"), db=self._counts)

    def _count(self, txn: Any, kind: Kind, entries: int, num_bytes: int) -> None:
        counted = self.usage(txn, kind)
        now = _USAGE.pack(max(0, counted[0] + entries), max(0, counted[1] + num_bytes))
        txn.put(kind.encode(), now, db=self._counts)
