"""The disk tier of recycled states: shards in one folder, shared by the processes of a host.

A shard that is to become smaller, is cleared, or turns out to be damaged is not repaired but replaced by a
file of the next generation; the header says which one counts. So a file system gets its bytes back, a process
that still reads the former file is not disturbed, and damage costs an eighth of the states.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import lmdb

from scone.cache.errors import CacheError
from scone.cache.recycled_config import LEAST_DISK_BYTES
from scone.cache.recycled_header import HEADER_BYTES, HEADER_NAME, LOCK_NAME, NUM_SHARDS, RecycledHeader
from scone.cache.recycled_layout import PAGE_BYTES
from scone.cache.recycled_record import Bytes, kind_of
from scone.cache.recycled_shard import DAMAGE, Rated, RecycledShard, fits
from scone.cache.recycled_stats import KINDS, Kind, RecycledStats
from scone.cache.shared_lock import SharedLock

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOCK_FILE_BYTES = 32 << 10
"""LMDB's, of one shard: a cache line for each reader."""
_BATCH_SHARE = 32
_MAX_FAILURES = 16


class _Place:
    """One shard's place: the file that this process has open there, and who uses it."""

    def __init__(self) -> None:
        self.lock = SharedLock()
        self.shard: RecycledShard | None = None
        self.generation = -1
        self.num_failures = 0


