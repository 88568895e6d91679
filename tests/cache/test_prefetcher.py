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

from scone.cache import FGramTable, Prefetcher
from scone.cache.errors import RowReadError
from scone.cache.row_reader import MappedReader
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

    def may_wait(self, row_ids: NDArray[np.int64], begin: int, end: int) -> bool:
        return bool((row_ids >= 0).any())


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


def test_warm_rows_are_not_staged(path: Path) -> None:
    ids = np.array([3, -1, 3, 0])
    with FGramTable.open(path) as table, Prefetcher(table) as prefetcher:
        expected = table.rows(ids)
        pending = prefetcher.submit(ids)
        assert pending.ready()
        out = torch.full((4, 64), 2.0)
        pending.copy_into(out)
        assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]].float())
        assert (out[1] == 2.0).all()
        assert table.stats.prefetches == {"inline": 1}


def test_cold_rows_arrive_and_repeated_ones_are_read_once(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    ids = np.array([5, -1, 9, 5, 0, 9, -1])
    with Prefetcher(table) as prefetcher:
        pending = prefetcher.submit(ids)
        ids_before, ids[:] = ids.copy(), 1  # the caller's buffer is its own again
        assert not pending.ready()
        threading.Timer(0.05, reader.gate.set).start()
        out = torch.full((7, 64), 2.0, dtype=torch.float16)
        pending.copy_into(out)
        assert pending.ready()
    hits = ids_before >= 0
    assert torch.equal(out[hits], table.rows(ids_before)[hits].half())
    assert (out[~hits] == 2.0).all()
    assert reader.reads[0] == 3
    assert (table.stats.rows_requested, table.stats.rows_unique) == (5, 3)
    assert table.stats.prefetches == {"read": 1}
    assert table.stats.waits == 1
    assert table.stats.wait_seconds > 0


def test_submit_never_waits_for_the_disk(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    with Prefetcher(table, num_workers=1) as prefetcher:
        started = time.perf_counter()
        pending = [prefetcher.submit(np.arange(i, i + 3)) for i in range(50)]
        assert time.perf_counter() - started < 5
        assert not any(p.ready() for p in pending)
        reader.gate.set()
        for i, p in enumerate(pending):
            out = torch.empty(3, 64)
            p.copy_into(out)
            assert torch.equal(out, table.rows(np.arange(i, i + 3)).float())


def test_a_failed_read_fails_its_own_rows_only(slow: tuple[FGramTable, GatedReader]) -> None:
    table, reader = slow
    reader.broken = frozenset({7})
    reader.gate.set()
    with Prefetcher(table) as prefetcher:
        bad, good = prefetcher.submit([6, 7]), prefetcher.submit([8, 9])
        out = torch.empty(2, 64)
        with pytest.raises(RowReadError, match="EIO"):
            bad.copy_into(out)
        with pytest.raises(RowReadError, match="EIO"):
            bad.copy_into(out)  # and it stays failed
        good.copy_into(out)
    assert torch.equal(out, table.rows([8, 9]).float())
    assert table.stats.prefetches == {"failed": 1, "read": 1}


def test_an_unexpected_failure_of_a_worker_does_not_leave_anyone_waiting(
    slow: tuple[FGramTable, GatedReader],
) -> None:
    table, reader = slow
    reader.gate.set()
    with Prefetcher(table) as prefetcher:
        with pytest.raises(RowReadError, match="unexpectedly: IndexError"):
            prefetcher.submit([table.num_fgrams]).copy_into(torch.empty(1, 64))
        prefetcher.submit([1]).copy_into(torch.empty(1, 64))


def test_demand_overtakes_speculation_and_cancelled_reads_do_not_happen(
    slow: tuple[FGramTable, GatedReader],
) -> None:
    table, reader = slow
    with Prefetcher(table, num_workers=1) as prefetcher:
        prefetcher.submit(np.arange(1))  # holds the only worker at the gate
        while prefetcher._queue.qsize():
            time.sleep(0.001)
        speculative = prefetcher.submit(np.arange(20), reason="continuation")
        cancelled = prefetcher.submit(np.arange(30))
        demand = prefetcher.submit(np.arange(10))
        cancelled.cancel()
        reader.gate.set()
        demand.copy_into(torch.empty(10, 64))
        speculative.copy_into(torch.empty(20, 64))
        with pytest.raises(RowReadError, match="cancelled"):
            cancelled.copy_into(torch.empty(30, 64))
    assert reader.reads == [1, 10, 20]
    assert table.stats.prefetches == {"read": 3, "cancelled": 1}


def test_speculation_beyond_its_budget_is_dropped_and_the_budget_returns(
    slow: tuple[FGramTable, GatedReader],
) -> None:
    table, reader = slow
    with Prefetcher(table, num_workers=1, speculation_bytes=10 * 64 * 2) as prefetcher:
        first = prefetcher.submit(np.arange(8), reason="draft")
        dropped = prefetcher.submit(np.arange(3), reason="draft")
        assert dropped.ready()
        assert table.stats.prefetches["dropped"] == 1
        reader.gate.set()
        first.copy_into(torch.empty(8, 64))
        deadline = time.monotonic() + 10
        while prefetcher._speculating_bytes and time.monotonic() < deadline:
            time.sleep(0.001)
        prefetcher.submit(np.arange(10), reason="draft").copy_into(torch.empty(10, 64))
    assert table.stats.prefetches == {"dropped": 1, "read": 2}
