"""Holds predictions of `scone plan` against a real table and model: the deviation of each figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scone.cache import FGramTable, TableConfig
from scone.cache.lookup_costs import NUM_STEPS, cold_microseconds, step_histories
from scone.cache.row_pattern import I64, RowPattern
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import TableManifest
from scone.model_store.table_writer import FGRAMS_NAME
from scone.server.model_speed import measure_model_speed
from scone.server.plan import Plan, PlannedTable, make_plan


def benchmark_plan(
    checkpoint: Checkpoint,
    path: Path,
    prompts: Sequence[Sequence[int]],
    *,
    ram_bytes: int,
    batch: int,
    repeats: int,
) -> dict[str, Any]:
    """Predicts, then measures: `ram_bytes` of the rows in memory, the others read past the page cache.

    All of it `repeats` times. Each prediction is held against the measurement that follows it, as the machine
    may be another one a minute later; the deviation is the median of theirs.

    The prediction knows the table's shape, its f-gram set and the prompts, but reads nothing of its rows.

    Raises:
        SconeError: table, model and machine do not fit together.
    """
    manifest = TableManifest.read(path)
    fgrams = FGramSet.load(path / FGRAMS_NAME)
    config = TableConfig(ram_bytes=ram_bytes, disk_reader="direct", num_threads=torch.get_num_threads())
    table = PlannedTable(
        num_fgrams=manifest.num_fgrams,
        codec=manifest.row_codec,
        backend=manifest.backend,
        mean_length=float(fgrams.lengths.mean()),
        folder=path.parent,
        config=config,
    )
    with FGramTable.open(path, config) as opened:
        opened.check_model(checkpoint.model_hash, checkpoint.tokenizer().hash)
        opened.wait_loaded()
        texts = [np.asarray(prompt, np.int64) for prompt in prompts]
        row_ids = [opened.match(text)[0] for text in texts]
        pattern = RowPattern(row_ids, table.num_ram_rows)
        predicted, measured = [], []
        for _ in range(repeats):
            plan = make_plan(
                table, pattern, fgrams, texts, batch=batch, checkpoint=checkpoint, prompts=prompts
            )
            predicted.append(_predicted(table, plan))
            speed = measure_model_speed(checkpoint, opened, prompts, batch)
            measured.append(
                _measure(opened, pattern, texts, batch)
                | {"first_token_ms": 1e3 * speed.first_token, "token_ms": 1e3 * speed.step}
            )
    table_bytes = sum(entry.num_bytes for entry in manifest.files.values())
    return {
        "ram_share": round(pattern.ram_share, 3),
        "disk_share": round(pattern.disk_share, 3),
        "prompt_tokens": pattern.num_tokens,
        "batch": batch,
        "table_bytes": _beside([table.size.total], [table_bytes]),
        **{name: _beside([p[name] for p in predicted], [m[name] for m in measured]) for name in measured[0]},
    }


def _beside(predicted: list[float], measured: list[float]) -> dict[str, Any]:
    """Medians of each, the median of how far the first are from the second, and all values."""
    ratios = [ours / real for ours, real in zip(predicted, measured, strict=True)]
    return {
        "predicted": round(statistics.median(predicted), 3),
        "measured": round(statistics.median(measured), 3),
        "deviation": round(statistics.median(ratios) - 1, 3),
        "all_predicted": [round(value, 3) for value in predicted],
        "all_measured": [round(value, 3) for value in measured],
    }


def _predicted(table: PlannedTable, plan: Plan) -> dict[str, float]:
    assert plan.first_token_ms is not None
    assert plan.token_ms is not None
    return {
        "prompt_us": plan.costs.prompt + plan.prompt_disk_us,
        "step_us": plan.costs.step + plan.step_disk_us,
        "first_token_ms": plan.first_token_ms,
        "token_ms": plan.token_ms,
    }


def _measure(table: FGramTable, pattern: RowPattern, texts: Sequence[I64], batch: int) -> dict[str, float]:
    """Look-ups alone, microseconds: of a prompt, medians; of a decode step, the mean over many."""
    out = torch.empty(max(pattern.num_tokens, batch), table.dim, dtype=table.dtype)

    def prompt(i: int) -> None:
        row_ids, _ = table.match(texts[i])
        table.read_into(row_ids, out[: len(row_ids)])

    steps = step_histories(texts, batch)

    def step(i: int) -> None:
        row_ids, _ = table.match_last(steps[i])
        table.read_into(row_ids, out[:batch])

    prompt_us = statistics.median(cold_microseconds(prompt, len(texts)))
    return {"prompt_us": prompt_us, "step_us": statistics.fmean(cold_microseconds(step, NUM_STEPS))}
