"""Measures look-up beside its rivals in one run: match, rows from memory, rows from a cold disk.

Rivals (lookup_rivals.py): the paper's recipe, `np.memmap`, torch, engramdb where it is installed; copies are
held against a plain one. Ways that are compared take turns, so that a slow moment of the machine hits all;
medians count; each rival's answers are compared with ours before its time does.
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
            return {
                "matched_share": round(float(matched.mean()), 3),
                "matrix": whose,
                "us_per_token": _measure_lookup(table, matrix, fgrams, workload),
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
            seconds = _medians(ways, len(ids), _PAUSE_SECONDS)
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


def _measure_lookup(
    table: FGramTable, matrix: Tensor, fgrams: FGramSet, workload: Workload
) -> dict[str, dict[str, float]]:
    """Match, then match and rows, of prompts and of decode steps, against the paper's recipe for RAM."""
    rival = DictMatch(fgrams)
    prompts, steps = workload.prompts, workload.steps
    prompt_lists, step_lists = prompts.tolist(), steps.tolist()
    for i in range(len(prompts)):
        _check_match(rival.match(prompt_lists[i]), table.match(prompts[i])[0])
    for i in range(len(steps)):
        _check_match(rival.match_last(step_lists[i]), table.match_last(steps[i])[0])
    out = torch.zeros(prompts.shape[1], table.dim, dtype=table.dtype)

    def ours(ids: I64) -> None:
        table.read_into(ids, out[: len(ids)])

    batch = steps.shape[1]
    wanted, places = np.empty((2, batch), np.int64)
    positions = [steps.shape[2] - 1] * batch
    target = RowTarget(out[:batch], wanted, places)
    # of each sequence, the row ids of its tokens so far: the look-up adds that of the newest
    row_ids: list[list[int]] = [[-1] * positions[0] for _ in range(batch)]

    def our_step(i: int) -> None:
        num_rows = table.look_up_newest(step_lists[i], row_ids, positions, target)
        assert num_rows is not None
        for ids in row_ids:
            ids.pop()

    def theirs(ids: list[int]) -> Tensor:
        return matrix.index_select(0, torch.tensor([row for row in ids if row >= 0], dtype=torch.int64))

    def beside(
        name: str, our_way: Way, their_way: Way, num: int, num_tokens: int, pause: float = 0.0
    ) -> dict[str, float]:
        seconds = _medians({"ours": our_way, name: their_way}, num, pause)
        return {
            **{way: round(1e6 * s / num_tokens, 4) for way, s in seconds.items()},
            "times_faster": round(seconds[name] / seconds["ours"], 2),
        }

    num_tokens = prompts.shape[1]
    return {
        "match_prompt": beside(
            "dict",
            lambda i: table.match(prompts[i]),
            lambda i: rival.match(prompt_lists[i]),
            len(prompts),
            num_tokens,
        ),
        "match_batch": beside(
            "dict",
            lambda i: table.match_last(steps[i]),
            lambda i: rival.match_last(step_lists[i]),
            len(steps),
            batch,
        ),
        "rows_prompt": beside(
            "dict_and_matrix",
            lambda i: ours(table.match(prompts[i])[0]),
            lambda i: theirs(rival.match(prompt_lists[i])),
            len(prompts),
            num_tokens,
            _PAUSE_SECONDS,
        ),
        "rows_batch": beside(
            "dict_and_matrix",
            our_step,
            lambda i: theirs(rival.match_last(step_lists[i])),
            len(steps),
            batch,
        ),
    }


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
        _PAUSE_SECONDS,
    )
    num_bytes = num_rows * table.manifest.row_bytes
    return {
        "num_rows": num_rows,
        "gigabytes_per_second": {name: round(num_bytes / s / 1e9, 2) for name, s in seconds.items()},
        "share_of_plain_copy": round(seconds["plain_copy"] / seconds["gather"], 3),
    }


def _medians(ways: dict[str, Way], num: int, pause: float = 0.0) -> dict[str, float]:
    """Median seconds of each way over pieces 0 to num - 1, the ways taking turns, `pause` seconds apart.

    Each piece is done once before: on a virtual machine the first touch of a page may go through the host. In
    one turn each way does another piece: two that read the same memory would find it in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(num):
        for way in ways.values():
            way(i)
    for i in range(num):
        for turn, (name, way) in enumerate(ways.items()):
            piece = (i + turn * num // len(ways)) % num
            if pause:
                time.sleep(pause)
            started = time.perf_counter()
            way(piece)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def _hits(row_ids: I64) -> I64:
    return row_ids[row_ids >= 0]


def _check_match(theirs: list[int], ours: I64) -> None:
    if theirs != ours.tolist():
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
