"""Prefetched rows are the rows; `submit` never waits; errors and cancels end where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache import FGramTable, Prefetcher, TableConfig
from scone.cache.errors import RowReadError
from scone.cache.prefetcher import PendingRows
from scone.cache.queued_rows import QueuedRows
from scone.cache.ram_rows import RamRows
from scone.cache.row_reader import MappedReader
from scone.cache.stats import TableStats
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files


class GatedReader(MappedReader):
    """A disk that answers when the test lets it, and fails for row ids in `broken`."""

    gate: threading.Event
    broken: frozenset[int] = frozenset()
    reads: list[int]

    def read_into(self, row_ids: NDArray[np.int64], begin: int, end: int, out: Tensor) -> int:
        assert self.gate.wait(30)
        self.reads.append(len(row_ids))
        if self.broken & set(row_ids.tolist()):
            raise RowReadError("the disk reported an I/O error (EIO)")
        return super().read_into(row_ids, begin, end, out)

    def may_wait(self, row_ids: NDArray[np.int64], begin: int, end: int) -> NDArray[np.bool_]:
        return row_ids >= 0

    def open_queue(self, stats: TableStats, ram: RamRows | None) -> None:
        """Workers read: only they can be held up."""


@pytest.fixture(scope="module")
def path(
    tmp_path_factory: pytest.TempPathFactory,
    zipf_fgrams: FGramSet,
    write_table: Callable[..., Path],
) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t", zipf_fgrams)


@pytest.fixture
def slow(path: Path) -> Iterator[tuple[FGramTable, GatedReader]]:
    files = open_table_files(path)
    reader = GatedReader(files)
    reader.gate, reader.reads = threading.Event(), []
    yield FGramTable(files, reader), reader
    reader.gate.set()


def read(
    pending: PendingRows | QueuedRows | None, num_rows: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """All rows asked for; 2.0 where there is none."""
    assert pending is not None
    assert pending.wait(0, len(pending.row_ids), 30)
    assert pending.error(0, num_rows) is None
    out = torch.full((num_rows, 64), 2.0, dtype=dtype)
    pending.copy_into(np.arange(num_rows), out)
    return out


def error(pending: PendingRows | QueuedRows | None, begin: int, end: int) -> str:
    assert pending is not None
    assert pending.wait(0, len(pending.row_ids), 30)
    return str(pending.error(begin, end))


def test_rows_in_memory_are_not_read_ahead(path: Path) -> None:
    with FGramTable.open(path) as table, Prefetcher(table) as prefetcher:
        table.rows([0, 3])
        assert prefetcher.submit([3, -1, 3, 0]) is None
        assert table.stats.prefetches == {"inline": 1}


def test_only_rows_that_may_wait_are_read_ahead(path: Path) -> None:
    config = TableConfig(ram_bytes=10 * 128, disk_reader="direct")
    with FGramTable.open(path, config) as table, Prefetcher(table) as prefetcher:
        assert table.wait_loaded()
        pending = prefetcher.submit([3, 12, -1, 11])
        assert pending is not None
        assert pending.row_ids.tolist() == [-1, 12, -1, 11]
        out = read(pending, 4)
        assert torch.equal(out[[1, 3]], table.rows([12, 11]).float())
        assert (out[[0, 2]] == 2.0).all()


def test_cold_rows_arrive_and_repeated_ones_are_read_once(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    ids = np.array([5, -1, 9, 5, 0, 9, -1])
    with Prefetcher(table) as prefetcher:
        pending = prefetcher.submit(ids)
        ids_before, ids[:] = ids.copy(), 1  # the caller's buffer is its own again
        assert pending is not None
        assert not pending.ready(0, 7)
        threading.Timer(0.05, reader.gate.set).start()
        out = read(pending, 7, torch.float16)
        assert pending.ready(0, 7)
        picked = torch.zeros(3, 64)
        pending.copy_into(np.array([4, -1, 0]), picked)
    hits = ids_before >= 0
    assert torch.equal(out[hits], table.rows(ids_before)[hits].half())
    assert (out[~hits] == 2.0).all()
    assert torch.equal(picked[[0, 2]], table.rows([0, 5]).float())
    assert (picked[1] == 0).all()
    assert reader.reads[0] == 3
    assert (table.stats.rows_requested, table.stats.rows_unique) == (5, 3)
    assert table.stats.prefetches == {"read": 1}


def test_submit_never_waits_for_the_disk(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    with Prefetcher(table, num_workers=1) as prefetcher:
        started = time.perf_counter()
        pending = [prefetcher.submit(np.arange(i, i + 3)) for i in range(50)]
        assert time.perf_counter() - started < 5
        assert not any(p is None or p.ready(0, 3) for p in pending)
        reader.gate.set()
        for i, p in enumerate(pending):
            assert torch.equal(read(p, 3), table.rows(np.arange(i, i + 3)).float())


def test_a_failed_read_fails_its_own_rows_only(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    reader.broken = frozenset({7})
    reader.gate.set()
    with Prefetcher(table) as prefetcher:
        bad, good = prefetcher.submit([6, 7]), prefetcher.submit([8, 9])
        assert "EIO" in error(bad, 0, 2)
        assert "EIO" in error(bad, 0, 1), "one party's rows fail together"
        assert torch.equal(read(good, 2), table.rows([8, 9]).float())
    assert table.stats.prefetches == {"failed": 1, "read": 1}


def test_rows_of_several_parties_fail_apart(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    reader.broken = frozenset({7, 9})
    reader.gate.set()
    with Prefetcher(table) as prefetcher:
        pending = prefetcher.submit_apart(np.array([6, 7, 8, 9]))
        assert "EIO" in error(pending, 1, 2)
        assert pending is not None
        assert pending.error(2, 3) is None
        assert pending.error(0, 4) is not None
        out = torch.zeros(2, 64)
        pending.copy_into(np.array([0, 2]), out)
        assert torch.equal(out, table.rows([6, 8]).float())
    assert reader.reads == [4, 1, 1, 1, 1, 2]


def test_an_unexpected_failure_of_a_worker_does_not_leave_anyone_waiting(
    slow: tuple[FGramTable, GatedReader],
) -> None:
    table, reader = slow
    reader.gate.set()
    with Prefetcher(table) as prefetcher:
        assert "unexpectedly: IndexError" in error(prefetcher.submit([table.num_fgrams]), 0, 1)
        read(prefetcher.submit([1]), 1)


def test_reads_happen_in_order_and_cancelled_ones_do_not(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    with Prefetcher(table, num_workers=1) as prefetcher:
        prefetcher.submit(np.arange(1))  # holds the only worker at the gate
        while prefetcher._jobs.qsize():
            time.sleep(0.001)
        cancelled = prefetcher.submit(np.arange(30))
        partly = prefetcher.submit(np.arange(40))
        last = prefetcher.submit(np.arange(10))
        assert cancelled is not None
        assert partly is not None
        cancelled.cancel(0, 30)
        partly.cancel(5, 40)
        reader.gate.set()
        for pending in (cancelled, last):
            assert pending is not None
            assert pending.wait(0, len(pending.row_ids), 30)
        assert torch.equal(read(partly, 40)[:5], table.rows(np.arange(5)).float())
    assert reader.reads == [1, 5, 10, 5]
    assert table.stats.prefetches == {"read": 3, "cancelled": 1}
