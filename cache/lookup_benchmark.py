"""Measures look-up beside its rivals, in one run: the paper's recipe (a Python dict, a torch matrix, one
LMDB get per probe) and a bare loop of direct reads.

Keys and text are made up with the skew of real ones; rows are random. Medians; each rival's answers are
compared with ours before its time counts.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache.direct_reader import DirectReader
from scone.cache.errors import CacheError
from scone.cache.fgram_table import FGramTable
from scone.cache.table_config import TableConfig
from scone.kernels.gather import CHECK_BYTES
from scone.model_store.count import count_fgrams
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files
from scone.model_store.table_header import HEADER_BYTES
from scone.model_store.table_writer import TableWriter

MAX_N = 5
_ROWS_PER_APPEND = 1 << 16
Seconds = float


def benchmark_lookup(
    work: Path, *, num_rows: int, dim: int, num_corpus_tokens: int, num_tokens: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Builds a table in `work` and measures it; raises CacheError if a rival's answer differs from ours."""
    corpus = made_up_corpus(num_corpus_tokens)
    fgrams = count_fgrams(
        corpus, max_n=MAX_N, min_count=5, top=num_rows, tokenizer_hash="74" * 32, work=work / "count"
    )
    path = write_random_table(work / "table", fgrams, dim)
    # the corpus's own end: repeats what was counted, as text does
    tokens = np.array(corpus.tokens[-num_tokens:], np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int32), MAX_N)[:batch].copy()
    rows_by_key = {
        tuple(f[:n]): row
        for row, (f, n) in enumerate(zip(fgrams.tokens.tolist(), fgrams.lengths.tolist(), strict=True))
    }
    ram = FGramTable.open(path, TableConfig(ram_bytes=1 << 50))
    if not ram.wait_loaded():
        raise CacheError("the benchmark's table could not be loaded")
    matrix = ram.rows(np.arange(ram.num_fgrams))
    result: dict[str, Any] = {
        "benchmark": "lookup",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "num_rows": ram.num_fgrams,
        "dim": dim,
        "num_tokens": num_tokens,
        "batch": batch,
        "matched_share": round(float((ram.match(tokens)[0] >= 0).mean()), 3),
    }
    result["us_per_token"] = {
        **_measure_match(ram, rows_by_key, tokens, windows, repeats),
        **_measure_rows(ram, rows_by_key, matrix, tokens, windows, repeats),
    }
    result["rows_per_second_cold"] = _measure_disk(work, path, fgrams, rows_by_key, tokens, repeats)
    ram.close()
    return result


def write_random_table(path: Path, fgrams: FGramSet, dim: int) -> Path:
    """A bfloat16 table of normal rows, seed 0."""
    generator = torch.Generator().manual_seed(0)
    with TableWriter.create(
        path, fgrams, dim=dim, dtype="bfloat16", model_hash="6d" * 32, tokenizer_hash=fgrams.tokenizer_hash
    ) as writer:
        for begin in range(writer.num_rows_done, len(fgrams), _ROWS_PER_APPEND):
            num_rows = min(_ROWS_PER_APPEND, len(fgrams) - begin)
            writer.append(torch.randn(num_rows, dim, generator=generator))
        writer.finish()
    return path


def match_with_dict(rows_by_key: dict[tuple[int, ...], int], tokens: Sequence[int]) -> list[int]:
    """The paper's match: longest key first, one dict probe for each length."""
    found = []
    for end in range(1, len(tokens) + 1):
        row = -1
        for n in range(min(MAX_N, end), 1, -1):
            row = rows_by_key.get(tuple(tokens[end - n : end]), -1)
            if row >= 0:
                break
        found.append(row)
    return found


def _measure_match(
    table: FGramTable,
    rows_by_key: dict[tuple[int, ...], int],
    tokens: NDArray[np.int64],
    windows: NDArray[np.int32],
    repeats: int,
) -> dict[str, Any]:
    texts = windows.tolist()
    token_list = tokens.tolist()
    _check(match_with_dict(rows_by_key, token_list), table.match(tokens)[0].tolist(), "dict")
    long = _median(lambda: table.match(tokens), repeats)
    long_dict = _median(lambda: match_with_dict(rows_by_key, token_list), 3)
    step = _median(lambda: table.match_last(windows), 10 * repeats)
    step_dict = _median(lambda: [_last_match(rows_by_key, text) for text in texts], 10 * repeats)
    return {
        "match_prompt": _beside(long, long_dict, "dict", len(tokens)),
        "match_batch": _beside(step, step_dict, "dict", len(texts)),
    }


