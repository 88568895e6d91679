"""Measures look-up beside its rivals in one run: match, rows from memory, rows from a cold disk.

Rivals (lookup_rivals.py): the paper's recipe, `np.memmap`, torch, engramdb where it is installed; copies are
held against a plain one. Ways that are compared take turns, so that a slow moment of the machine hits all;
medians count, and of look-ups in memory the median of five rounds; each rival's answers are compared with
ours before its time does.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.cold_benchmark import measure_cold
from scone.cache.errors import CacheError
from scone.cache.fgram_table import FGramTable
from scone.cache.lookup_rivals import DictMatch, EngramRows, MemmapRows, RowSource, TorchFileRows
from scone.cache.lookup_workload import Workload, cut_workload, drop_from_page_cache, write_table
from scone.cache.table_config import TableConfig
from scone.kernels.row_target import RowTarget
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_files import open_table_files
from scone.model_store.token_corpus import TokenCorpus

I64 = NDArray[np.int64]
_STEPS_PER_PROMPT = 32
_GATHER_BYTES = 256 << 20  # far beyond the processor's caches
_MAX_MATRIX_BYTES = 6 << 30
_NUM_ROUNDS = 5
"""Of look-ups in memory: the first one, right after the rows were loaded, is often slower than all others."""

Way = Callable[[int], object]
"""One way to do the work; the argument says which piece of the workload."""

_PAUSE_SECONDS = 0.01
"""Before each piece of ways that use threads: OpenMP's spin for some milliseconds after their work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupBenchmark:
    """What to measure.

    Attributes:
        work: folder for the table and the rivals' files; those of an earlier run are used again.
        corpus, heldout: text to count f-grams in, and other text to look up.
        with_lmdb: also measure the paper's disk table, whose file takes long to write.
        repeats: prompts; each is measured once in each way, and so are 32 decode steps for each.
    """

    work: Path
    corpus: TokenCorpus
    heldout: TokenCorpus
    num_rows: int
    min_count: int
    dim: int
    num_tokens: int
    batch: int
    with_lmdb: bool
    repeats: int

    def run(self) -> dict[str, Any]:
        """Raises CacheError if a rival's answer differs from ours, TableError, FGramSetError."""
        path, fgrams = write_table(
            self.work, self.corpus, num_rows=self.num_rows, min_count=self.min_count, dim=self.dim
        )
        workload = cut_workload(
            self.heldout,
            self.num_tokens,
            self.batch,
            num_prompts=self.repeats,
            num_steps=_STEPS_PER_PROMPT * self.repeats,
        )
        result = self._facts(fgrams) | {"open_cold_ms": _measure_open(path, self.repeats)}
        result |= self._measure_memory(path, fgrams, workload)
        engram = self._engram_folder() if EngramRows.available() else None
        lmdb_path = self.work / f"paper-{self.num_rows}-{self.dim}.lmdb" if self.with_lmdb else None
        result["cold"] = measure_cold(path, fgrams, workload.prompts, lmdb_path, engram)
        return result

    def _measure_memory(self, path: Path, fgrams: FGramSet, workload: Workload) -> dict[str, Any]:
        """All rows in the RAM tier."""
        config = TableConfig(ram_bytes=1 << 50, num_threads=torch.get_num_threads())
        with FGramTable.open(path, config) as table:
            if not table.wait_loaded():
                raise CacheError("the benchmark's table could not be loaded into memory")
            matrix, whose = _matrix_of(table)
            matched = table.match(workload.prompts.reshape(-1))[0] >= 0
            lookups = _MemoryLookups(table, matrix, fgrams, workload)
            lookups.check()
            rounds = [lookups.measure() for _ in range(_NUM_ROUNDS)]
            return {
                "matched_share": round(float(matched.mean()), 3),
                "matrix": whose,
                "us_per_token": {way: _median_round(rounds, way) for way in rounds[0]},
                "us_per_token_by_round": rounds,
                "gather": _measure_gather(table, matrix, self.repeats),
                "us_per_row_in_memory": self._measure_rows(table, path, workload.prompts),
            }

    def _facts(self, fgrams: FGramSet) -> dict[str, Any]:
        return {
            "benchmark": "lookup",
            "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(("scone", *sys.argv[1:])),
            "num_rows": len(fgrams),
            "num_made_up_rows": int((fgrams.counts < fgrams.min_count).sum()),
            "dim": self.dim,
            "row_bytes": 2 * self.dim,
            "num_tokens": self.num_tokens,
            "batch": self.batch,
            "threads": torch.get_num_threads(),
        }

    def _engram_folder(self) -> Path:
        return self.work / f"engram-{self.num_rows}-{self.dim}"

    def _measure_rows(self, table: FGramTable, path: Path, prompts: I64) -> dict[str, float]:
        """The rows of a prompt's matches by id, all in memory or the page cache."""
        ids = [_hits(table.match(prompt)[0]) for prompt in prompts]
        out = torch.zeros(max(map(len, ids)), table.dim, dtype=table.dtype)
        files = open_table_files(path)
        sources: dict[str, RowSource] = {
            "np_memmap": MemmapRows(files),
            "torch_index_select": TorchFileRows(files),
        }
        if EngramRows.available():
            EngramRows.write(self._engram_folder(), files)
            sources["engramdb"] = EngramRows(self._engram_folder(), files)
        with FGramTable.open(path) as mapped:
            ways: dict[str, Way] = {
                "ours_ram": lambda i: table.read_into(ids[i], out[: len(ids[i])]),
                "ours_mmap": lambda i: mapped.read_into(ids[i], out[: len(ids[i])]),
            }
            for name, source in sources.items():
                _check_rows(source.rows(ids[0]), table.rows(ids[0]), name)
                ways[name] = lambda i, source=source: source.rows(ids[i])  # type: ignore[misc]
            seconds = _medians(ways, len(ids), pause=_PAUSE_SECONDS)
        for source in sources.values():
            source.close()
        num_rows = statistics.median(map(len, ids))
        return {name: round(1e6 * s / num_rows, 3) for name, s in seconds.items()}


