"""What match, rows in memory and rows on the disk cost on this machine: a probe of some seconds.

Needs no table: it makes one up where the real one is to lie, and reads it through the same door. All is
timed with cold processor caches.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from scone.cache.fgram_table import FGramTable
from scone.cache.row_pattern import RowPattern
from scone.cache.table_config import TableConfig
from scone.kernels.row_codec import RowCodec
from scone.model_store.count import count_fgrams
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_writer import TableWriter, encode_rows

I64 = NDArray[np.int64]

PROBE_BYTES = 512 << 20
"""Of the probe's rows: beyond the processor's caches. A smaller table is probed at its own size."""

NUM_STEPS = 100
_ROWS_PER_APPEND = 4096
_MANY_ROWS = 256
_DISK_REPEATS = 30
_HISTORY_TOKENS = 5  # as many as the longest f-gram has
_CORPUS_TOKENS = 4_000_000
_CACHE_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class LookupCosts:
    """Microseconds.

    Attributes:
        prompt: of the look-up of a prompt, match included, but for rows on the disk.
        step: the same of one decode step.
        disk_round, disk_row: of rows read together: what any number takes, and what each row adds.
    """

    prompt: float
    step: float
    disk_round: float
    disk_row: float

    def disk(self, num_rows: float) -> float:
        """Microseconds until so many rows have been read together."""
        return self.disk_round + num_rows * self.disk_row if num_rows > 0 else 0.0


def measure_lookup_costs(
    codec: RowCodec,
    fgrams: FGramSet,
    texts: Sequence[I64],
    pattern: RowPattern,
    folder: Path,
    *,
    batch: int,
    config: TableConfig,
) -> LookupCosts:
    """Probes memory, and the disk that `folder` is on.

    Args:
        fgrams: the table's own set, or a smaller one of its kind; its head is used as far as the probe goes.
        texts: token ids (num_tokens,) of prompts, to match.
        batch: sequences of one decode step.
        config: how the real table will be read; its `io_depth` and `num_threads` count.

    Raises:
        TableError: `folder` cannot take the probe's table.
    """
    probed = fgrams.head(PROBE_BYTES // codec.row_bytes)
    with tempfile.TemporaryDirectory(dir=folder, prefix="scone-probe-") as work:
        path = write_probe_table(Path(work) / "table", probed, codec, model_hash="")
        in_memory = TableConfig(ram_bytes=1 << 50, num_threads=config.num_threads)
        with FGramTable.open(path, in_memory) as table:
            table.wait_loaded()
            prompt, step = _memory_costs(table, texts, pattern, batch)
        with FGramTable.open(path, TableConfig(disk_reader="direct", io_depth=config.io_depth)) as table:
            many = max(2, min(_num_disk_rows(pattern), table.num_fgrams))
            one, all_of_them = _disk_us(table, 1), _disk_us(table, many)
    each = (all_of_them - one) / (many - 1)
    return LookupCosts(prompt, step, max(0.0, one - each), each)


def made_up_texts(num_texts: int, num_tokens: int) -> tuple[FGramSet, list[I64]]:
    """A set of f-grams of up to five tokens, counted in made-up text, and prompts out of the same text."""
    corpus = made_up_corpus(_CORPUS_TOKENS)
    fgrams = count_fgrams(corpus, max_n=5, min_count=2, top=_CORPUS_TOKENS, tokenizer_hash="", progress=False)
    starts = np.linspace(0, corpus.num_tokens - num_tokens, num_texts).astype(np.int64)
    return fgrams, [corpus.tokens[start : start + num_tokens].astype(np.int64) for start in starts]


def write_probe_table(path: Path, fgrams: FGramSet, codec: RowCodec, *, model_hash: str) -> Path:
    """A table of these f-grams whose rows are small random ones, the same few thousand again and again."""
    made = 0.02 * torch.randn(_ROWS_PER_APPEND, codec.dim, generator=torch.Generator().manual_seed(0))
    stored, errors = encode_rows(codec, made)
    with TableWriter.create(
        path,
        fgrams,
        dim=codec.dim,
        dtype=codec.dtype,
        codec=codec.codec,
        model_hash=model_hash,
        tokenizer_hash=fgrams.tokenizer_hash,
    ) as writer:
        while missing := len(fgrams) - writer.num_rows_done:
            writer.append_stored(stored[:missing], errors[:missing])
        writer.finish()
    return path


def _memory_costs(
    table: FGramTable, texts: Sequence[I64], pattern: RowPattern, batch: int
) -> tuple[float, float]:
    """LookupCosts' prompt and step."""
    rng = np.random.default_rng(0)
    # the pattern may be that of a larger table
    in_memory = ((ids >= 0) & (ids < pattern.num_ram_rows) for ids in pattern.prompts)
    ids = [
        np.where(is_there, part % table.num_fgrams, -1)
        for part, is_there in zip(pattern.prompts, in_memory, strict=True)
    ]
    out = torch.empty(max(batch, pattern.num_tokens), table.dim, dtype=table.dtype)

    def prompt(i: int) -> None:
        table.match(texts[i])
        table.read_into(ids[i], out[: pattern.num_tokens])

    steps = step_histories(texts, batch)
    picked = rng.choice(np.concatenate(ids), (NUM_STEPS, batch))

    def step(i: int) -> None:
        table.match_last(steps[i])
        table.read_into(picked[i], out[:batch])

    prompts = cold_microseconds(prompt, len(ids))
    return statistics.median(prompts), statistics.fmean(cold_microseconds(step, NUM_STEPS))


def _num_disk_rows(pattern: RowPattern) -> int:
    return round(pattern.num_disk_rows(pattern.num_tokens)) or _MANY_ROWS


def step_histories(texts: Sequence[I64], batch: int) -> I64:
    """(NUM_STEPS, batch, _HISTORY_TOKENS): the last tokens of sequences that decode anywhere in the texts."""
    rng = np.random.default_rng(0)
    windows = np.concatenate([sliding_window_view(text, _HISTORY_TOKENS) for text in texts])
    chosen: I64 = windows[rng.integers(0, len(windows), (NUM_STEPS, batch))]
    return np.ascontiguousarray(chosen)


def _disk_us(table: FGramTable, num_rows: int) -> float:
    """Microseconds for so many distinct rows at random places, read past the page cache."""
    rng = np.random.default_rng(num_rows)
    ids = [rng.choice(table.num_fgrams, num_rows, replace=False) for _ in range(_DISK_REPEATS)]
    out = torch.empty(num_rows, table.dim, dtype=table.dtype)
    return statistics.fmean(cold_microseconds(lambda i: table.read_into(ids[i], out), len(ids)))


def cold_microseconds(do: Callable[[int], object], times: int) -> list[float]:
    """Of do(0), do(1), ...: each once untimed before, and with nothing of it left in the processor's caches.

    That is how a server does it: between two look-ups a model's weights pass through the caches.
    """
    flush = np.zeros(_CACHE_BYTES // 8)
    measured = []
    for timed in (False, True):
        for i in range(times):
            if timed:
                flush += 1
            started = time.perf_counter()
            do(i)
            if timed:
                measured.append(1e6 * (time.perf_counter() - started))
    return measured
