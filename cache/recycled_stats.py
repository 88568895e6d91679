"""Plain counters of a store of recycled states; the server exports them, tests assert that they moved."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Literal

Kind = Literal["blocks", "results", "layer_k"]
StateTier = Literal["ram", "disk"]
KINDS: tuple[Kind, ...] = ("blocks", "results", "layer_k")
TIERS: tuple[StateTier, ...] = ("ram", "disk")


class RecycledStats:
    """Counters that only grow, of this process. Read them at any time; writers hold the lock.

    Attributes:
        queries: keys that were asked for, by kind (`find`).
        hits: states handed out, by kind and tier (`ram`, `disk`).
        misses: reads without a result, by kind: absent, or one of `damaged`.
        damaged: by kind and reason: `checksum`, `token_ids` (others than asked for), `size`.
        damaged_files: files of the store that were replaced since LMDB could not use them.
        bytes_read: payload bytes handed out, by kind and tier.
        bytes_written: payload bytes stored, by kind and tier.
        writes: by kind and result: `stored`, `held` (it was there already), `dropped` (queue full),
            `refused` (worth less than what it would have displaced, or too large), `failed`.
        evictions: by kind and tier.
        read_seconds: by tier, of successful reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.queries: Counter[str] = Counter()
        self.hits: Counter[tuple[str, str]] = Counter()
        self.misses: Counter[str] = Counter()
        self.damaged: Counter[tuple[str, str]] = Counter()
        self.damaged_files = 0
        self.bytes_read: Counter[tuple[str, str]] = Counter()
        self.bytes_written: Counter[tuple[str, str]] = Counter()
        self.writes: Counter[tuple[str, str]] = Counter()
        self.evictions: Counter[tuple[str, str]] = Counter()
        self.read_seconds: dict[str, float] = {"ram": 0.0, "disk": 0.0}

    def add_queries(self, kind: Kind, num_keys: int) -> None:
        with self._lock:
            self.queries[kind] += num_keys

    def add_hit(self, kind: Kind, tier: str, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.hits[kind, tier] += 1
            self.bytes_read[kind, tier] += num_bytes
            self.read_seconds[tier] += seconds

    def add_miss(self, kind: Kind) -> None:
        with self._lock:
            self.misses[kind] += 1

    def add_damaged(self, kind: Kind, reason: str) -> None:
        with self._lock:
            self.damaged[kind, reason] += 1

    def add_damaged_file(self) -> None:
        with self._lock:
            self.damaged_files += 1

    def add_stored(self, kind: Kind, tier: str, num_bytes: int) -> None:
        with self._lock:
            self.bytes_written[kind, tier] += num_bytes

    def add_write(self, kind: Kind, result: str) -> None:
        with self._lock:
            self.writes[kind, result] += 1

    def add_eviction(self, kind: Kind, tier: str) -> None:
        with self._lock:
            self.evictions[kind, tier] += 1
