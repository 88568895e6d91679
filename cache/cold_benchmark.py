"""Measures reading a prompt's rows from a cold disk, beside its rivals and a bare loop of direct reads.

Before each reading the file is dropped from the page cache, and the share of it that is still there is noted,
before and after. "Cold" ends at this machine: what lies below a virtual disk may have a cache of its own. So
all is read once, untimed, before: else the first way to a page would be slow, and those after it quick.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache.errors import CacheError
from scone.cache.fgram_table import FGramTable
from scone.cache.lookup_rivals import EngramRows, LmdbPerProbe, MemmapRows, TorchFileRows
from scone.cache.lookup_workload import drop_from_page_cache, resident_share
from scone.cache.table_config import TableConfig
from scone.kernels.disk_read import Spans, open_span_reader
from scone.kernels.gather import CHECK_BYTES
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files
from scone.model_store.table_header import HEADER_BYTES

I64 = NDArray[np.int64]
DEPTHS = (4, 16, 32, 64, 128)
_LMDB_THREADS = 16
_LAYOUT_DEPTH = 64


@dataclass(eq=False)
class ColdWay:
    """One way to the rows. `open` is not timed; `read(opened, i)` is, for prompt i."""

    file: Path
    open: Callable[[], AbstractContextManager[Any]]
    read: Callable[[Any, int], object]
    seconds: list[float] = field(default_factory=list)
    resident_before: list[float] = field(default_factory=list)
    resident_after: list[float] = field(default_factory=list)

    def run(self, i: int, *, timed: bool) -> None:
        with self.open() as opened:
            drop_from_page_cache(self.file)
            before = resident_share(self.file)
            started = time.perf_counter()
            self.read(opened, i)
            seconds = time.perf_counter() - started
            if timed:
                self.seconds.append(seconds)
                self.resident_before.append(before)
                self.resident_after.append(resident_share(self.file))


class BareLoop:
    """Direct reads of a prompt's pages at a constant depth, and nothing else: not checked, not decoded."""

    def __init__(self, path: Path, depth: int, spans: Sequence[tuple[I64, I64]]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._reader = open_span_reader(self._fd, depth)
        self._spans = spans
        largest = max(int(sizes.sum()) for _, sizes in spans)
        self._buffer = np.frombuffer(mmap.mmap(-1, largest), np.uint8)
        self._buffer[:] = 0  # touched

    def read(self, i: int) -> None:
        offsets, sizes = self._spans[i]
        self._reader.read(Spans(offsets, sizes, np.cumsum(sizes) - sizes), self._buffer)

    def close(self) -> None:
        os.close(self._fd)


def measure_cold(
    path: Path, fgrams: FGramSet, prompts: NDArray[np.int64], lmdb_path: Path | None, engram: Path | None
) -> dict[str, Any]:
    """Medians over the prompts, each read twice in each way, once timed; the ways take turns.

    Args:
        lmdb_path, engram: the rivals' files, written here unless there; None: without that rival.

    Raises:
        CacheError: a rival's rows differ from ours.
    """
    if lmdb_path is not None:
        LmdbPerProbe.write(lmdb_path, fgrams, open_table_files(path))
    hits = _matched_rows(path, prompts, lmdb_path)
    ways = (
        _our_ways(path, hits) | _bare_ways(path, hits) | _rival_ways(path, hits, prompts, lmdb_path, engram)
    )
    for timed in (False, True):
        for i in range(len(prompts)):
            for way in ways.values():
                way.run(i, timed=timed)
    return _summary(ways, statistics.median(len(part) for part in hits))


def row_spans(row_ids: I64, row_bytes: int, *, merged: bool) -> tuple[I64, I64]:
    """Offsets and sizes in rows.bin of the pages that hold these rows, none twice; neighbours may merge."""
    first, last = row_ids * row_bytes // CHECK_BYTES, ((row_ids + 1) * row_bytes - 1) // CHECK_BYTES
    widest = int((last - first).max(initial=0))
    return _page_spans(np.concatenate([np.minimum(first + k, last) for k in range(widest + 1)]), merged)


def padded_spans(row_ids: I64, row_bytes: int) -> tuple[I64, I64]:
    """The same if no row straddled a page, as though each page were filled up after its last whole row."""
    return _page_spans(row_ids // (CHECK_BYTES // row_bytes), merged=True)


def _page_spans(pages: I64, merged: bool) -> tuple[I64, I64]:
    pages = np.unique(pages)
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1) if merged else np.arange(len(pages))
    counts = np.diff(np.append(starts, len(pages)))
    return pages[starts] * CHECK_BYTES + HEADER_BYTES, counts * CHECK_BYTES


def _matched_rows(path: Path, prompts: NDArray[np.int64], lmdb_path: Path | None) -> list[I64]:
    """The rows of each prompt's matches, after a check that LMDB has the same for the first prompt.

    A function of its own, so that no mapping outlives it: it would keep pages in the page cache.
    """
    with FGramTable.open(path) as table:
        ids = [table.match(prompt)[0] for prompt in prompts]
        if lmdb_path is not None:
            _check_lmdb(lmdb_path, prompts[0].tolist(), table, ids[0])
    return [part[part >= 0] for part in ids]


def _our_ways(path: Path, hits: list[I64]) -> dict[str, ColdWay]:
    def opened(reader: str) -> FGramTable:
        """As in a server that has read a prompt before: its buffers are there."""
        table = FGramTable.open(path, TableConfig(disk_reader=reader))
        if reader == "direct":
            table.read_into(np.linspace(0, table.num_fgrams - 1, len(out)).astype(np.int64), out)
        return table

    def read(table: FGramTable, i: int) -> None:
        table.read_into(hits[i], out[: len(hits[i])])

    files = open_table_files(path)
    manifest, rows_path = files.manifest, files.rows_path
    out = torch.zeros(max(map(len, hits)), manifest.dim, dtype=manifest.row_codec.torch_dtype)
    return {f"ours_{name}": ColdWay(rows_path, partial(opened, name), read) for name in ("direct", "mmap")}


def _bare_ways(path: Path, hits: list[I64]) -> dict[str, ColdWay]:
    def way(depth: int, spans: list[tuple[I64, I64]]) -> ColdWay:
        return ColdWay(
            rows_path,
            lambda: closing(BareLoop(rows_path, depth, spans)),
            lambda loop, i: loop.read(i),
        )

    files = open_table_files(path)
    rows_path, row_bytes, num_pages = files.rows_path, files.manifest.row_bytes, len(files.page_sums)
    ways = {
        f"bare_{'spans' if merged else 'pages'}_depth_{depth}": way(
            depth, [row_spans(part, row_bytes, merged=merged) for part in hits]
        )
        for merged in (False, True)
        for depth in DEPTHS
    }
    if CHECK_BYTES % row_bytes:
        # the file has room for the first rows only if they were padded: both layouts read those
        first = [part[part // (CHECK_BYTES // row_bytes) < num_pages] for part in hits]
        ways["layout_dense"] = way(_LAYOUT_DEPTH, [row_spans(part, row_bytes, merged=True) for part in first])
        ways["layout_padded"] = way(_LAYOUT_DEPTH, [padded_spans(part, row_bytes) for part in first])
    return ways


def _rival_ways(
    path: Path, hits: list[I64], prompts: NDArray[np.int64], lmdb_path: Path | None, engram: Path | None
) -> dict[str, ColdWay]:
    def rows(source: Any, i: int) -> object:
        return source.rows(hits[i])

    tokens, rows_path = prompts.tolist(), open_table_files(path).rows_path
    ways = {
        "np_memmap": ColdWay(rows_path, lambda: closing(MemmapRows(open_table_files(path))), rows),
        "torch_index_select": ColdWay(
            rows_path, lambda: closing(TorchFileRows(open_table_files(path))), rows
        ),
    }
    if engram is not None:
        file = EngramRows.write(engram, open_table_files(path))
        ways["engramdb"] = ColdWay(file, lambda: closing(EngramRows(engram, open_table_files(path))), rows)
    if lmdb_path is not None:
        for num_threads in (1, _LMDB_THREADS):
            ways[f"lmdb_get_per_probe_{num_threads}_threads"] = ColdWay(
                lmdb_path, partial(LmdbPerProbe, lmdb_path, num_threads), lambda env, i: env.read(tokens[i])
            )
    return ways


def _check_lmdb(lmdb_path: Path, tokens: list[int], table: FGramTable, ids: I64) -> None:
    rows = table.rows(ids).view(torch.uint8).numpy()
    with LmdbPerProbe(lmdb_path, _LMDB_THREADS) as env:
        found = env.read(tokens)
    for row_id, row, value in zip(ids, rows, found, strict=True):
        if (None if row_id < 0 else row.tobytes()) != value:
            raise CacheError(
                f"LMDB gave another row than the table for row id {row_id}: nothing was measured"
            )


def _summary(ways: dict[str, ColdWay], num_rows: float) -> dict[str, Any]:
    medians = {name: statistics.median(way.seconds) for name, way in ways.items()}
    bare = {name: s for name, s in medians.items() if name.startswith("bare_")}
    best = min(bare, key=lambda name: bare[name])
    ours = min(medians["ours_direct"], medians["ours_mmap"])
    return {
        "rows_of_a_prompt": num_rows,
        "rows_per_second": {name: round(num_rows / s) for name, s in medians.items()},
        "resident_share_before_and_after": {
            name: [round(max(way.resident_before), 4), round(max(way.resident_after), 4)]
            for name, way in ways.items()
        },
        "best_bare_loop": best,
        "ours_direct_to_best_bare_loop": round(bare[best] / medians["ours_direct"], 3),
        "times_faster_than_lmdb": {
            name: round(s / ours, 1) for name, s in medians.items() if name.startswith("lmdb_")
        },
    }