def _measure_rows(
    table: FGramTable,
    rows_by_key: dict[tuple[int, ...], int],
    matrix: torch.Tensor,
    tokens: NDArray[np.int64],
    windows: NDArray[np.int32],
    repeats: int,
) -> dict[str, Any]:
    out = torch.empty(len(tokens), table.dim, dtype=table.dtype)
    token_list, texts = tokens.tolist(), windows.tolist()

    def ours(ids: NDArray[np.int64]) -> None:
        table.read_into(ids, out[: len(ids)])

    def theirs(ids: list[int]) -> torch.Tensor:
        return matrix.index_select(0, torch.tensor([row for row in ids if row >= 0], dtype=torch.int64))

    long = _median(lambda: ours(table.match(tokens)[0]), repeats)
    long_dict = _median(lambda: theirs(match_with_dict(rows_by_key, token_list)), 3)
    step = _median(lambda: ours(table.match_last(windows)[0]), 10 * repeats)
    step_dict = _median(lambda: theirs([_last_match(rows_by_key, text) for text in texts]), 10 * repeats)
    random_ids = np.random.default_rng(0).integers(0, table.num_fgrams, len(tokens))
    source, target = torch.ones_like(out), torch.empty_like(out)
    gather, copy = _median(lambda: ours(random_ids), repeats), _median(lambda: target.copy_(source), repeats)
    return {
        "rows_prompt": _beside(long, long_dict, "dict_and_matrix", len(tokens)),
        "rows_batch": _beside(step, step_dict, "dict_and_matrix", len(texts)),
        "gather_random": _beside(gather, copy, "plain_copy", len(tokens)),
    }


def _measure_disk(
    work: Path,
    path: Path,
    fgrams: FGramSet,
    rows_by_key: dict[tuple[int, ...], int],
    tokens: NDArray[np.int64],
    repeats: int,
) -> dict[str, Any]:
    """A prompt's rows from a cold file: direct reads, a bare loop of them, mapped, one LMDB get per probe."""
    direct = FGramTable.open(path, TableConfig(disk_reader="direct"))
    mapped = FGramTable.open(path)
    ids = direct.match(tokens)[0]
    wanted = np.unique(ids[ids >= 0])
    out = torch.empty(len(wanted), direct.dim, dtype=direct.dtype)
    keys = [key for key, row in rows_by_key.items() if row in set(wanted.tolist())]
    lmdb_path = _write_row_per_key(work / "paper.lmdb", keys, direct.rows([rows_by_key[key] for key in keys]))

    def cold(action: Callable[[], object], file: Path) -> Seconds:
        times = []
        for _ in range(repeats):
            _drop_from_page_cache(file)
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    rows_file = path / "rows.bin"
    seconds = {
        "direct": cold(lambda: direct.read_into(wanted, out), rows_file),
        "bare_direct_loop": cold(_bare_loop(path, wanted, direct.manifest.row_bytes), rows_file),
        "mmap": cold(lambda: mapped.read_into(wanted, out), rows_file),
        "lmdb_get_per_probe": cold(lambda: _get_each(lmdb_path, keys), lmdb_path),
    }
    direct.close()
    mapped.close()
    return {name: round(len(wanted) / s) for name, s in seconds.items()}


def _bare_loop(path: Path, row_ids: NDArray[np.int64], row_bytes: int) -> Callable[[], object]:
    """The rows' pages read one by one at the same depth: no merging, checking or decoding."""
    reader = DirectReader(open_table_files(path))
    first = row_ids * row_bytes // CHECK_BYTES
    last = ((row_ids + 1) * row_bytes - 1) // CHECK_BYTES
    pages = np.unique(np.concatenate((first, last)))
    places = np.arange(len(pages)) * CHECK_BYTES
    buffer = reader._take_buffer(len(pages) * CHECK_BYTES)
    sizes = np.full(len(pages), CHECK_BYTES, np.int64)
    return lambda: reader._spans.read(pages * CHECK_BYTES + HEADER_BYTES, sizes, places, buffer)


def _write_row_per_key(path: Path, keys: list[tuple[int, ...]], rows: torch.Tensor) -> Path:
    """The paper's layout: the f-gram's token ids are the key, its row the value."""
    stored = rows.view(torch.uint8).numpy()
    items = sorted((np.array(key, ">u4").tobytes(), stored[i].tobytes()) for i, key in enumerate(keys))
    with lmdb.open(str(path), subdir=False, map_size=stored.nbytes * 4 + (64 << 20), lock=False) as env:
        with env.begin(write=True) as txn:
            for key, value in items:
                txn.put(key, value, append=True)
        env.sync(True)
    return path


def _get_each(path: Path, keys: list[tuple[int, ...]]) -> int:
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as env,
        env.begin() as txn,
    ):
        return sum(len(txn.get(np.array(key, ">u4").tobytes()) or b"") for key in keys)


def _last_match(rows_by_key: dict[tuple[int, ...], int], tokens: list[int]) -> int:
    for n in range(min(MAX_N, len(tokens)), 1, -1):
        row = rows_by_key.get(tuple(tokens[-n:]))
        if row is not None:
            return row
    return -1


def _drop_from_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _beside(ours: Seconds, theirs: Seconds, rival: str, num_tokens: int) -> dict[str, float]:
    return {
        "ours": round(1e6 * ours / num_tokens, 4),
        rival: round(1e6 * theirs / num_tokens, 4),
        "times_faster": round(theirs / ours, 2),
    }


def _median(action: Callable[[], object], repeats: int) -> Seconds:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _check(theirs: list[int], ours: list[int], rival: str) -> None:
    if theirs != ours:
        raise CacheError(f"the {rival} matched other rows than the table: the measurement is void")
