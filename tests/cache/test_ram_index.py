"""The index in memory: the same matches, within the budget, and never a damaged copy."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scone.cache import FGramTable, TableConfig
from scone.cache.errors import RowReadError
from scone.cache.memory_budget import MemoryBudget
from scone.cache.table_index import TableIndex
from scone.model_store.fgram_set import FGramSet


@pytest.fixture(scope="module")
def path(
    tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_rows: Callable[..., Path]
) -> Path:
    return write_rows(tmp_path_factory.mktemp("index") / "table", zipf_fgrams, 512)


def is_copied(table: FGramTable) -> bool:
    return table._index.matcher.index is not table._files.index


def test_the_copy_matches_alike_and_is_used(path: Path, zipf_tokens: NDArray[np.int64]) -> None:
    with FGramTable.open(path) as mapped, FGramTable.open(path, TableConfig(ram_bytes=1 << 30)) as table:
        assert table.wait_loaded(30)
        assert is_copied(table)
        assert not is_copied(mapped)
        for ours, theirs in zip(table.match(zipf_tokens), mapped.match(zipf_tokens), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert table.stats.lookups == mapped.stats.lookups


def test_it_counts_against_the_budget_and_yields_to_the_rows_of_a_small_one(path: Path) -> None:
    with FGramTable.open(path) as table:
        index_bytes, row_bytes = table._files.index.buckets.nbytes, 1024
    for ram_bytes, copied in ((8 * index_bytes, True), (8 * index_bytes - 1, False), (0, False)):
        with FGramTable.open(path, TableConfig(ram_bytes=ram_bytes)) as table:
            assert table.wait_loaded(30)
            assert is_copied(table) == copied
            num_rows = sum(tier.num_rows for tier in table.tiers if tier.name == "ram")
            assert num_rows == (ram_bytes - copied * index_bytes) // row_bytes
    memory = MemoryBudget(32 * index_bytes)
    with FGramTable.open(path, TableConfig(memory=memory)) as table:
        assert table.wait_loaded(30)
        assert is_copied(table)
        assert memory.used_by_party()["index"] == index_bytes
        assert memory.used_bytes <= memory.total_bytes
    assert memory.used_bytes == 0


@pytest.mark.parametrize("fault", ["flipped", "truncated"])
def test_a_damaged_index_is_not_copied(
    path: Path,
    tmp_path: Path,
    zipf_tokens: NDArray[np.int64],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    copy = shutil.copytree(path, tmp_path / "t")
    index = copy / "index.bin"
    size = index.stat().st_size
    if fault == "flipped":
        data = bytearray(index.read_bytes())
        data[4096 + 64 * 7 + 44] ^= 1
        index.write_bytes(data)
    else:
        # behind the server's back, between its check of the size and its first read
        load = TableIndex.load

        def truncate_first(table_index: TableIndex, memory: MemoryBudget | None) -> None:
            with open(index, "r+b") as file:
                file.truncate(size // 2)
            load(table_index, memory)

        monkeypatch.setattr(TableIndex, "load", truncate_first)
    with FGramTable.open(copy, TableConfig(ram_bytes=1 << 30)) as table:
        assert table.wait_loaded(30)
        assert not is_copied(table)
        assert "cannot be copied into memory" in caplog.text
        assert caplog.records[-1].levelno == logging.ERROR
        with pytest.raises(RowReadError, match="index"):
            table.match(zipf_tokens)
