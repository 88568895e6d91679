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
from scone.cache.row_reader import MappedReader
from scone.kernels.disk_read import uring_available
from scone.kernels.row_codec import CODECS
from scone.kernels.row_target import RowTarget
from scone.model_store.fgram_set import FGramSet

pytestmark = pytest.mark.skipif(not uring_available(), reason="io_uring is not allowed here")

WriteTable = Callable[..., Path]
READERS = ("mmap", "direct")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_table: WriteTable) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t", zipf_fgrams, dim=97)


def opened(path: Path, reader: str, ram_bytes: int = 0) -> tuple[FGramTable, RowQueue]:
    """A queue that reads what the page cache holds, too."""
    table = FGramTable.open(path, TableConfig(disk_reader=reader, ram_bytes=ram_bytes))
    table.wait_loaded()
    queue = table.open_queue()
    assert queue is not None
    assert (queue.mapped is not None) == (reader == "mmap")
    queue.mapped = None
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
    queue = RowQueue.open(table._files, fd, table.stats, None)
    assert queue is not None
    pending = queue.submit(np.array([1, 2]))
    assert pending is not None
    assert pending.wait(0, 2, 30)
    assert "a row cannot be read: Is a directory" in str(pending.error(1, 2))
    os.close(fd)


class Step:
    """Sequences that decode: some want a row, some none."""

    def __init__(self, table: FGramTable, queue: RowQueue, seed: int, first_row: int) -> None:
        generator = np.random.default_rng(seed)
        newest = generator.integers(0, table.num_fgrams, 24)
        newest[generator.random(24) < 0.3] = -1
        newest[[3, 4]] = table.num_fgrams - 1  # twice the same row
        self.row_ids = [[7] * i + [row_id] for i, row_id in enumerate(newest.tolist())]
        self.positions = list(range(24))
        self.places = np.flatnonzero(newest >= 0)
        self.ids = newest[self.places]
        pending = queue.submit(self.ids, first_row)
        assert pending is not None
        self.pending = pending

    def gather(self, out: Tensor, *, by_place: bool = False) -> bool:
        row_ids, places = np.empty((2, len(out)), np.int64)
        target = RowTarget(out, row_ids, places, by_place=by_place)
        if not self.pending.gather_newest(self.ids, self.places, self.row_ids, self.positions, target):
            return False
        assert row_ids[: len(self.ids)].tolist() == self.ids.tolist()
        assert places[: len(self.ids)].tolist() == self.places.tolist()
        return True


def gathered(step: Step, dim: int, dtype: torch.dtype) -> Tensor:
    out = torch.full((30, dim), 3.0, dtype=dtype)
    by_place = out.clone()
    assert step.pending.wait(0, len(step.ids), 30)
    assert step.gather(out)
    assert (out[len(step.ids) :] == 3.0).all()
    assert step.gather(by_place, by_place=True)
    places = torch.from_numpy(step.places)
    assert torch.equal(by_place[places], out[: len(step.ids)])
    by_place[places] = 3.0
    assert (by_place == 3.0).all()
    return out[: len(step.ids)]


