"""The RAM tier of recycled states: whole records, the least worth of them given up first."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_record import Record, kind_of
from scone.cache.recycled_stats import KINDS, Kind, RecycledStats
from scone.cache.state_worth import Worth, clock_of_memory, seconds_per_second

ENTRY_BYTES = 1024
"""What an entry takes beside its bytes: objects, the dictionary, the heap; counted into the budget."""


@dataclass(slots=True)
class _Entry:
    record: Record
    worth: Worth

    @property
    def num_bytes(self) -> int:
        return self.record.num_bytes + ENTRY_BYTES


class RecycledRam:
    """Records by name. Thread-safe; what it returns stays valid after an eviction."""

    def __init__(
        self, budget: MemoryBudget, stats: RecycledStats, clock: Callable[[], float] = time.time
    ) -> None:
        self._share = budget.join("recycled", self._evict, self._least_value)
        self._lock = budget.lock
        self._stats = stats
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}
        # (score, name): a score only rises, so one that is found too low is put back with the present one.
        self._heap: list[tuple[float, bytes]] = []

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    @property
    def used_bytes(self) -> int:
        return self._share.used_bytes

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Entries and payload bytes by kind."""
        with self._lock:
            found = {kind: [0, 0] for kind in KINDS}
            for name, entry in self._entries.items():
                found[kind_of(name)][0] += 1
                found[kind_of(name)][1] += len(entry.record.payload)
        return {kind: (entries, num_bytes) for kind, (entries, num_bytes) in found.items()}

    def get(self, name: bytes) -> Record | None:
        """The record, used once more by this."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return None
            entry.worth = entry.worth.used(clock_of_memory(self._clock()))
            return entry.record

    def wants(self, record: Record, worth: Worth) -> bool:
        """Whether `put` has a chance."""
        return self._share.may_reserve(record.num_bytes + ENTRY_BYTES, self._value(worth.score))

    def put(self, record: Record, worth: Worth) -> bool:
        """Keeps the record if it is worth more than what it would displace."""
        with self._lock:
            self.discard(record.name)
            entry = _Entry(record, worth)
            if not self._share.reserve(entry.num_bytes, self._value(worth.score)):
                return False
            record.payload.setflags(write=False)  # handed out without a copy
            self._entries[record.name] = entry
            heapq.heappush(self._heap, (worth.score, record.name))
            if len(self._heap) > 2 * len(self._entries) + 64:  # leftovers of what was discarded
                self._heap = [(entry.worth.score, name) for name, entry in self._entries.items()]
                heapq.heapify(self._heap)
            return True

    def discard(self, name: bytes) -> None:
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is not None:
                self._share.release(entry.num_bytes)

    def clear(self, kind: Kind | None = None) -> int:
        """Drops all of a kind; returns how many."""
        with self._lock:
            names = [name for name in self._entries if kind is None or kind_of(name) == kind]
            for name in names:
                self.discard(name)
            return len(names)

    def close(self) -> None:
        self.clear()
        self._share.leave()

    def _value(self, score: float) -> float:
        return seconds_per_second(score, self._clock())

    def _least_value(self) -> float:
        score = self._least_score()
        return float("inf") if score is None else self._value(score)

    def _least_score(self) -> float | None:
        """The lowest present score; the head of the heap is then its entry's."""
        while self._heap:
            score, name = self._heap[0]
            entry = self._entries.get(name)
            if entry is not None and entry.worth.score <= score:
                return score
            heapq.heappop(self._heap)
            if entry is not None:
                heapq.heappush(self._heap, (entry.worth.score, name))
        return None

    def _evict(self, num_bytes: int, below: float) -> int:
        freed = 0
        while freed < num_bytes:
            score = self._least_score()
            if score is None or self._value(score) >= below:
                break
            _, name = heapq.heappop(self._heap)
            freed += self._entries[name].num_bytes
            self._stats.add_eviction(kind_of(name), "ram")
            self.discard(name)
        return freed
