"""The store of recycled states that the server answers with, as operators see it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scone.cache.recycle_cost import RecycleCost
from scone.cache.recycled_stats import KINDS, TIERS, Kind
from scone.cache.recycled_store import RecycledStore
from scone.server.engine.block_forms import BlockForms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRecycled:
    """A store in use by an engine. Its methods read the disk: for worker threads.

    Attributes:
        path: the folder.
        forms: in which blocks are kept and restored.
        block_tokens: tokens of each.
    """

    path: str
    store: RecycledStore
    cost: RecycleCost
    forms: BlockForms
    block_tokens: int

    def view(self) -> Mapping[str, Any]:
        """What it holds, what it may, and what fetching and computing take."""
        tiers = {(u.kind, u.tier): u for u in self.store.usage()}
        stats = self.store.stats
        kept = self.forms.kept[0]
        break_even = self.cost.break_even_bytes_per_second(
            kept.block_bytes / self.block_tokens, kept.work_seconds / self.block_tokens
        )
        return {
            "path": self.path,
            "block_form": self.forms.reason,
            "kinds": [
                {
                    "kind": kind,
                    "tiers": [
                        {"tier": t, "entries": tiers[kind, t].num_entries, "bytes": tiers[kind, t].num_bytes}
                        for t in TIERS
                        if (kind, t) in tiers
                    ],
                    "queries": stats.queries[kind],
                    "hits": sum(stats.hits[kind, tier] for tier in TIERS),
                    "evictions": sum(stats.evictions[kind, tier] for tier in TIERS),
                    "dropped": stats.writes[kind, "dropped"],
                    "damaged": sum(n for (k, _), n in list(stats.damaged.items()) if k == kind),
                }
                for kind in KINDS
            ],
            "memory": {
                "total_bytes": self.store.memory.total_bytes,
                "used_bytes": self.store.memory.used_by_party(),
                "staging_bytes": self.forms.staging_bytes,
            },
            "disk": {"total_bytes": self.store.disk_bytes, "used_bytes": self.store.file_bytes},
            "cost": {
                "compute_tokens_per_second": 1 / self.cost.compute_seconds(1),
                "break_even_bytes_per_second": break_even,
                "read_bytes_per_second": {
                    tier: speed.bytes_per_second for tier, speed in self.store.read_speeds.items()
                },
            },
        }

    def resize(self, ram_bytes: int | None, disk_bytes: int | None) -> Mapping[str, Any]:
        """Sets budgets, evicting what is beyond them; what is left, as `view`. Raises CacheError."""
        self.store.set_budgets(ram_bytes=ram_bytes, disk_bytes=disk_bytes)
        logger.info(
            "budgets of recycled states: %d bytes in memory, with the table's rows, %d on disk",
            self.store.memory.total_bytes,
            self.store.disk_bytes,
        )
        return self.view()

    def clear(self, kind: Kind | None) -> int:
        """Drops all states (of a kind); returns how many."""
        return self.store.clear(kind)

    def close(self, flush_seconds: float) -> None:
        """After the engine has ended: waits that long for what it gave, then closes."""
        self.store.flush(flush_seconds)
        self.store.close()
