"""The counters of a store of recycled states for Prometheus, taken from its own plain ones at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scone.cache.recycled_stats import KINDS, TIERS
from scone.cache.recycled_store import RecycledStore

WRITE_RESULTS = ("stored", "held", "dropped", "refused", "failed")
DAMAGE_REASONS = ("checksum", "token_ids", "size")


class RecycledCollector(Collector):
    """Exports one store; every label set from the first scrape on."""

    def __init__(self, store: RecycledStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield from self._by_kind()
        yield from self._by_tier()
        stats = self._store.stats
        yield CounterMetricFamily(
            "scone_recycled_damaged_files",
            "Files of the store that had to be begun afresh.",
            value=stats.damaged_files,
        )
        held = GaugeMetricFamily(
            "scone_recycled_held_bytes", "Bytes of states held, by kind and tier.", labels=["kind", "tier"]
        )
        for usage in self._store.usage():
            held.add_metric([usage.kind, usage.tier], usage.num_bytes)
        yield held
        budget = GaugeMetricFamily(
            "scone_recycled_budget_bytes", "What memory and disk states may take, by tier.", labels=["tier"]
        )
        budget.add_metric(["ram"], self._store.memory.total_bytes)
        budget.add_metric(["disk"], self._store.disk_bytes)
        yield budget

    def _by_kind(self) -> Iterator[Metric]:
        stats = self._store.stats
        queries = CounterMetricFamily("scone_recycled_queries", "States looked for.", labels=["kind"])
        hits = CounterMetricFamily("scone_recycled_hits", "States fetched.", labels=["kind"])
        num_bytes = CounterMetricFamily("scone_recycled_bytes", "Bytes of states fetched.", labels=["kind"])
        evictions = CounterMetricFamily("scone_recycled_evictions", "States evicted.", labels=["kind"])
        for kind in KINDS:
            queries.add_metric([kind], stats.queries[kind])
            hits.add_metric([kind], sum(stats.hits[kind, tier] for tier in TIERS))
            num_bytes.add_metric([kind], sum(stats.bytes_read[kind, tier] for tier in TIERS))
            evictions.add_metric([kind], sum(stats.evictions[kind, tier] for tier in TIERS))
        yield from (queries, hits, num_bytes, evictions)
        writes = CounterMetricFamily(
            "scone_recycled_writes", "States handed over to be kept, by result.", labels=["kind", "result"]
        )
        damaged = CounterMetricFamily(
            "scone_recycled_damaged", "States that were not what was stored.", labels=["kind", "reason"]
        )
        for kind in KINDS:
            for result in WRITE_RESULTS:
                writes.add_metric([kind, result], stats.writes[kind, result])
            for reason in DAMAGE_REASONS:
                damaged.add_metric([kind, reason], stats.damaged[kind, reason])
        yield from (writes, damaged)

    def _by_tier(self) -> Iterator[Metric]:
        stats = self._store.stats
        seconds = CounterMetricFamily(
            "scone_recycled_read_seconds", "Time that readers spent fetching states.", labels=["tier"]
        )
        for tier in TIERS:
            seconds.add_metric([tier], stats.read_seconds[tier])
        yield seconds
