"""The table's counters for Prometheus, taken from its own plain ones at each scrape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scone.cache.stats import READ_SECONDS_BUCKETS
from scone.server.served_table import ServedTable

PREFETCH_RESULTS = ("inline", "read", "cancelled", "failed")
RESIDENT_INTERVAL_SECONDS = 15.0
"""The kernel walks page tables to answer; not at every scrape."""


class TableCollector(Collector):
    """Exports one table; every label set from the first scrape on."""

    def __init__(self, served: ServedTable, proc: Path = Path("/proc/self")) -> None:
        self._served = served
        self._proc = proc
        self._resident_bytes: int | None = None
        self._resident_at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield self._read_seconds()
        yield from self._gauges()

    def _counters(self) -> Iterator[Metric]:
        table, stats = self._served.table, self._served.table.stats
        lookups = CounterMetricFamily(
            "scone_fgram_lookups", "Positions matched, by length of the f-gram; 1 is no match.", labels=["n"]
        )
        for n in range(1, table.max_n + 1):
            lookups.add_metric([str(n)], stats.lookups[n])
        yield lookups
        rows = CounterMetricFamily("scone_fgram_rows_read", "Rows read, by tier.", labels=["tier"])
        num_bytes = CounterMetricFamily("scone_fgram_bytes_read", "Bytes of those rows.", labels=["tier"])
        for tier in table.tier_names:
            rows.add_metric([tier], stats.by_tier[tier].num_rows)
            num_bytes.add_metric([tier], stats.by_tier[tier].num_bytes)
        yield from (rows, num_bytes)
        prefetches = CounterMetricFamily("scone_fgram_prefetch", "Reads by result.", labels=["result"])
        for result in PREFETCH_RESULTS:
            prefetches.add_metric([result], stats.prefetches[result])
        yield prefetches
        yield CounterMetricFamily(
            "scone_fgram_rows_requested", "Rows asked of the prefetcher.", value=stats.rows_requested
        )
        yield CounterMetricFamily(
            "scone_fgram_rows_unique", "The same without repetitions within a read.", value=stats.rows_unique
        )

    def _read_seconds(self) -> Metric:
        stats = self._served.table.stats
        seconds = HistogramMetricFamily("scone_fgram_read_seconds", "Duration of reads.", labels=["tier"])
        for tier in self._served.table.tier_names:
            reads = stats.by_tier[tier]
            bounds = (*map(str, READ_SECONDS_BUCKETS), "+Inf")
            totals = map(float, accumulate(reads.num_within))
            seconds.add_metric([tier], list(zip(bounds, totals, strict=True)), sum_value=reads.seconds)
        return seconds

    def _gauges(self) -> Iterator[Metric]:
        table, manifest = self._served.table, self._served.table.manifest
        info = {
            "name": self._served.name,
            "generation": str(self._served.current.number),
            "table_id": manifest.table_id,
            "codec": manifest.codec,
            "backend": manifest.backend,
            "dtype": manifest.dtype,
            "dim": str(manifest.dim),
            "max_n": str(manifest.max_n),
        }
        described = GaugeMetricFamily("scone_table_info", "The served table; always 1.", labels=list(info))
        described.add_metric(list(info.values()), 1)
        yield described
        rows = GaugeMetricFamily("scone_table_rows", "Rows of the table by tier.", labels=["tier"])
        for tier in table.tiers:
            rows.add_metric([tier.name], tier.num_rows)
        yield rows
        yield GaugeMetricFamily(
            "scone_table_mapped_bytes",
            "Bytes of mapped files.",
            value=table.mapped_bytes,
        )
        resident = self._resident()
        if resident is not None:
            yield GaugeMetricFamily(
                "scone_table_resident_bytes", "Bytes of those mappings that are in memory.", value=resident
            )

    def _resident(self) -> int | None:
        now = time.monotonic()
        if now - self._resident_at > RESIDENT_INTERVAL_SECONDS:
            self._resident_at = now
            self._resident_bytes = resident_bytes(self._served.current.folder, self._proc)
        return self._resident_bytes


def resident_bytes(folder: Path, proc: Path) -> int | None:
    """Resident bytes of the mappings of files in `folder`; None without /proc. Source: proc(5), smaps."""
    prefix = f"{folder.resolve()}/"
    total, is_ours = 0, False
    try:
        with open(proc / "smaps", encoding="utf-8", errors="surrogateescape") as smaps:
            for line in smaps:
                head, _, rest = line.partition(" ")
                if not head.endswith(":"):
                    parts = rest.split(maxsplit=4)
                    is_ours = len(parts) == 5 and parts[4].startswith(prefix)
                elif is_ours and head == "Rss:":
                    total += int(rest.split()[0]) * 1024
    except OSError:
        return None
    return total
