"""The table's one door: the same rows from every backend, untouched misses, and clear errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.cache import FGramTable, TableConfig
from scone.cache.errors import RowReadError
from scone.kernels.row_codec import CODECS, RowCodec
from scone.kernels.row_target import IdTarget
from scone.model_store.errors import TableError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS
from scone.model_store.table_writer import TableWriter

WriteTable = Callable[..., Path]
DIM = 96


@pytest.fixture(scope="module")
def tables(
    tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_table: WriteTable
) -> dict[str, Path]:
    """The same rows in each backend and codec: "mmap-raw", "lmdb-int8", ..."""
    root = tmp_path_factory.mktemp("tables")
    return {
        f"{backend}-{codec}": write_table(
            root / f"{backend}-{codec}", zipf_fgrams, dim=DIM, backend=backend, codec=codec
        )
        for backend in BACKENDS
        for codec in CODECS
    }


@pytest.fixture(scope="module")
def plain_rows(zipf_fgrams: FGramSet) -> torch.Tensor:
    return torch.randn(len(zipf_fgrams), DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_equal_the_codec_of_the_written_rows(
    tables: dict[str, Path], plain_rows: torch.Tensor, codec: str, out_dtype: torch.dtype
) -> None:
    row_codec = RowCodec(codec, "bfloat16", DIM)
    expected = row_codec.decode_reference(row_codec.encode(plain_rows))
    ids = torch.randperm(len(plain_rows), generator=torch.Generator().manual_seed(1))
    ids[::7] = -1
    for backend in BACKENDS:
        with FGramTable.open(tables[f"{backend}-{codec}"], TableConfig(num_threads=2)) as table:
            assert (table.dim, table.dtype, table.max_n) == (DIM, torch.bfloat16, 5)
            # every second row of a wider tensor: strided
            out = torch.full((len(ids), 2, DIM), 9.0, dtype=out_dtype)[:, 0]
            table.read_into(ids, out)
            assert torch.equal(out[ids >= 0], expected[ids[ids >= 0]].to(out_dtype))
            assert (out[ids < 0] == 9.0).all()
            assert table.stats.rows_read["disk"] == int((ids >= 0).sum())


def test_inputs_may_be_lists_arrays_or_tensors(
    tables: dict[str, Path], zipf_tokens: NDArray[np.int64]
) -> None:
    tokens = zipf_tokens[:40]
    with FGramTable.open(tables["mmap-raw"]) as table:
        ids, lengths = table.match(tokens)
        assert ids.dtype == np.int64
        assert lengths.dtype == np.int8
        for form in (
            tokens.tolist(),
            torch.from_numpy(tokens),
            tokens.astype(np.int32),
            tokens.astype(np.uint16),
        ):
            np.testing.assert_array_equal(table.match(form)[0], ids)
        windows = np.full((40, 5), -1, np.int32)
        for i in range(40):
            history = tokens[max(0, i - 4) : i + 1]
            windows[i, 5 - len(history) :] = history
        np.testing.assert_array_equal(table.match_last(windows)[0], ids)
        np.testing.assert_array_equal(table.match_last(torch.from_numpy(windows))[1], lengths)
        histories = [tokens[: i + 1].tolist() for i in range(40)]
        wanted, places = np.full((2, 40), -7)
        row_ids: list[list[int]] = [[7] for _ in histories]
        num_wanted = table.match_newest(histories, row_ids, IdTarget(wanted, places))
        assert row_ids == [[7, row_id] for row_id in ids.tolist()]
        assert num_wanted == np.count_nonzero(ids >= 0)
        np.testing.assert_array_equal(places[:num_wanted], np.flatnonzero(ids >= 0))
        np.testing.assert_array_equal(wanted[:num_wanted], ids[ids >= 0])
        assert (wanted[num_wanted:] == -7).all()
        assert (places[num_wanted:] == -7).all()
        assert table.match_newest([], [], IdTarget(wanted[:0], places[:0])) == 0
        with pytest.raises(ValueError, match="less room"):
            table.match_newest(histories, row_ids, IdTarget(wanted[:39], places))
        assert table.match([])[0].shape == (0,)
        assert table.match_last(np.empty((0, 5), np.int32))[0].shape == (0,)
        assert table.rows([]).shape == (0, DIM)
        assert sum(table.stats.lookups.values()) == 40 * 8
        assert set(table.stats.lookups) == set(lengths.tolist())


def test_strided_tokens_and_ids_are_read_as_they_are(
    tables: dict[str, Path], zipf_tokens: NDArray[np.int64]
) -> None:
    with FGramTable.open(tables["lmdb-raw"]) as table:
        every_third = zipf_tokens[:900:3]
        expected, _ = table.match(every_third.copy())
        np.testing.assert_array_equal(table.match(every_third)[0], expected)
        backwards = zipf_tokens[299::-1]
        np.testing.assert_array_equal(table.match(backwards)[1], table.match(backwards.copy())[1])
        wide = np.repeat(zipf_tokens[:50, None], 5, axis=1).astype(np.int32)
        column_major = np.asfortranarray(wide)
        np.testing.assert_array_equal(table.match_last(column_major)[0], table.match_last(wide)[0])
        ids = np.arange(200)
        assert torch.equal(table.rows(ids[::2]), table.rows(ids[::2].copy()))
        assert torch.equal(table.rows(torch.arange(200)[::2]), table.rows(ids[::2].copy()))


def test_ids_beyond_the_table_raise_before_anything_is_written(tables: dict[str, Path]) -> None:
    for name in ("mmap-raw", "lmdb-raw"):
        with FGramTable.open(tables[name]) as table:
            out = torch.full((3, DIM), 5.0)
            with pytest.raises(IndexError):
                table.read_into([0, 1, table.num_fgrams], out)
            assert (out == 5.0).all()
            with pytest.raises(ValueError, match="out has shape"):
                table.read_into([0, 1], out)
            with pytest.raises(ValueError, match=r"out is torch\.float64"):
                table.read_into([0, 1, 2], out.double())


def test_a_table_serves_only_its_model_and_tokenizer(tables: dict[str, Path]) -> None:
    with FGramTable.open(tables["mmap-raw"]) as table:
        table.check_model("6d" * 32, "74" * 32)
        with pytest.raises(TableError, match="built for model 6d6d6d6d6d6d, this model is 99"):
            table.check_model("99" * 32, "74" * 32)
        with pytest.raises(TableError, match="built for tokenizer 747474747474, this tokenizer is 88"):
            table.check_model("6d" * 32, "88" * 32)


def test_tiers_are_named(tables: dict[str, Path]) -> None:
    with FGramTable.open(tables["lmdb-raw"]) as table:
        assert table.tier_of([-1, 0, table.num_fgrams - 1]).tolist() == ["", "disk", "disk"]
        (tier,) = table.tiers
        assert (tier.reader, tier.num_rows, tier.num_bytes) == (
            "lmdb",
            table.num_fgrams,
            table.num_fgrams * DIM * 2,
        )
        assert table.mapped_bytes > tier.num_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_damaged_after_opening_is_an_error_for_its_readers_only(
    tables: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    copy = shutil.copytree(tables[f"{backend}-raw"], tmp_path / "t")
    with FGramTable.open(copy) as table:
        row = table.num_fgrams // 2
        files = table._files
        place = int(files.block_offsets[row // files.manifest.rows_per_block])
        place += row % files.manifest.rows_per_block * files.manifest.row_bytes
        with open(files.rows_path, "r+b") as file:
            file.seek(place + 17)
            byte = file.read(1)[0]
            file.seek(place + 17)
            file.write(bytes([byte ^ 4]))
        with pytest.raises(RowReadError, match=rf"row {row} is damaged"):
            table.rows([3, row, 5])
        assert table.rows([3, 5]).isfinite().all()
        with pytest.raises(RowReadError):
            table.rows([row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_truncated_under_the_server_is_an_error_and_no_crash(
    tables: dict[str, Path], tmp_path: Path, backend: str, zipf_tokens: NDArray[np.int64]
) -> None:
    copy = shutil.copytree(tables[f"{backend}-raw"], tmp_path / "t")
    with FGramTable.open(copy) as table:
        expected = table.rows([0])
        os.truncate(table._files.rows_path, 3 * 4096)
        with pytest.raises(RowReadError, match="truncated"):
            table.rows(np.arange(table.num_fgrams))
        if backend == "mmap":
            assert torch.equal(table.rows([0]), expected)
        os.truncate(copy / "index.bin", 4096)
        with pytest.raises(RowReadError, match="truncated"):
            table.match(zipf_tokens[:100])
        with pytest.raises(RowReadError, match="truncated"):
            table.match_last(zipf_tokens[None, :5])


@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_a_table_replaced_under_the_server_is_not_seen(
    tables: dict[str, Path], tmp_path: Path, zipf_fgrams: FGramSet, reader: str
) -> None:
    copy = shutil.copytree(tables["mmap-raw"], tmp_path / "t")
    with FGramTable.open(copy, TableConfig(disk_reader=reader)) as table:
        expected = table.rows(np.arange(10))
        shutil.rmtree(copy)
        hashes: dict[str, Any] = {"model_hash": "99" * 32, "tokenizer_hash": "74" * 32}
        with TableWriter.create(copy, zipf_fgrams, dim=DIM, dtype="bfloat16", **hashes) as writer:
            writer.append(torch.zeros(len(zipf_fgrams), DIM))
            writer.finish()
        assert torch.equal(table.rows(np.arange(10)), expected)
        assert (FGramTable.open(copy).rows([0]) == 0).all()


def test_without_the_extension_the_answers_are_the_same(
    tables: dict[str, Path], zipf_tokens: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = zipf_tokens[:300]
    with FGramTable.open(tables["lmdb-int8"]) as table:
        ids, lengths = table.match(tokens)
        rows = table.rows(ids)
    for module in ("match", "gather", "checksum"):
        monkeypatch.setattr(f"scone.kernels.{module}.native", None)
    with FGramTable.open(tables["lmdb-int8"]) as table:
        slow_ids, slow_lengths = table.match(tokens)
        np.testing.assert_array_equal(slow_ids, ids)
        np.testing.assert_array_equal(slow_lengths, lengths)
        assert torch.equal(table.rows(ids)[ids >= 0], rows[ids >= 0])
        with pytest.raises(IndexError):
            table.rows([table.num_fgrams])
