"""RAM, mapped and direct readers: the same rows, inside their budgets, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.cache import FGramTable, TableConfig
from scone.cache.direct_reader import DirectReader
from scone.cache.errors import CacheError, RowReadError
from scone.cache.memory_limit import available_bytes
from scone.kernels.checksum import crc32c_pages
from scone.kernels.disk_read import RowsOut, SpanReader, Spans, Sums
from scone.kernels.row_codec import CODECS
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS
from scone.model_store.table_files import open_table_files

WriteTable = Callable[..., Path]
# 97 values: rows of 194 bytes (raw) straddle pages at every offset
DIMS = {"raw": 97, "int8": 97, "fp8": 1504, "int4": 96}


@pytest.fixture(scope="module")
def tables(
    tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_table: WriteTable
) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("tables")
    return {
        (backend, codec): write_table(
            root / f"{backend}-{codec}", zipf_fgrams, dim=dim, backend=backend, codec=codec
        )
        for backend in BACKENDS
        for codec, dim in DIMS.items()
    }


def configs(num_bytes: int) -> list[TableConfig]:
    """All in RAM, half of it, none; the rest mapped or direct."""
    return [
        TableConfig(ram_bytes=ram_bytes, disk_reader=reader, num_threads=threads)
        for ram_bytes, threads in ((0, 1), (num_bytes // 2 + 77, 1), (2 * num_bytes, 2))
        for reader in ("mmap", "direct")
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_all_readers_and_tiers_give_the_same_bytes(tables: dict[tuple[str, str], Path], codec: str) -> None:
    generator = np.random.default_rng(0)
    with FGramTable.open(tables["mmap", codec]) as table:
        everything = table.rows(np.arange(table.num_fgrams))
        batches = [np.arange(table.num_fgrams), np.array([table.num_fgrams - 1]), np.array([0, -1, 0])]
        batches += [generator.integers(-1, table.num_fgrams, size) for size in (1, 2, 33, 700, 9000)]
        num_bytes = table.tiers[0].num_bytes
    for backend in BACKENDS:
        for config in configs(num_bytes):
            with FGramTable.open(tables[backend, codec], config) as table:
                assert table.wait_loaded(30)
                for ids in batches:
                    out = torch.full((len(ids), DIMS[codec]), 3.0)
                    table.read_into(ids, out)
                    hits = torch.from_numpy(ids >= 0)
                    assert torch.equal(out[hits], everything[ids[ids >= 0]].float())
                    assert (out[~hits] == 3.0).all()
                # the tiers were really used
                ends = [tier.end for tier in table.tiers]
                assert ends[-1] == table.num_fgrams
                assert set(table.stats.rows_read) == {tier.name for tier in table.tiers}
                assert table.stats.rows_read.total() == sum(int((ids >= 0).sum()) for ids in batches)
                assert len(ends) == (2 if 0 < (config.ram_bytes or 0) < num_bytes else 1)


def test_tiers_split_at_the_budget(tables: dict[tuple[str, str], Path]) -> None:
    with FGramTable.open(
        tables["mmap", "raw"], TableConfig(ram_bytes=1000 * 194 + 193, disk_reader="direct")
    ) as table:
        assert table.wait_loaded(30)
        assert [(t.name, t.reader, t.begin, t.end) for t in table.tiers] == [
            ("ram", "ram", 0, 1000),
            ("disk", "direct", 1000, table.num_fgrams),
        ]
        assert table.tier_of([-1, 0, 999, 1000]).tolist() == ["", "ram", "ram", "disk"]
        assert table.may_wait([999, -1]).tolist() == [False, False]
        assert table.may_wait([999, 1000, -1]).tolist() == [False, True, False]


def test_rows_are_right_while_the_ram_tier_fills(
    tables: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Semaphore(0)
    plain = type(open_table_files(tables["mmap", "raw"])).read_stream

    def read_when_let(self: object, begin: int, out: memoryview) -> None:
        if threading.current_thread().name == "scone-ram-tier":
            assert gate.acquire(timeout=30)
        plain(self, begin, out)  # type: ignore[arg-type]

    monkeypatch.setattr("scone.cache.ram_rows._PAGES_PER_READ", 8)
    monkeypatch.setattr("scone.model_store.table_files.TableFiles.read_stream", read_when_let)
    with FGramTable.open(tables["mmap", "raw"], TableConfig(ram_bytes=1 << 30)) as table:
        assert not table.wait_loaded(0)
        expected = FGramTable.open(tables["mmap", "raw"]).rows(np.arange(table.num_fgrams))
        seen = set()
        while not table.wait_loaded(0):
            assert torch.equal(table.rows(np.arange(table.num_fgrams)), expected)
            seen.add(len(table.tiers))
            gate.release()
            threading.Event().wait(0.002)
        assert seen == {1, 2}
        assert [tier.name for tier in table.tiers] == ["ram"]


def test_a_damaged_page_ends_the_ram_tier_and_fails_only_its_readers(
    tables: dict[tuple[str, str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(tables["mmap", "raw"], tmp_path / "t")
    flip(copy / "rows.bin", 4096 * 30 + 5)
    with FGramTable.open(copy, TableConfig(ram_bytes=1 << 30)) as table:
        assert not table.wait_loaded(30)
        assert "does not fit its checksum" in caplog.text
        assert torch.isfinite(table.rows([0, 100, 2000])).all()
        with pytest.raises(RowReadError, match="damaged"):
            table.rows(np.arange(table.num_fgrams))


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


class FaultySpans:
    """A disk that fails as told: the seam below DirectReader."""

    name = "faulty"

    def __init__(self, inner: SpanReader, fault: str) -> None:
        self.inner, self.fault = inner, fault

    def read(
        self, spans: Spans, buffer: NDArray[np.uint8], sums: Sums | None = None, rows: RowsOut | None = None
    ) -> None:
        if self.fault == "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        order = np.random.default_rng(1).permutation(len(spans.places))
        self.inner.read(Spans(*(numbers[order] for numbers in spans)), buffer)
        places = spans.places
        if self.fault == "delay":
            threading.Event().wait(0.2)
        if self.fault == "flip":
            buffer[int(places[-1]) + 9] ^= 1
        if self.fault == "swap" and len(places) > 1:
            first, last = (slice(int(p), int(p) + 4096) for p in (places[0], places[-1]))
            buffer[first], buffer[last] = buffer[last].copy(), buffer[first].copy()
        if sums is not None:
            sums[:] = crc32c_pages(buffer[: 4096 * len(sums)], 4096)
        if rows is not None:
            rows.decode(buffer)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("eio", "Input/output error"),
        ("flip", "damaged"),
        ("swap", "damaged"),
        ("reorder", None),
        ("delay", None),
    ],
)
def test_faults_of_the_disk_are_typed_errors_and_never_wrong_rows(
    tables: dict[tuple[str, str], Path], fault: str, message: str | None
) -> None:
    files = open_table_files(tables["mmap", "raw"])
    reader = DirectReader(files, depth=64)
    expected = FGramTable(files, reader).rows([0, 900, 1800, 3])
    reader._reader = FaultySpans(reader._reader, fault)
    with FGramTable(files, reader) as table:
        if message is None:
            assert torch.equal(table.rows([0, 900, 1800, 3]), expected)
            return
        with pytest.raises(RowReadError, match=message):
            table.rows([0, 900, 1800, 3])
        reader._reader.fault = "none"
        assert torch.equal(table.rows([0, 900, 1800, 3]), expected)


def test_a_slow_read_holds_up_no_other_thread(tables: dict[tuple[str, str], Path]) -> None:
    files = open_table_files(tables["mmap", "raw"])
    reader = DirectReader(files, depth=64)
    with FGramTable(files, reader) as table:
        expected = table.rows([0, 3])
        quick = reader._reader
        reader._reader = FaultySpans(quick, "delay")
        slow_rows: list[torch.Tensor] = []
        slow = threading.Thread(target=lambda: slow_rows.append(table.rows([0, 3])))
        slow.start()
        threading.Event().wait(0.05)  # it is under way
        reader._reader = quick
        assert torch.equal(table.rows([0, 3]), expected)
        assert not slow_rows
        slow.join()
        assert torch.equal(slow_rows[0], expected)


@pytest.mark.parametrize("config", configs(100_000))
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reader_writes_anything_if_an_id_is_beyond_the_table(
    tables: dict[tuple[str, str], Path], backend: str, config: TableConfig
) -> None:
    with FGramTable.open(tables[backend, "int8"], config) as table:
        assert table.wait_loaded(30)
        for beyond in (table.num_fgrams, 2**40, 2**63 - 1):
            out = torch.full((3, 97), 5.0)
            with pytest.raises(IndexError, match=f"row id {beyond} is beyond"):
                table.read_into([0, 1, beyond], out)
            assert (out == 5.0).all()


def test_direct_reads_check_a_page_each_time(tables: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tables["mmap", "raw"], tmp_path / "t")
    with FGramTable.open(copy, TableConfig(disk_reader="direct")) as table:
        expected = table.rows([5])
        flip(copy / "rows.bin", 4096 + 5 * 194)
        with pytest.raises(RowReadError, match="page 0 of the rows is damaged"):
            table.rows([5])
        flip(copy / "rows.bin", 4096 + 5 * 194)
        assert torch.equal(table.rows([5]), expected)
        os.truncate(copy / "rows.bin", 3 * 4096)
        with pytest.raises(RowReadError, match="ended early"):
            table.rows([2000, 3000])


def test_without_io_uring_threads_read(
    tables: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("scone.kernels.disk_read.uring_available", lambda: False)
    caplog.set_level("INFO")
    expected = FGramTable.open(tables["mmap", "raw"]).rows(np.arange(500))
    with FGramTable.open(tables["mmap", "raw"], TableConfig(disk_reader="direct")) as table:
        assert torch.equal(table.rows(np.arange(500)), expected)
    assert "io_uring is not available" in caplog.text


@pytest.mark.parametrize(
    "config",
    [TableConfig(disk_reader="direct", io_depth=8), TableConfig(num_threads=2)],
    ids=["direct", "mmap"],
)
def test_several_threads_read_at_once(tables: dict[tuple[str, str], Path], config: TableConfig) -> None:
    with FGramTable.open(tables["mmap", "fp8"], config) as table:
        expected = table.rows(np.arange(table.num_fgrams))
        wrong = []

        def read(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for _ in range(30):
                ids = generator.integers(0, table.num_fgrams, 200)
                if not torch.equal(table.rows(ids), expected[ids]):
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert sum(table.stats.by_tier["disk"].num_within) == 121


BUDGET = """
    import json, resource, sys
    import numpy as np
    from scone.cache import FGramTable, TableConfig
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = FGramTable.open(sys.argv[1], TableConfig(ram_bytes=8 << 20, disk_reader="direct"))
    assert table.wait_loaded(60)
    ids = np.random.default_rng(0).integers(0, table.num_fgrams, 60_000)
    for part in np.split(ids, 600):
        table.rows(part)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"grown": (after - before) * 1024, "rows": table.stats.rows_read}))
"""


def test_a_table_larger_than_its_budget_stays_inside_it(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable
) -> None:
    """59 MB of rows, 8 MiB of RAM for them: reading all of the table must not bring it in."""
    table = write_table(tmp_path / "t", zipf_fgrams, dim=4096, dtype="float32")
    size = (table / "rows.bin").stat().st_size
    assert size > 56 << 20
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(BUDGET), str(table)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=120)
    result = json.loads(done.stdout)
    assert result["rows"]["disk"] > 10_000
    assert result["rows"]["ram"] > 1000
    # the tier, the checksums and the index, one batch of 100 rows and its buffer
    assert result["grown"] < 24 << 20


def test_impossible_settings_are_named() -> None:
    for wrong in ({"ram_bytes": -1}, {"disk_reader": "tape"}, {"io_depth": 0}, {"num_threads": 0}):
        with pytest.raises(CacheError, match=next(iter(wrong))):
            TableConfig(**wrong)
    assert 0 < TableConfig(ram_bytes=None).ram_plan(10**18, 1, 0).num_rows < available_bytes()
