"""One shard of the disk tier: an LMDB environment in one file that never grows beyond its budget.

The map size is the budget, so LMDB itself refuses to let the file grow. Below it, states of least worth are
deleted before others are written, early enough: the pages that a transaction frees can be used again only
two transactions later, and not while an older snapshot is being read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lmdb
import numpy as np

from scone.cache.chunk_reader import ChunkReader
from scone.cache.recycled_layout import PAGE_BYTES, Entry, num_pages
from scone.cache.recycled_record import Bytes, Record, state_key
from scone.cache.recycled_stats import KINDS, Kind
from scone.cache.shard_states import NUM_DATABASES, ShardStates
from scone.cache.state_worth import Worth

logger = logging.getLogger(__name__)

MAX_READERS = 254
LEAST_SLACK_PAGES = 256
_SLACK_SHARE = 0.05
_MAX_DELETED = 32
"""States deleted in one transaction: each may copy some pages of the trees, and needs free ones for that."""
_COPIED_SHARE = 64
"""Of a file, what is in memory at a time when it is copied, but one state at least."""
_MAX_WASTED_SHARE = 0.25

DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB says when its file is not what it wrote."""

Rated = tuple[Record, Worth]


def slack_pages(map_bytes: int) -> int:
    """Pages kept free: those that trees are copied to, and those that are freed but not yet to be used."""
    return max(LEAST_SLACK_PAGES, int(map_bytes // PAGE_BYTES * _SLACK_SHARE))


def fits(num_bytes: int, map_bytes: int) -> bool:
    """Whether a state can be kept: it is written while as much again is free."""
    return 3 * num_pages(num_bytes) + slack_pages(map_bytes) <= map_bytes // PAGE_BYTES


class RecycledShard:
    """The states of one file. Thread-safe, but `resize` and `close` need other calls to be over."""

    def __init__(self, path: Path, map_bytes: int, *, syncs: bool = True) -> None:
        """Opens or makes the file; raises lmdb.Error and OSError.

        `syncs`: each transaction is on the disk when it ends; a copy is brought there as a whole.
        """
        self.path = path
        # metasync: a crash of the machine may undo the last transaction, and no more.
        self._env = lmdb.open(
            str(path),
            subdir=False,
            map_size=_map_size(path, map_bytes),
            metasync=False,
            sync=syncs,
            readahead=False,
            max_readers=MAX_READERS,
            max_dbs=NUM_DATABASES,
        )
        self.map_bytes = map_bytes
        self._offered = 0.0  # what the file's clock does not know of yet
        try:
            # In this order: another process may be writing, and the file grows before the number does.
            needed_bytes = (self._env.info()["last_pgno"] + 1) * PAGE_BYTES
            if path.stat().st_size < needed_bytes:
                raise lmdb.CorruptedError(f"{path} was cut short")
            self.forget_killed_readers()
            self._states = ShardStates(self._env)
            self._reader = ChunkReader(path)
        except BaseException:
            self._env.close()
            raise

    @property
    def file_bytes(self) -> int:
        return self._reader.file_bytes

    @property
    def limit_pages(self) -> int:
        return self.map_bytes // PAGE_BYTES

    def forget_killed_readers(self) -> None:
        """A process that was killed while it read would keep pages from being used again."""
        self._env.reader_check()

    def held(self, names: Iterable[bytes]) -> list[bool]:
        with self._env.begin(buffers=True) as txn:
            return [self._states.entry(txn, name) is not None for name in names]

    def will_need(self, names: Iterable[bytes]) -> None:
        """Has the kernel read the payloads of those that are there ahead; does not wait for them."""
        with self._env.begin(buffers=True) as txn:
            for name in names:
                value = self._states.entry(txn, name)
                if value is not None:
                    self._reader.will_need(self._entry(value))

    def read(self, name: bytes, out: Bytes | None) -> Rated | None:
        """The record, its payload in `out` if that has its size; not verified. Waits for the disk.

        Where it cannot be read, bytes are undefined. The snapshot that is held meanwhile keeps the pages from
        being used again.
        """
        with self._env.begin(buffers=True) as txn:
            value = self._states.entry(txn, name)
            if value is None:
                return None
            entry = self._entry(value)
            ids = np.empty(entry.num_id_bytes, np.uint8)
            payload = out
            if payload is None or payload.nbytes != entry.num_payload_bytes:
                payload = np.empty(entry.num_payload_bytes, np.uint8)
            try:
                sums = self._reader.read(entry, ids, payload)
            except OSError as error:
                logger.warning("a state in %s cannot be read: %s", self.path, error)
                sums = None
        return Record(name, ids.tobytes(), payload, entry.crc, sums), entry.worth

    def _entry(self, value: memoryview) -> Entry:
        entry = Entry.from_bytes(value)
        if entry.num_bytes > self.map_bytes:
            raise lmdb.CorruptedError(f"an entry of {self.path} has {entry.num_bytes} bytes")
        return entry

    def write(self, records: Sequence[Rated], evicted: list[bytes]) -> dict[bytes, str]:
        """Stores what is worth it, in one transaction, after evicting what is worth less.

        Args:
            records: together small against the file; each counts as used once, now.
            evicted: names of what had to go are appended.

        Returns:
            By name `stored`, `held`, `refused` or `failed`.
        """
        held = self.held(record.name for record, _ in records)
        results = {record.name: "held" for record, _ in records}
        with self._env.begin() as txn:
            clock = self._clock(txn)
        wanted = [
            (r, w.used_once(clock)) for (r, w), is_held in zip(records, held, strict=True) if not is_held
        ]
        self._offered += sum(record.num_bytes for record, _ in wanted) / self.map_bytes
        wanted.sort(key=lambda rated: -rated[1].score)
        need = 0
        for index, (record, worth) in enumerate(wanted):
            need += num_pages(record.num_bytes)
            if self._make_room(2 * need, worth.score, evicted):
                continue
            results |= {record.name: "refused" for record, _ in wanted[index:]}
            del wanted[index:]
            break
        if wanted:
            result = "stored" if self._put_all(wanted, need, evicted) else "failed"
            results |= {record.name: result for record, _ in wanted}
        return results

    def touch(self, uses: Mapping[bytes, int]) -> None:
        """Notes uses, by name how many."""
        try:
            with self._env.begin(write=True) as txn:
                clock = self._clock(txn)
                for name, number in uses.items():
                    self._states.touch(txn, name, number, clock)
        except lmdb.MapFullError:
            return  # uses are not worth an eviction

    def delete(self, names: Iterable[bytes]) -> int:
        """Deletes states; returns how many there were."""
        waiting, num_deleted = list(names), 0
        while waiting:
            part, waiting = waiting[:_MAX_DELETED], waiting[_MAX_DELETED:]
            with self._env.begin(write=True) as txn:
                num_deleted += sum(self._states.delete(txn, name) for name in part)
        return num_deleted

    def clear(self, kind: Kind) -> int:
        """Deletes all states of a kind; returns how many."""
        with self._env.begin() as txn:
            names = self._states.names(txn)
        return self.delete(name for name in names if name.startswith(state_key(kind, b"")))

    def trim(self, evicted: list[bytes]) -> bool:
        """Evicts what is beyond the budget, if that was lowered; the file does not become smaller by this."""
        return self._make_room(0, float("inf"), evicted)

    def used_bytes(self) -> int:
        """Of all pages in use."""
        with self._env.begin() as txn:
            return self._states.used_pages(txn) * PAGE_BYTES

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Entries and payload bytes by kind."""
        with self._env.begin() as txn:
            return {kind: self._states.usage(txn, kind) for kind in KINDS}

    def copy_to(self, path: Path, map_bytes: int) -> None:
        """Makes a file with the same states, as many as it has room for, in the order of their writing.

        LMDB's own copy would move their pages, which entries name. Raises lmdb.Error and OSError.
        """
        copy = RecycledShard(path, map_bytes, syncs=False)
        try:
            with self._env.begin(buffers=True) as txn:
                entries = [
                    (bytes(name), self._entry(value)) for name, value in txn.cursor(self._states.entries)
                ]
                copy._offered = self._clock(txn)
            entries.sort(key=lambda named: -named[1].state_id)
            while entries:
                pages, names = 0, list[bytes]()
                while entries and (not names or pages < copy.limit_pages // _COPIED_SHARE):
                    name, entry = entries.pop()
                    pages += num_pages(entry.num_bytes)
                    names.append(name)
                copy._add(self.read(name, None) for name in names)
        except lmdb.MapFullError:
            logger.info("%s takes no more than a part of the states of %s", path, self.path)
        finally:
            copy._env.sync(force=True)
            copy.close()

    def resize(self, map_bytes: int) -> None:
        """Lets the states take another size; by this, no file becomes smaller."""
        self._env.set_mapsize(_map_size(self.path, map_bytes))
        self.map_bytes = map_bytes

    def close(self) -> None:
        self._reader.close()
        self._env.close()

    def _make_room(self, pages: int, below: float, evicted: list[bytes]) -> bool:
        """Evicts states of a score under `below` until `pages` are free beside the slack."""
        while True:
            with self._env.begin() as txn:
                missing = (
                    self._states.used_pages(txn) + slack_pages(self.map_bytes) + pages - self.limit_pages
                )
            if missing <= 0:
                return True
            try:
                if not self._evict(missing, below, evicted):
                    return False
            except lmdb.MapFullError:
                return False

    def _evict(self, pages: int, below: float, evicted: list[bytes]) -> int:
        """One transaction of deletions, least score first; returns how many."""
        gone: list[bytes] = []
        with self._env.begin(write=True) as txn:
            enough = self._states.used_pages(txn) - pages
            for _ in range(_MAX_DELETED):
                if self._states.used_pages(txn) <= enough or (lowest := self._states.lowest(txn)) is None:
                    break
                name, score = lowest
                if score >= below:
                    break
                if not self._states.delete(txn, name):
                    raise lmdb.CorruptedError(f"{self.path} ranks a state that it does not have")
                gone.append(name)
        evicted += gone
        return len(gone)

    def _put_all(self, records: Sequence[Rated], need: int, evicted: list[bytes]) -> bool:
        for attempt in range(3):
            try:
                self._add(records)
            except lmdb.MapFullError:
                # Pages are free, but a snapshot still has them, or no four of them lie together.
                with self._env.begin() as txn:
                    free = self.limit_pages - self._states.used_pages(txn)
                if attempt and free < self.limit_pages * _MAX_WASTED_SHARE + 3 * need:
                    self._make_room(3 * need, float("inf"), evicted)
                self._advance()
            else:
                return True
        return False

    def _add(self, records: Iterable[Rated | None]) -> None:
        """Stores them in one transaction, evicting nothing; raises lmdb.MapFullError."""
        with self._env.begin(write=True, buffers=True) as txn:
            for rated in records:
                if rated is not None:
                    self._states.put(txn, *rated)
            self._states.set_clock(txn, self._clock(txn))
        self._offered = 0.0

    def _clock(self, txn: lmdb.Transaction) -> float:
        """How often the file could have been filled by what was offered to it, written or refused."""
        return self._states.clock(txn) + self._offered

    def _advance(self) -> None:
        """A transaction or two: what was freed before them can be used after them."""
        for _ in range(2):
            try:
                with self._env.begin(write=True) as txn:
                    self._states.rewrite(txn)
            except lmdb.MapFullError:
                return


def _map_size(path: Path, map_bytes: int) -> int:
    """What LMDB may map: the budget; of a larger file, soon replaced, also what evicting from it takes."""
    file_bytes = path.stat().st_size if path.exists() else 0
    return map_bytes if file_bytes <= map_bytes else file_bytes + LEAST_SLACK_PAGES * PAGE_BYTES