def _measure_open(path: Path, repeats: int) -> float:
    """Milliseconds to open the table when none of its files is in the page cache."""
    times = []
    for _ in range(repeats):
        for file in path.iterdir():
            drop_from_page_cache(file)
        started = time.perf_counter()
        FGramTable.open(path).close()
        times.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(times), 2)


class _MemoryLookups:
    """Match, then match and rows, of prompts and of decode steps: ours and the paper's recipe for RAM.

    Ours are the calls that an engine makes; the look-up of a step appends to each sequence's row ids.
    """

    def __init__(self, table: FGramTable, matrix: Tensor, fgrams: FGramSet, workload: Workload) -> None:
        self._table, self._matrix, self._rival = table, matrix, DictMatch(fgrams)
        self._prompts = workload.prompts
        self._prompt_lists, self._step_lists = workload.prompts.tolist(), workload.steps.tolist()
        num_steps, batch, width = workload.steps.shape
        self._num_prompts, self._num_tokens = workload.prompts.shape
        self._num_steps, self._batch = num_steps, batch
        self._row_ids: list[list[int]] = [[-1] * (width - 1) for _ in range(batch)]
        self._positions = [width - 1] * batch
        self._out = torch.zeros(self._num_tokens, table.dim, dtype=table.dtype)
        self._newest = RowTarget(self._out[:batch], *np.empty((2, batch), np.int64))

    def check(self) -> None:
        """Raises CacheError if the dict matches other rows than the table."""
        for i in range(self._num_prompts):
            _check_match(self._rival.match(self._prompt_lists[i]), self._table.match(self._prompts[i])[0])
        for i in range(self._num_steps):
            self._match_step(i)
            _check_match(self._rival.match_last(self._step_lists[i]), [ids[-1] for ids in self._row_ids])
            self._forget_step()

    def measure(self) -> dict[str, dict[str, float]]:
        """Microseconds per token of each way, and by how much ours is faster."""
        rival = self._rival
        match_prompt = _medians(
            {"ours": self._match_prompt, "dict": lambda i: rival.match(self._prompt_lists[i])},
            self._num_prompts,
        )
        match_step = _medians(
            {"ours": self._match_step, "dict": lambda i: rival.match_last(self._step_lists[i])},
            self._num_steps,
            after=self._forget_step,
        )
        rows_prompt = _medians(
            {"ours": self._read_prompt, "dict_and_matrix": self._pick_prompt},
            self._num_prompts,
            pause=_PAUSE_SECONDS,
        )
        rows_step = _medians(
            {"ours": self._look_up_step, "dict_and_matrix": self._pick_step},
            self._num_steps,
            after=self._forget_step,
        )
        return {
            "match_prompt": _per_token(match_prompt, self._num_tokens),
            "match_batch": _per_token(match_step, self._batch),
            "rows_prompt": _per_token(rows_prompt, self._num_tokens),
            "rows_batch": _per_token(rows_step, self._batch),
        }

    def _match_prompt(self, i: int) -> I64:
        return self._table.match(self._prompts[i])[0]

    def _match_step(self, i: int) -> object:
        return self._table.match_newest(self._step_lists[i], self._row_ids, self._newest)

    def _read_prompt(self, i: int) -> None:
        ids = self._match_prompt(i)
        self._table.read_into(ids, self._out[: len(ids)])

    def _look_up_step(self, i: int) -> None:
        num_rows = self._table.look_up_newest(
            self._step_lists[i], self._row_ids, self._positions, self._newest
        )
        assert num_rows is not None

    def _forget_step(self) -> None:
        width = self._positions[0]
        for ids in self._row_ids:
            del ids[width:]

    def _pick_prompt(self, i: int) -> Tensor:
        return self._pick(self._rival.match(self._prompt_lists[i]))

    def _pick_step(self, i: int) -> Tensor:
        return self._pick(self._rival.match_last(self._step_lists[i]))

    def _pick(self, ids: list[int]) -> Tensor:
        wanted = torch.tensor([row for row in ids if row >= 0], dtype=torch.int64)
        return self._matrix.index_select(0, wanted)


