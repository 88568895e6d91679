"""What the last rows of a table's RAM tier are worth: the time that they save, by how often they are read.

Rows lie by falling corpus count, so the last one is the least read. Counts of single rows are not at hand
while serving; they are taken to fall as a power of the rank between the first and the last, which the
manifest gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from scone.cache.stats import TableStats
from scone.model_store.manifest import TableManifest

_HALF_LIFE_SECONDS = 600.0
_LEAST_WINDOW_SECONDS = 1.0
_UNSEEN_RATE = 1e12
_UNMEASURED_READ_SECONDS = 50e-6
"""Of a row from the disk, until one has been read."""


class RowWorth:
    """Of one table; called under the budget's lock."""

    def __init__(
        self, manifest: TableManifest, stats: TableStats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._row_bytes = manifest.row_bytes
        self._stats = stats
        self._clock = clock
        ratio = max(manifest.max_count, 1) / max(manifest.min_count, 1)
        self._exponent = math.log(ratio) / math.log(max(manifest.num_fgrams, 2))
        self._total = _power_sum(manifest.num_fgrams, self._exponent)
        self._looked_at = clock()
        self._num_read = self._rows_read()
        self._weighted_rate = 0.0
        self._weight = 0.0  # of what was seen so far; it approaches 1

    def least_value(self, num_rows: int) -> float:
        """Seconds saved per second and byte by the last of `num_rows` rows."""
        if num_rows == 0:
            return math.inf  # there is nothing to give back
        share = math.pow(num_rows, -self._exponent) / self._total
        return self._reads_per_second() * share * self._read_seconds() / self._row_bytes

    def _rows_read(self) -> int:
        return self._stats.by_tier["ram"].num_rows + self._stats.by_tier["disk"].num_rows

    def _reads_per_second(self) -> float:
        """Of late: what was read longer ago counts half as much every ten minutes."""
        seconds = self._clock() - self._looked_at
        if seconds >= _LEAST_WINDOW_SECONDS:
            num_read = self._rows_read()
            kept = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
            self._weight = kept * self._weight + 1 - kept
            self._weighted_rate = (
                kept * self._weighted_rate + (1 - kept) * (num_read - self._num_read) / seconds
            )
            self._looked_at, self._num_read = self._clock(), num_read
        # Before anything was seen, rows are not to be given up for anything.
        return self._weighted_rate / self._weight if self._weight else _UNSEEN_RATE

    def _read_seconds(self) -> float:
        disk = self._stats.by_tier["disk"]
        return disk.seconds / disk.num_rows if disk.num_rows else _UNMEASURED_READ_SECONDS


def _power_sum(count: int, exponent: float) -> float:
    """About the sum of r^-exponent over r = 1 .. count."""
    if abs(exponent - 1) < 1e-9:
        return 1 + math.log(count)
    return 1 + (math.pow(count, 1 - exponent) - 1) / (1 - exponent)