@pytest.mark.parametrize("num_ram_rows", [0, 1500])
@pytest.mark.parametrize("reader", ["mmap", "mapped", "direct"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_step_gathers_rows_from_wherever_they_are(
    tmp_path: Path,
    zipf_fgrams: FGramSet,
    write_table: WriteTable,
    codec: str,
    reader: str,
    num_ram_rows: int,
) -> None:
    dim = 96 if codec in ("int4", "fp8") else 97
    path = write_table(tmp_path / "t", zipf_fgrams, dim=dim, codec=codec)
    files = FGramTable.open(path)._files
    in_page_cache = reader == "mapped"
    table, queue = opened(
        path, "direct" if reader == "direct" else "mmap", num_ram_rows * files.manifest.row_bytes
    )
    if in_page_cache:
        queue.mapped = MappedReader(files)._memory
        FGramTable.open(path).rows(np.arange(table.num_fgrams))
    assert table.num_memory_rows == num_ram_rows
    num_rows = {"ram": 0, "disk": 0}
    for seed in range(6):
        step = Step(table, queue, seed, num_ram_rows)
        for dtype in (torch.float32, torch.bfloat16):
            out = gathered(step, dim, dtype)
            assert torch.equal(out, table.rows(step.ids).to(dtype))
            num_rows["ram"] += int((step.ids < num_ram_rows).sum())
        is_read = (step.ids >= num_ram_rows) & (not in_page_cache)
        assert (step.pending.row_ids == np.where(is_read, step.ids, -1)).all()
        assert step.pending.num_reads == len(set(step.ids[is_read].tolist()))
        num_rows["disk"] += step.pending.num_reads
        del step
    assert queue.reads.num_free == NUM_SLOTS
    stats = queue.stats.by_tier
    # what the step gathered, once by place, and `table.rows` read all of it once for each type
    assert stats["ram"].num_rows == 3 * num_rows["ram"]
    assert stats["disk"].num_rows > num_rows["disk"]


def test_a_step_does_not_gather_what_it_cannot_at_once(path: Path, tmp_path: Path) -> None:
    table, queue = opened(path, "direct", 1500 * 194)
    out = torch.zeros(30, 97)
    step = Step(table, queue, 1, 1500)
    gathered(step, 97, torch.float32)

    step.positions[5] += 1  # an input beyond the newest token that was matched
    assert not step.gather(out)
    step.positions[5] -= 1
    step.row_ids[step.places[0]][-1] += 1  # another row
    assert not step.gather(out)
    step.row_ids[step.places[0]][-1] = -1
    assert not step.gather(out)
    step.row_ids[step.places[0]][-1] = int(step.ids[0])
    gathered(step, 97, torch.float32)
    assert table._row_tiers.ram is not None
    table._row_tiers.ram.shrink_to(10)  # rows that nobody has asked the disk for
    assert not step.gather(out)

    with pytest.raises(ValueError, match="out has shape"):
        step.gather(out[:5])
    with pytest.raises(ValueError, match="out has shape"):
        step.gather(torch.zeros(30, 96))
    with pytest.raises(ValueError, match="beyond the table"):
        queue.submit(np.array([table.num_fgrams]))


def test_a_step_with_a_damaged_row_is_gathered_one_by_one(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "t")
    table, queue = opened(copy, "direct")
    step = Step(table, queue, 1, 0)
    gathered(step, 97, torch.float32)
    with open(copy / "rows.bin", "r+b") as file:
        file.seek(4096 + int(step.ids[2]) * 194)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    step = Step(table, queue, 1, 0)
    assert step.pending.wait(0, len(step.ids), 30)
    assert not step.gather(torch.zeros(30, 97))
    damaged = [k for k in range(len(step.ids)) if step.pending.error(k, k + 1) is not None]
    assert 2 in damaged
    assert len(damaged) < 4
    sound = [k for k in range(len(step.ids)) if k not in damaged]
    out = torch.zeros(len(sound), 97)
    step.pending.copy_into(np.array(sound), out)
    assert torch.equal(out, table.rows(step.ids[sound]).float())


def test_the_newest_tokens_rows_take_this_way_and_others_the_workers(path: Path) -> None:
    table, _ = opened(path, "direct")
    with Prefetcher(table) as prefetcher:
        queued = prefetcher.submit_apart(np.array([5, -1, 7]))
        assert isinstance(queued, QueuedRows)
        assert torch.equal(rows_of(queued, 97, torch.float32)[[0, 2]], table.rows([5, 7]).float())
        held = [prefetcher.submit_apart(np.arange(NUM_SLOTS - 3))]
        held.append(prefetcher.submit_apart(np.arange(10)))
        assert [isinstance(pending, QueuedRows) for pending in held] == [True, False], "without room: workers"
        assert not isinstance(prefetcher.submit(np.arange(10)), QueuedRows)
        assert held[1] is not None
        assert held[1].wait(0, 10, 30)
    table = FGramTable.open(path, TableConfig(disk_reader="mmap"))
    table.rows(np.arange(table.num_fgrams))
    with Prefetcher(table) as prefetcher:
        there = prefetcher.submit_apart(np.array([5, 7]))
        assert isinstance(there, QueuedRows)
        assert there.num_reads == there.num_under_way() == 0, "it lies in the page cache"
        assert table.stats.prefetches == {"inline": 1}
