"""A real table whose rows are on a disk, in memory or both: the same tokens, and a fault is one request's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scone.cache import FGramTable, TableConfig
from scone.cache.queued_rows import QueuedRows
from scone.cache.row_reader import MappedReader
from scone.cache.sim_device import SimDevice
from scone.kernels.disk_read import uring_available
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_header import HEADER_BYTES
from scone.server.engine.input_rows import InputRows, read_ahead
from scone.server.engine.row_waits import RowWaits

from .conftest import Outcome, World, random_prompt
from .dict_table import DictTable

pytestmark = pytest.mark.skipif(not uring_available(), reason="io_uring is not allowed here")

MakeWorld = Callable[..., World]
MakeRows = Callable[..., InputRows]
ALL_IN_MEMORY = TableConfig(ram_bytes=1 << 30)


@pytest.fixture(params=["direct", "mmap"])
def disk_reader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[0, 150])
def cold(request: pytest.FixtureRequest, disk_reader: str, path: Path) -> TableConfig:
    """No row in memory, or the first ones."""
    with FGramTable.open(path) as table:
        return TableConfig(disk_reader=disk_reader, ram_bytes=request.param * table.manifest.row_bytes)


@pytest.fixture(params=["raw", "int8"])
def path(
    request: pytest.FixtureRequest,
    dict_table: DictTable,
    fgram_set: Callable[..., FGramSet],
    write_table: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    fgrams = fgram_set({fgram: 1000 - i for i, fgram in enumerate(dict_table.fgrams())})
    return write_table(tmp_path / "table", fgrams, dim=dict_table.dim, codec=request.param)


@pytest.fixture
def num_gathered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many steps have gathered their rows in one call, with some of them from the disk.

    Steps wait for the rows of decoding sequences, however slow the disk is.
    """
    wait = RowWaits.wait
    monkeypatch.setattr(RowWaits, "wait", lambda waits, num_running, _: wait(waits, num_running, 60.0))
    gather = QueuedRows.gather_newest
    steps: list[bool] = []

    def counted(self: QueuedRows, *args: object) -> bool:
        steps.append(gather(self, *args) and self.num_reads > 0)  # type: ignore[arg-type]
        return steps[-1]

    monkeypatch.setattr(QueuedRows, "gather_newest", counted)
    return lambda: sum(steps)


@pytest.fixture
def make_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRows]:
    """Opens a table; nothing is ever in the page cache."""
    monkeypatch.setattr(MappedReader, "may_wait", lambda _, ids, begin, end: (ids >= begin) & (ids < end))
    opened: list[tuple[FGramTable, InputRows]] = []

    def make(path: Path, config: TableConfig, world: World) -> InputRows:
        table = FGramTable.open(path, config)
        assert table.wait_loaded()
        rows = read_ahead(table, world.core.overlay.device)
        queue = rows._source._queue  # type: ignore[attr-defined]
        queue.mapped = None
        opened.append((table, rows))
        return rows

    yield make
    for table, rows in opened:
        queue = rows._source._queue  # type: ignore[attr-defined]
        rows.close()
        rows._newest = None
        assert queue.reads.num_free == len(queue.reads.status), "no slot is held by anybody"
        table.close()


def ask(world: World, num: int = 6, max_tokens: int = 12) -> list[Outcome]:
    return [
        world.add(random_prompt(seed, 9 + seed), max_tokens=max_tokens, allowed_token_ids=tuple(range(3, 12)))
        for seed in range(num)
    ]


def run(world: World) -> None:
    """Until all is done; while a disk is waited for, time passes."""
    deadline = time.monotonic() + 60
    while world.core.has_work and time.monotonic() < deadline:
        if not world.step():
            time.sleep(0.0002)
    world.run()


def tokens(outcomes: list[Outcome]) -> list[list[int]]:
    assert all(outcome.last().finish_reason == "length" for outcome in outcomes)
    return [outcome.tokens() for outcome in outcomes]


def test_rows_from_anywhere_give_the_same_tokens(
    make_world: MakeWorld,
    make_rows: MakeRows,
    num_gathered: Callable[[], int],
    path: Path,
    cold: TableConfig,
) -> None:
    answers = []
    for config, device in ((ALL_IN_MEMORY, None), (cold, None), (cold, SimDevice(1))):
        before = num_gathered()
        world = make_world(None, device)
        world.input_rows = make_rows(path, config, world)
        outcomes = ask(world)
        run(world)
        answers.append(tokens(outcomes))
        assert (num_gathered() > before) == (config is cold)
    assert answers[1:] == answers[:1] * 2


@pytest.mark.parametrize("num_steps", [2, 4, 7])
def test_aborts_and_a_swapped_table_leave_the_others_as_they_are(
    make_world: MakeWorld,
    make_rows: MakeRows,
    num_gathered: Callable[[], int],
    path: Path,
    cold: TableConfig,
    num_steps: int,
) -> None:
    answers = []
    for config in (ALL_IN_MEMORY, cold):
        world = make_world()
        world.input_rows = make_rows(path, config, world)
        outcomes = ask(world, 4)
        for _ in range(num_steps):
            world.step()
        world.core.abort(world.runs[1])
        world.input_rows = make_rows(path, config, world)  # another generation, with rows of its own
        outcomes += ask(world, 3, max_tokens=40)  # some of them when the others have ended
        run(world)
        aborted = outcomes.pop(1)
        assert aborted.last().finish_reason == "abort"
        answers.append(tokens(outcomes))
    assert answers[0] == answers[1]
    assert num_gathered() > 0


def test_a_damaged_row_ends_its_request_only(
    make_world: MakeWorld,
    make_rows: MakeRows,
    num_gathered: Callable[[], int],
    dict_table: DictTable,
    path: Path,
    disk_reader: str,
) -> None:
    """Each request generates the last token of an f-gram again and again; one needs a damaged page."""
    pairs = [fgram for fgram in dict_table.fgrams() if len(fgram) == 2]
    with FGramTable.open(path) as table:
        size = table.manifest.row_bytes
        row_ids = [table.match([3, pair[0], *[pair[1]] * 3])[0] for pair in pairs]
    pages = [
        [{r * size // 4096, ((r + 1) * size - 1) // 4096} if r >= 0 else set() for r in ids.tolist()]
        for ids in row_ids
    ]
    victim, other, page = next(
        (v, o, page)
        for v in range(len(pairs))
        for o in range(len(pairs))
        for page in pages[v][2] - pages[v][1] - set().union(*pages[o])
        if pages[o][2]
    )
    world = make_world()
    world.input_rows = make_rows(path, TableConfig(disk_reader=disk_reader), world)
    _flip_bit(path / "rows.bin", HEADER_BYTES + page * 4096 + 5)
    failed, served = [
        world.add([3, first], max_tokens=4, allowed_token_ids=(second,))
        for first, second in (pairs[victim], pairs[other])
    ]
    run(world)
    assert failed.last().finish_reason == "error"
    assert "checksum" in (failed.last().error or "")
    assert tokens([served]) == [[pairs[other][1]] * 4]
    assert num_gathered() > 0, "once the other is alone"


def _flip_bit(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))