class RecycledDisk:
    """Records by name, on disk. Thread-safe.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, disk_bytes: int | None, stats: RecycledStats) -> None:
        """Opens or makes the store in folder `path`; raises CacheError.

        `disk_bytes` becomes the budget of every process that shares the store; None leaves it as it is.
        """
        self.path = path
        self._stats = stats
        self._places = [_Place() for _ in range(NUM_SHARDS)]
        self._last_error = ""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._header = RecycledHeader(path)
            self._sweep()
            self.set_budget(disk_bytes or self._header.disk_bytes or LEAST_DISK_BYTES)
        except (OSError, lmdb.Error) as error:
            raise CacheError(f"cannot open the store of recycled states {path}: {error}") from None

    @property
    def disk_bytes(self) -> int:
        """The budget."""
        return self._header.disk_bytes

    @property
    def file_bytes(self) -> int:
        """What the store's files take."""
        num_bytes = 0
        for file in self.path.iterdir():
            with suppress(FileNotFoundError):  # replaced meanwhile
                num_bytes += file.stat().st_size
        return num_bytes

    def held(self, names: Sequence[bytes]) -> list[bool]:
        """Which are there; reads entries, no payload."""
        places: dict[int, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            places[_place_of(name)].append(index)
        found = [False] * len(names)
        for place, indices in places.items():
            for index, is_held in zip(indices, self._held(place, [names[i] for i in indices]), strict=True):
                found[index] = is_held
        return found

    def will_need(self, names: Sequence[bytes]) -> None:
        """As RecycledShard.will_need."""
        places: dict[int, list[bytes]] = defaultdict(list)
        for name in names:
            places[_place_of(name)].append(name)
        for place, its_names in places.items():
            self._run(place, partial(RecycledShard.will_need, names=its_names), None)

    def read(self, name: bytes, out: Bytes | None) -> Rated | None:
        """As RecycledShard.read."""
        return self._run(_place_of(name), lambda shard: shard.read(name, out), None)

    def write(self, records: Sequence[Rated]) -> dict[bytes, str]:
        """Stores what is worth it; a result of RecycledStats.writes by name."""
        share = self._share_bytes()
        results: dict[bytes, str] = {}
        batches: dict[int, list[list[Rated]]] = defaultdict(list)
        room: dict[int, int] = defaultdict(int)
        for record, worth in records:
            place = _place_of(record.name)
            if not fits(record.num_bytes, share):
                results[record.name] = "refused"
                continue
            room[place] -= record.num_bytes
            if room[place] < 0:
                batches[place].append([])
                room[place] = share // _BATCH_SHARE
            batches[place][-1].append((record, worth))
        for place, parts in batches.items():
            for part in parts:
                results |= self._write(place, part)
        return results

    def touch(self, uses: Mapping[bytes, int]) -> None:
        """As RecycledShard.touch."""
        by_place: dict[int, dict[bytes, int]] = defaultdict(dict)
        for name, number in uses.items():
            by_place[_place_of(name)][name] = number
        for place, its_uses in by_place.items():
            self._run(place, partial(RecycledShard.touch, uses=its_uses), None)

    def discard(self, name: bytes) -> None:
        """Deletes a state, if it is there."""
        self._run(_place_of(name), lambda shard: shard.delete([name]), 0)

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Entries and payload bytes by kind."""
        total = dict.fromkeys(KINDS, (0, 0))
        for place in range(NUM_SHARDS):
            usage = self._run(place, RecycledShard.usage, dict.fromkeys(KINDS, (0, 0)))
            for kind, (entries, num_bytes) in usage.items():
                total[kind] = (total[kind][0] + entries, total[kind][1] + num_bytes)
        return total

    def clear(self, kind: Kind | None = None) -> int:
        """Drops all states (of a kind); returns how many. All of them: the file system has its bytes back."""
        usage = self.usage()
        if kind is not None:
            for place in range(NUM_SHARDS):
                self._run(place, partial(RecycledShard.clear, kind=kind), 0)
            return usage[kind][0]
        for place in range(NUM_SHARDS):
            self._replace(place, self._header.generations[place])
        return sum(entries for entries, _ in usage.values())

    def set_budget(self, disk_bytes: int) -> None:
        """Sets the budget of all processes; when it returns, the files are within it.

        Of a smaller budget: states of least worth go, and what is left is copied to smaller files, shard by
        shard. Where the copy would not fit beside the rest within the former budget, one shard's states are
        dropped to make room.
        """
        if disk_bytes < LEAST_DISK_BYTES:
            raise CacheError(f"disk_bytes is {disk_bytes}, wanted at least {LEAST_DISK_BYTES}")
        with self._header.locked():
            former = self._header.disk_bytes
            self._header.set_disk_bytes(disk_bytes)
        for place in range(NUM_SHARDS):
            if self._run(place, lambda shard: shard.file_bytes, 0) > self._share_bytes():
                self._shrink(place, max(former, disk_bytes))

    def refresh(self) -> None:
        """Changes over to files that other processes have put in place, so that former ones can go."""
        for place in range(NUM_SHARDS):
            self._run(place, RecycledShard.forget_killed_readers, None)

    def close(self) -> None:
        for place in self._places:
            with place.lock.exclusive():
                if place.shard is not None:
                    place.shard.close()
                    place.shard = None
        self._header.close()

    def _held(self, place: int, names: list[bytes]) -> list[bool]:
        return self._run(place, lambda shard: shard.held(names), [False] * len(names))

    def _write(self, place: int, records: list[Rated]) -> dict[bytes, str]:
        evicted: list[bytes] = []
        failed = {record.name: "failed" for record, _ in records}
        results = self._run(place, lambda shard: shard.write(records, evicted), failed)
        for name in evicted:
            self._stats.add_eviction(kind_of(name), "disk")
        for record, _ in records:
            if results[record.name] == "stored":
                self._stats.add_stored(kind_of(record.name), "disk", len(record.payload))
        # A file in which nothing can be written for long, whatever is evicted: some snapshot never ends.
        failures = self._places[place].num_failures + 1 if "failed" in results.values() else 0
        self._places[place].num_failures = failures
        if failures >= _MAX_FAILURES:
            logger.warning("shard %d of %s takes no more writes: it begins afresh", place, self.path)
            self._places[place].num_failures = 0
            self._replace(place, self._places[place].generation)
        return results

    # Files

    def _file(self, place: int, generation: int) -> Path:
        return self.path / f"shard-{place}.{generation}.lmdb"

    def _share_bytes(self) -> int:
        """What the data file of one shard may take."""
        common = HEADER_BYTES + NUM_SHARDS * _LOCK_FILE_BYTES
        return (self._header.disk_bytes - common) // NUM_SHARDS // PAGE_BYTES * PAGE_BYTES

    def _run(self, place: int, use: Callable[[RecycledShard], T], otherwise: T) -> T:
        """What `use` of the place's shard gives; `otherwise` if that fails. A damaged file is replaced."""
        try:
            try:
                with self._current(place) as shard:
                    return use(shard)
            except lmdb.MapResizedError:  # another process has a larger budget already
                self._adopt(place, force=True)
                with self._current(place) as shard:
                    return use(shard)
        except DAMAGE as error:
            logger.error("shard %d of %s is damaged and begins afresh: %s", place, self.path, error)
            self._stats.add_damaged_file()
            self._replace(place, self._places[place].generation)
        except (OSError, lmdb.Error) as error:
            if str(error) != self._last_error:  # a full disk fails every write
                logger.warning("recycled states in %s: %s", self.path, error)
            self._last_error = str(error)
        return otherwise

    @contextmanager
    def _current(self, index: int) -> Iterator[RecycledShard]:
        """The shard as the header says, open for so long."""
        place = self._places[index]
        while True:
            with place.lock.shared():
                shard = place.shard
                if (
                    shard is not None
                    and place.generation == self._header.generations[index]
                    and shard.map_bytes == self._share_bytes()
                ):
                    yield shard
                    return
            self._adopt(index)

    def _adopt(self, index: int, *, force: bool = False) -> None:
        """Opens the file that the header names, with the budget that it names."""
        place = self._places[index]
        with place.lock.exclusive():
            generation, share = self._header.generations[index], self._share_bytes()
            if place.shard is not None and place.generation == generation:
                if force or place.shard.map_bytes != share:
                    place.shard.resize(share)
                return
            if place.shard is not None:
                place.shard.close()
                place.shard = None
            path = self._file(index, generation)
            place.generation = generation
            try:
                shard = RecycledShard(path, share)
            except FileNotFoundError:
                if self._header.generations[index] == generation:
                    raise
                return  # replaced while it was being opened
            if self._header.generations[index] == generation:
                place.shard = shard
            else:  # replaced, and perhaps made again by opening it
                shard.close()
                _unlink(path)

    def _replace(self, index: int, generation: int, fill: Callable[[Path], None] | None = None) -> None:
        """Puts a file of the next generation in place of this one: empty, or as `fill` makes it.

        Nothing is done if another process has replaced it already.
        """
        with self._header.locked():
            if self._header.generations[index] == generation:
                path = self._file(index, generation + 1)
                _unlink(path)  # of somebody who was killed at this point
                if fill is not None:
                    fill(path)
                self._header.set_generation(index, generation + 1)
                _unlink(self._file(index, generation))
        with suppress(OSError, lmdb.Error):  # whoever uses it next meets the same, and says so
            self._adopt(index)

    def _shrink(self, index: int, allowed_bytes: int) -> None:
        """Brings the file within its share, `allowed_bytes` being what all files may take meanwhile."""
        evicted: list[bytes] = []

        def trimmed_of(shard: RecycledShard) -> tuple[int, bool, int]:
            return self._places[index].generation, shard.trim(evicted), shard.used_bytes()

        otherwise = (self._header.generations[index], False, 0)
        generation, trimmed, copy_bytes = self._run(index, trimmed_of, otherwise)
        for name in evicted:
            self._stats.add_eviction(kind_of(name), "disk")
        fits_beside = trimmed and self.file_bytes + copy_bytes <= allowed_bytes
        self._replace(index, generation, partial(self._copy, index) if fits_beside else None)

    def _copy(self, index: int, path: Path) -> None:
        try:
            with self._current(index) as shard:
                shard.copy_to(path, self._share_bytes())
        except (OSError, lmdb.Error) as error:
            logger.warning("the states of %s are dropped, since they cannot be copied: %s", path, error)
            _unlink(path)

    def _sweep(self) -> None:
        """Removes files that no process will look at: left behind by one that was killed."""
        with self._header.locked():
            current = {self._file(i, g).name for i, g in enumerate(self._header.generations)}
            for file in self.path.glob("shard-*.lmdb*"):
                if file.name.removesuffix("-lock") not in current:
                    file.unlink(missing_ok=True)


def is_store(path: Path) -> bool:
    """Whether there is a store of recycled states in folder `path`, of whatever version."""
    return (path / HEADER_NAME).is_file()


def remove_store(path: Path) -> None:
    """Deletes the files of a store, of whatever version; other files in the folder stay."""
    for file in (path / HEADER_NAME, path / LOCK_NAME, *path.glob("shard-*.lmdb*")):
        file.unlink(missing_ok=True)


def _place_of(name: bytes) -> int:
    return crc32(name) % NUM_SHARDS


def _unlink(path: Path) -> None:
    for file in (path, path.with_name(path.name + "-lock")):
        file.unlink(missing_ok=True)
