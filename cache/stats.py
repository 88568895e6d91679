"""Plain counters of one table's look-ups and reads; the server exports them, tests assert that they moved."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scone.kernels.match import MAX_N

READ_SECONDS_BUCKETS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Upper bounds for the histogram of read durations: from a few cached rows to a slow disk."""


TIER_NAMES = ("device", "ram", "disk")

_MAX_UNFOLDED = 1024
"""Reads noted and not counted yet, where nobody asks."""


@dataclass(slots=True)
class TierReads:
    """What was read from one tier.

    Attributes:
        num_bytes: of the stored rows.
        num_within: reads by index of the smallest of READ_SECONDS_BUCKETS that is not exceeded.
    """

    num_rows: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    num_within: list[int] = field(default_factory=lambda: [0] * (len(READ_SECONDS_BUCKETS) + 1))


class TableStats:
    """Counters that only grow. Read them at any time; writers hold the lock.

    Attributes:
        num_matched: (MAX_N + 1,) positions matched, by matched length (1: no f-gram). The matcher counts
            itself: done in Python, counting a step's matches costs more than finding them.
        prefetches: submitted reads by result: `inline` (nothing to wait for), `read`, `cancelled`,
            `failed`.
        rows_requested, rows_unique: rows asked of the prefetcher before and after removing repetitions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unfolded: deque[tuple[str, int, int, float]] = deque()
        self.num_matched: NDArray[np.int64] = np.zeros(MAX_N + 1, np.int64)
        self._by_tier: dict[str, TierReads] = {name: TierReads() for name in TIER_NAMES}
        self.prefetches: Counter[str] = Counter()
        self.rows_requested = 0
        self.rows_unique = 0

    @property
    def lookups(self) -> Counter[int]:
        """`num_matched` without its zeros."""
        return Counter({n: int(self.num_matched[n]) for n in self.num_matched.nonzero()[0].tolist()})

    @property
    def rows_read(self) -> Counter[str]:
        """Rows by tier, of tiers that were read from."""
        return Counter({name: tier.num_rows for name, tier in self.by_tier.items() if tier.num_rows})

    @property
    def by_tier(self) -> dict[str, TierReads]:
        """What was read from each tier."""
        self._fold()
        return self._by_tier

    def add_read(self, tier: str, num_rows: int, num_bytes: int, seconds: float) -> None:
        """Notes a read; it is counted when somebody asks, since that takes longer than to copy a few rows."""
        self._unfolded.append((tier, num_rows, num_bytes, seconds))
        if len(self._unfolded) > _MAX_UNFOLDED:
            self._fold()

    def _fold(self) -> None:
        with self._lock:
            for _ in range(len(self._unfolded)):
                tier, num_rows, num_bytes, seconds = self._unfolded.popleft()
                reads = self._by_tier[tier]
                reads.num_within[bisect_left(READ_SECONDS_BUCKETS, seconds)] += 1
                reads.num_rows += num_rows
                reads.num_bytes += num_bytes
                reads.seconds += seconds

    def add_device_rows(self, num_rows: int, num_bytes: int) -> None:
        """Rows that a device gathers itself: it is not waited for, so no duration is known."""
        reads = self._by_tier["device"]
        with self._lock:
            reads.num_rows += num_rows
            reads.num_bytes += num_bytes

    def add_prefetch(self, result: str) -> None:
        with self._lock:
            self.prefetches[result] += 1

    def add_requested(self, num_rows: int, num_unique: int) -> None:
        with self._lock:
            self.rows_requested += num_rows
            self.rows_unique += num_unique
