"""The one door to recycled states: what was computed once is fetched, by content, instead of computed again.

RAM in front of a disk that the processes of a host share. A state's key names everything that it depends on
(`state_identity.py`); its token ids and a checksum are compared at every hit, so that whatever happened to
the bytes, the worst is a miss. Knows nothing of models: a state is bytes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from scone.cache.disk_speed import probe_disk
from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycle_cost import ReadSpeed
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_disk import RecycledDisk
from scone.cache.recycled_ram import RecycledRam
from scone.cache.recycled_record import Payload, Record, id_bytes, kind_of, state_key
from scone.cache.recycled_stats import KINDS, TIERS, Kind, RecycledStats, StateTier
from scone.cache.recycled_writer import Job, RecycledWriter
from scone.cache.state_worth import Worth, clock_of_memory

_ROUND_SECONDS = 1.0
_MAX_USES = 10_000
_IN_FLIGHT_SHARE = 8
LEAST_QUEUE_BYTES = 4 << 20
"""What may wait to be written however small the RAM budget is, beyond it if need be."""

TokenIds = NDArray[np.int32] | bytes


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds of a kind."""

    kind: Kind
    tier: StateTier
    num_entries: int
    num_bytes: int


class RecycledStore:
    """Content-addressed states. Thread-safe.

    Attributes:
        read_speeds: what reads took so far, by tier; `RecycleCost` decides by them.
        memory: the budget, which others may share.

    Example:
        with RecycledStore.open(None, RecycledConfig(), MemoryBudget(1 << 20)) as store:
            store.write("results", key, token_ids, vector, cost_seconds=0.1)
            store.flush(1.0)
            payload = store.read("results", key, token_ids)
    """

    def __init__(
        self,
        disk: RecycledDisk | None,
        config: RecycledConfig,
        memory: MemoryBudget,
        stats: RecycledStats,
        clock: Callable[[], float],
    ) -> None:
        """Use `open`."""
        self.stats = stats
        self.read_speeds: dict[StateTier, ReadSpeed] = {tier: ReadSpeed() for tier in TIERS}
        self._clock = clock
        self.memory = memory
        self._disk = disk
        self._ram = RecycledRam(memory, stats, clock)
        self._uses: Counter[bytes] = Counter()
        self._uses_lock = threading.Lock()
        self._next_round = 0.0
        # Payloads on their way belong to the budget too, but a small one must not stop all writing.
        self._in_flight = memory.join("recycled writes")
        num_bytes = min(config.queue_bytes, memory.total_bytes // _IN_FLIGHT_SHARE)
        self._in_flight.reserve(num_bytes)
        self._writer = RecycledWriter(self, stats, config.queue_length, max(num_bytes, LEAST_QUEUE_BYTES))

    @classmethod
    def open(
        cls,
        path: Path | None,
        config: RecycledConfig,
        memory: MemoryBudget,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Opens or makes the store in folder `path`; None keeps states in RAM alone. Raises CacheError."""
        stats = RecycledStats()
        disk = None if path is None else RecycledDisk(path, config.disk_bytes, stats)
        return cls(disk, config, memory, stats, clock)

    def find(self, kind: Kind, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the first on, are held; reads no payload."""
        return len(self.locate(kind, keys))

    def locate(self, kind: Kind, keys: Sequence[bytes], *, again: bool = False) -> list[StateTier]:
        """The tier of each of `keys`, from the first on, until one is not held.

        `again`: the states were asked for by other keys before, and are not counted as further queries.
        """
        if not again:
            self.stats.add_queries(kind, len(keys))
        names = [state_key(kind, key) for key in keys]
        in_ram = [name in self._ram for name in names]
        on_disk: list[bool] = [False] * len(names)
        if self._disk is not None and not all(in_ram):
            on_disk = self._disk.held(names)
        tiers: list[StateTier] = []
        for ram, disk in zip(in_ram, on_disk, strict=True):
            if not (ram or disk):
                break
            tiers.append("ram" if ram else "disk")
        return tiers

    def announce(self, kind: Kind, keys: Sequence[bytes]) -> None:
        """Says that these will be read at once, so that the disk has them under way all together.

        For worker threads, as `read`; `keys` are as many as the page cache may hold beside all else.
        """
        if self._disk is not None:
            names = (state_key(kind, key) for key in keys)
            self._disk.will_need([name for name in names if name not in self._ram])

    def read(
        self, kind: Kind, key: bytes, token_ids: TokenIds, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8] | None:
        """The payload, verified, in `out` if given; may wait for a disk: for worker threads.

        Args:
            token_ids: must equal those written.
            out: as many bytes as the payload has, contiguous or in rows (n, row_bytes) that are; undefined
                after a miss. Without it the array returned is shared and not to be changed.

        Returns:
            None is a miss: absent, torn, damaged, of other token ids, or of another size than `out`.
        """
        name, ids = state_key(kind, key), id_bytes(token_ids)
        began = time.perf_counter()
        for tier in TIERS:
            record, worth = self._look_up(tier, name, out)
            if record is None:
                continue
            fault = record.fault(ids)
            if fault is None and out is not None and out.nbytes != record.payload.nbytes:
                fault = "size"
            if fault is None:
                payload = self._hand_out(record, worth, out)
                self._note_hit(kind, tier, payload.nbytes, time.perf_counter() - began)
                return payload
            self.stats.add_damaged(kind, fault)
            if fault != "checksum":
                break  # what is stored is sound, but not what was asked for
            self._discard(tier, name)
        self.stats.add_miss(kind)
        return None

    def _note_hit(self, kind: Kind, tier: StateTier, num_bytes: int, seconds: float) -> None:
        self.stats.add_hit(kind, tier, num_bytes, seconds)
        with self._uses_lock:
            self.read_speeds[tier].add(num_bytes, seconds)

    def _look_up(
        self, tier: StateTier, name: bytes, out: NDArray[np.uint8] | None
    ) -> tuple[Record | None, Worth | None]:
        """The record, and of one from the disk what it is worth."""
        if tier == "ram":
            return self._ram.get(name), None
        found = None if self._disk is None else self._disk.read(name, out)
        return (None, None) if found is None else found

    def _hand_out(
        self, record: Record, worth: Worth | None, out: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """The payload, in `out` if given; the use is noted, and a record from the disk kept in RAM."""
        now = self._clock()
        if self._disk is not None:
            with self._uses_lock:
                if len(self._uses) < _MAX_USES:
                    self._uses[record.name] += 1
        # Its uses on disk are told by another clock.
        in_ram = None if worth is None else self._worth_in_ram(worth.used_once(clock_of_memory(now)), record)
        if in_ram is not None and self._ram.wants(record, in_ram):
            own = record.payload.copy().reshape(-1) if record.payload is out else record.payload
            self._ram.put(replace(record, payload=own, sums=None), in_ram)
        if out is None:
            return record.payload
        if record.payload is not out:
            out[:] = record.payload.reshape(out.shape)
        return out

    def _worth_in_ram(self, worth: Worth, record: Record) -> Worth:
        """Of a state that is on disk as well, no more than a read from there is saved."""
        if self._disk is None:
            return worth
        return worth.capped(self.read_speeds["disk"].seconds(record.num_bytes), record.num_bytes)

    def _discard(self, tier: StateTier, name: bytes) -> None:
        if tier == "ram":
            self._ram.discard(name)
        elif self._disk is not None:
            self._disk.discard(name)

    def write(
        self,
        kind: Kind,
        key: bytes,
        token_ids: TokenIds,
        payload: Payload | Callable[[], Payload],
        *,
        cost_seconds: float,
        depth: int = 0,
        on_done: Callable[[], None] | None = None,
    ) -> bool:
        """Queues a write; never waits.

        Args:
            payload: a buffer that is not changed until `on_done`, or a callable that returns one, called on
                the writer's thread unless the state is held already.
            cost_seconds: what computing it again would take.
            depth: states before it in its chain, without which it is of no use.
            on_done: called exactly once, from whatever thread, when the payload is no longer looked at;
                before `write` returns if that is False.

        Returns:
            False: dropped and counted, since too much waits.
        """
        name, ids = state_key(kind, key), id_bytes(token_ids)
        return self._writer.submit(Job(name, ids, payload, cost_seconds, depth, on_done))

    @property
    def disk_bytes(self) -> int:
        """The disk's budget; 0 without a disk."""
        return 0 if self._disk is None else self._disk.disk_bytes

    @property
    def file_bytes(self) -> int:
        """What the store's files take."""
        return 0 if self._disk is None else self._disk.file_bytes

    def measure_disk(self) -> float | None:
        """Bytes per second that the disk reads at, by a probe that takes a while; None: it cannot be told."""
        return None if self._disk is None else probe_disk(self._disk.path)

    def set_budgets(self, *, ram_bytes: int | None = None, disk_bytes: int | None = None) -> None:
        """Changes what RAM (of all parties to the budget) and disk may be used, evicting what is too much.

        Raises CacheError, having changed nothing.
        """
        if disk_bytes is not None and self._disk is not None:
            self._disk.set_budget(disk_bytes)
        if ram_bytes is not None:
            self.memory.resize(ram_bytes)

    def usage(self) -> list[TierUsage]:
        """Entries and payload bytes by kind and tier."""
        tiers: list[tuple[StateTier, dict[Kind, tuple[int, int]]]] = [("ram", self._ram.usage())]
        if self._disk is not None:
            tiers.append(("disk", self._disk.usage()))
        return [TierUsage(kind, tier, *usage[kind]) for tier, usage in tiers for kind in KINDS]

    def clear(self, kind: Kind | None = None) -> int:
        """Drops all states (of a kind) from both tiers; returns how many."""
        num_in_ram = self._ram.clear(kind)
        return num_in_ram if self._disk is None else self._disk.clear(kind)

    def flush(self, timeout: float) -> bool:
        """Waits until all queued writes are done; False: they are not after `timeout` seconds."""
        return self._writer.flush(timeout)

    def close(self) -> None:
        """Ends the writer; writes that wait are dropped, those under way finish."""
        self._writer.close()
        self._ram.close()
        self._in_flight.leave()
        if self._disk is not None:
            self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the writer calls, on its thread.

    def holds(self, name: bytes) -> bool:
        return self._disk.held([name])[0] if self._disk is not None else name in self._ram

    def store(self, records: list[tuple[Record, float, int]]) -> None:
        clock = clock_of_memory(self._clock())
        rated = [(r, Worth.new(cost, r.num_bytes, depth, clock)) for r, cost, depth in records]
        results = {}
        for record, worth in rated:
            kept = self._ram.put(record, self._worth_in_ram(worth, record))
            results[record.name] = "stored" if kept else "refused"
            if kept:
                self.stats.add_stored(kind_of(record.name), "ram", len(record.payload))
        if self._disk is not None:
            results |= self._disk.write(rated)
        for name, result in results.items():
            self.stats.add_write(kind_of(name), result)

    def idle(self) -> None:
        """Notes uses on disk now and then, and lets go of files that another process has replaced."""
        if self._disk is None or self._clock() < self._next_round:
            return
        self._next_round = self._clock() + _ROUND_SECONDS
        with self._uses_lock:
            uses, self._uses = self._uses, Counter()
        if uses:
            self._disk.touch(uses)
        self._disk.refresh()
