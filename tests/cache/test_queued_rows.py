"""Rows that the disk brings without a thread: the same bytes, each ready and failing by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.cache import FGramTable, Prefetcher, TableConfig
from scone.cache.queued_rows import NUM_SLOTS, QueuedRows, RowQueue
from scone.kernels.disk_read import uring_available
from scone.kernels.row_codec import CODECS
from scone.model_store.fgram_set import FGramSet

pytestmark = pytest.mark.skipif(not uring_available(), reason="io_uring is not allowed here")

WriteTable = Callable[..., Path]
READERS = ("mmap", "direct")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_table: WriteTable) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t", zipf_fgrams, dim=97)


def opened(path: Path, reader: str) -> tuple[FGramTable, RowQueue]:
    table = FGramTable.open(path, TableConfig(disk_reader=reader))
    queue = table.open_queue()
    assert queue is not None
    return table, queue


def rows_of(pending: QueuedRows, dim: int, dtype: torch.dtype) -> Tensor:
    num_rows = len(pending.row_ids)
    assert pending.wait(0, num_rows, 30)
    assert pending.error(0, num_rows) is None
    out = torch.full((num_rows, dim), 3.0, dtype=dtype)
    pending.copy_into(np.arange(num_rows), out)
    return out


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_those_of_the_readers(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable, codec: str, reader: str
) -> None:
    dim = 96 if codec in ("int4", "fp8") else 97
    table, queue = opened(write_table(tmp_path / "t", zipf_fgrams, dim=dim, codec=codec), reader)
    generator = np.random.default_rng(0)
    last = table.num_fgrams - 1
    batches = [np.array([last]), np.array([0, -1, 0, last]), np.array([-1, -1])]
    batches += [generator.integers(-1, table.num_fgrams, size) for size in (1, 2, 33, NUM_SLOTS) * 5]
    for ids in batches:
        for dtype in (torch.float32, torch.bfloat16):
            pending = queue.submit(ids)
            assert pending is not None
            out = rows_of(pending, dim, dtype)
            assert torch.equal(out[ids >= 0], table.rows(ids[ids >= 0]).to(dtype))
            assert (out[ids < 0] == 3.0).all()
            del pending
    queue.reads.poll()
    assert queue.reads.num_free == NUM_SLOTS
    assert table.stats.by_tier["disk"].num_rows >= 2 * sum(len(set(b.tolist()) - {-1}) for b in batches)


@pytest.mark.parametrize("reader", READERS)
def test_without_room_nothing_is_begun_and_room_comes_back(path: Path, reader: str) -> None:
    table, queue = opened(path, reader)
    held = [queue.submit(np.arange(i * 60, i * 60 + 60)) for i in range(NUM_SLOTS // 60)]
    assert queue.submit(np.arange(60)) is None
    given_up = held.pop()  # perhaps under way: then its memory is free later
    assert given_up is not None
    given_up.cancel(0, 60)
    del given_up
    assert held[0] is not None
    assert torch.equal(rows_of(held[0], 97, torch.float32), table.rows(np.arange(60)).float())
    held.clear()
    queue.close()
    assert queue.reads.num_free == NUM_SLOTS
    assert queue.submit(np.arange(NUM_SLOTS)) is not None


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_row_fails_by_itself(path: Path, tmp_path: Path, reader: str) -> None:
    copy = shutil.copytree(path, tmp_path / "t")
    with open(copy / "rows.bin", "r+b") as file:
        file.seek(4096 + 100 * 194)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    table, queue = opened(copy, reader)
    pending = queue.submit(np.array([1000, 100, -1, 2000]))
    assert pending is not None
    assert pending.wait(0, 4, 30)
    assert "does not fit its checksum" in str(pending.error(0, 2))
    assert pending.error(0, 1) is None
    assert pending.error(2, 4) is None
    out = torch.zeros(2, 97)
    pending.copy_into(np.array([0, 3]), out)
    assert torch.equal(out, table.rows([1000, 2000]).float())
    assert table.stats.prefetches == {"failed": 1}


def test_a_truncated_file_is_an_error(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "t")
    _, queue = opened(copy, "direct")
    os.truncate(copy / "rows.bin", 3 * 4096)
    pending = queue.submit(np.array([3000]))
    assert pending is not None
    assert pending.wait(0, 1, 30)
    assert "ended early" in str(pending.error(0, 1))


def test_a_failing_disk_is_an_error(path: Path) -> None:
    """A file that cannot be read (a directory) stands in for the disk: the errno is the read's own."""
    table = FGramTable.open(path)
    fd = os.open(path, os.O_RDONLY)
    queue = RowQueue.open(table._files, fd, table.stats)
    assert queue is not None
    pending = queue.submit(np.array([1, 2]))
    assert pending is not None
    assert pending.wait(0, 2, 30)
    assert "a row cannot be read: Is a directory" in str(pending.error(1, 2))
    os.close(fd)


def test_the_newest_tokens_rows_take_this_way_and_others_the_workers(path: Path) -> None:
    table, _ = opened(path, "direct")
    with Prefetcher(table) as prefetcher:
        queued = prefetcher.submit([5, -1, 7], apart=True)
        assert isinstance(queued, QueuedRows)
        assert torch.equal(rows_of(queued, 97, torch.float32)[[0, 2]], table.rows([5, 7]).float())
        held = [prefetcher.submit(np.arange(NUM_SLOTS - 3), apart=True)]
        held.append(prefetcher.submit(np.arange(10), apart=True))
        assert [isinstance(pending, QueuedRows) for pending in held] == [True, False], "without room: workers"
        assert not isinstance(prefetcher.submit(np.arange(10)), QueuedRows)
        assert held[1] is not None
        assert held[1].wait(0, 10, 30)
