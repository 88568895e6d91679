"""Random look-ups across all backends, codecs, tiers and readers against a dict and the torch decoders.

A bounded number by default; ten million of them with `make test-lookups`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.cache import FGramTable, TableConfig
from scone.kernels.row_codec import CODECS, RowCodec
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS

WriteTable = Callable[..., Path]
DIM = 96  # rows of 192, 100, 60 and 100 bytes: most begin in one page and some end in the next
BATCH = 4096


def configs(num_bytes: int) -> list[TableConfig]:
    """All rows in RAM, half of them, none; the rest mapped or read directly."""
    return [
        TableConfig(ram_bytes=ram_bytes, disk_reader=reader, num_threads=2)
        for ram_bytes in (0, num_bytes // 2, 2 * num_bytes)
        for reader in ("mmap", "direct")
    ]


def rows_of_windows(fgrams: FGramSet, windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the longest f-gram at each window's end, from a dict of bytes."""
    keys = {
        f[:n].tobytes(): row for row, (f, n) in enumerate(zip(fgrams.tokens, fgrams.lengths, strict=True))
    }
    text = windows.astype(np.int32)
    found = np.full(len(text), -1, np.int64)
    for i, window in enumerate(text):
        for n in range(fgrams.max_n, 1, -1):
            row = keys.get(window[-n:].tobytes())
            if row is not None:
                found[i] = row
                break
    return found


def count_differences(
    tmp_path: Path, fgrams: FGramSet, tokens: NDArray[np.int64], write_table: WriteTable, num_lookups: int
) -> tuple[int, int]:
    """Look-ups made, and how many of them differ in row id or in any bit of the row."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, fgrams.max_n)
    expected_ids = rows_of_windows(fgrams, windows)
    plain = torch.randn(len(fgrams), DIM, generator=torch.Generator().manual_seed(0))
    generator = np.random.default_rng(1)
    num_done = num_wrong = 0
    combinations = [(backend, codec) for backend in BACKENDS for codec in CODECS]
    for backend, codec in combinations:
        table_codec = RowCodec(codec, "bfloat16", DIM)
        expected = table_codec.decode_reference(table_codec.encode(plain)).view(torch.int16)
        path = write_table(tmp_path / f"{backend}-{codec}", fgrams, dim=DIM, backend=backend, codec=codec)
        for config in configs(len(fgrams) * table_codec.row_bytes):
            wanted = -(-num_lookups // (len(combinations) * 6))
            with FGramTable.open(path, config) as table:
                assert table.wait_loaded(60)
                out = torch.empty(BATCH, DIM, dtype=torch.bfloat16)
                for _ in range(-(-wanted // BATCH)):
                    places = generator.integers(0, len(windows), BATCH)
                    ids, _ = table.match_last(windows[places])
                    hits = ids >= 0
                    table.read_into(ids, out)
                    same = (out.view(torch.int16)[hits] == expected[ids[hits]]).all(dim=1)
                    num_wrong += int((ids != expected_ids[places]).sum()) + int((~same).sum())
                    num_done += BATCH
    return num_done, num_wrong


def test_two_hundred_thousand_random_lookups(
    tmp_path: Path, zipf_fgrams: FGramSet, zipf_tokens: NDArray[np.int64], write_table: WriteTable
) -> None:
    num_done, num_wrong = count_differences(tmp_path, zipf_fgrams, zipf_tokens, write_table, 200_000)
    assert num_done >= 190_000
    assert num_wrong == 0


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_ten_million_random_lookups(
    tmp_path: Path,
    zipf_fgrams: FGramSet,
    zipf_tokens: NDArray[np.int64],
    write_table: WriteTable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    num_done, num_wrong = count_differences(tmp_path, zipf_fgrams, zipf_tokens, write_table, 10_000_000)
    with capsys.disabled():
        print(f"\n{num_done} random look-ups, {num_wrong} differences")
    assert num_done >= 10_000_000
    assert num_wrong == 0


def test_a_wrong_row_would_be_noticed(
    tmp_path: Path,
    zipf_fgrams: FGramSet,
    zipf_tokens: NDArray[np.int64],
    write_table: WriteTable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One bit of one row in a batch."""
    plain = FGramTable.read_into

    def read_wrongly(self: FGramTable, ids: NDArray[np.int64], out: torch.Tensor) -> None:
        plain(self, ids, out)
        out.view(torch.int16)[int((ids >= 0).argmax()), 5] ^= 1

    monkeypatch.setattr(FGramTable, "read_into", read_wrongly)
    _, num_wrong = count_differences(tmp_path, zipf_fgrams, zipf_tokens, write_table, 1)
    assert num_wrong == 48