def _per_token(seconds: dict[str, float], num_tokens: int) -> dict[str, float]:
    """Of our way and one other."""
    ours, theirs = seconds.values()
    return {
        **{way: round(1e6 * s / num_tokens, 4) for way, s in seconds.items()},
        "times_faster": round(theirs / ours, 2),
    }


def _median_round(rounds: list[dict[str, dict[str, float]]], way: str) -> dict[str, float]:
    """Of the round whose ratio is the median."""
    ranked = sorted((measured[way] for measured in rounds), key=lambda entry: entry["times_faster"])
    return ranked[len(ranked) // 2]


def _matrix_of(table: FGramTable) -> tuple[Tensor, str]:
    """All rows as one tensor, and whose memory it is."""
    if table.num_fgrams * table.manifest.row_bytes > _MAX_MATRIX_BYTES:
        assert table._row_tiers.ram is not None
        matrix = torch.from_numpy(table._row_tiers.ram._data).view(table.dtype)
        return matrix.view(-1, table.dim), "the RAM tier's, huge pages included: no room for a second copy"
    return table.rows(np.arange(table.num_fgrams)), "torch's"


def _measure_gather(table: FGramTable, matrix: Tensor, repeats: int) -> dict[str, Any]:
    """Random rows of the RAM tier against a plain copy of as many bytes, same threads, touched buffers."""
    num_rows = max(1, min(table.num_fgrams, _GATHER_BYTES // table.manifest.row_bytes))
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, table.num_fgrams, num_rows) for _ in range(2)]
    out = torch.ones(num_rows, table.dim, dtype=table.dtype)
    source = torch.ones_like(out)
    target = torch.ones_like(out)
    seconds = _medians(
        {
            "gather": lambda i: table.read_into(ids[i % 2], out),
            "plain_copy": lambda i: target.copy_(source),
            "torch_index_select": lambda i: torch.index_select(
                matrix, 0, torch.from_numpy(ids[i % 2]), out=target
            ),
        },
        repeats,
        pause=_PAUSE_SECONDS,
    )
    num_bytes = num_rows * table.manifest.row_bytes
    return {
        "num_rows": num_rows,
        "gigabytes_per_second": {name: round(num_bytes / s / 1e9, 2) for name, s in seconds.items()},
        "share_of_plain_copy": round(seconds["plain_copy"] / seconds["gather"], 3),
    }


def _medians(
    ways: dict[str, Way], num: int, *, pause: float = 0.0, after: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each way over pieces 0 to num - 1, the ways taking turns, `pause` seconds apart.

    `after` follows each piece, untimed.

    Each piece is done once before: on a virtual machine the first touch of a page may go through the host. In
    one turn each way does another piece: two that read the same memory would find it in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(num):
        for way in ways.values():
            way(i)
            after()
    for i in range(num):
        for turn, (name, way) in enumerate(ways.items()):
            piece = (i + turn * num // len(ways)) % num
            if pause:
                time.sleep(pause)
            started = time.perf_counter()
            way(piece)
            times[name].append(time.perf_counter() - started)
            after()
    return {name: statistics.median(values) for name, values in times.items()}


def _hits(row_ids: I64) -> I64:
    return row_ids[row_ids >= 0]


def _check_match(theirs: list[int], ours: I64 | list[int]) -> None:
    if theirs != list(ours):
        raise CacheError("the dict matched other rows than the table: nothing was measured")


def _check_rows(theirs: object, ours: Tensor, rival: str) -> None:
    content = theirs.numpy() if isinstance(theirs, Tensor) else theirs
    if (content.tobytes() if isinstance(content, np.ndarray) else content) != ours.view(
        torch.uint8
    ).numpy().tobytes():
        raise CacheError(f"{rival} gave other rows than the table: nothing was measured")


def _processor() -> str:
    """The processor's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine
    )
