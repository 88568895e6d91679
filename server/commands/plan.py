"""`scone plan`: how large a table will be, where its rows will lie, and what it will cost on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache import TableConfig
from scone.cache.lookup_costs import made_up_texts
from scone.cache.row_pattern import RowPattern, assumed_prompts
from scone.kernels.row_codec import CODECS, DTYPES, RowCodec
from scone.model_store.checkpoint import Checkpoint, open_checkpoint
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS
from scone.model_store.set_matcher import SetMatcher
from scone.server.errors import SettingError
from scone.server.plan import Plan, PlannedTable, make_plan
from scone.server.settings import Command, Resolved, Setting, parse_bool, parse_bytes

_NUM_PROMPTS = 6


def run(settings: Resolved) -> int:
    fgrams = None if settings.fgrams.isdigit() else FGramSet.load(settings.fgrams)
    checkpoint = None if settings.model is None else open_checkpoint(settings.model)
    table = _table(settings, fgrams, checkpoint)
    prompts = _prompts(settings, checkpoint)
    if fgrams is not None and settings.text is not None:
        texts = [np.asarray(prompt, np.int64) for prompt in prompts]
        matcher = SetMatcher(fgrams)
        row_ids = [matcher.match(text)[0] for text in texts]
    else:
        fgrams, texts = made_up_texts(_NUM_PROMPTS, settings.prompt_tokens)
        row_ids = assumed_prompts(
            table.num_fgrams, _NUM_PROMPTS, settings.prompt_tokens, settings.matched_share
        )
    plan = make_plan(
        table,
        RowPattern(row_ids, table.num_ram_rows),
        fgrams,
        texts,
        batch=settings.batch,
        checkpoint=checkpoint,
        prompts=prompts,
    )
    facts = plan_facts(table, plan)
    print(json.dumps(facts) if settings.json else _describe(table, plan, facts, settings))
    return 0


def plan_facts(table: PlannedTable, plan: Plan) -> dict[str, Any]:
    """What was predicted, as numbers."""
    size, row_bytes = table.size, table.codec.row_bytes
    return {
        "num_fgrams": table.num_fgrams,
        "row_bytes": row_bytes,
        "table_bytes": size.total,
        "index_bytes": size.index,
        "ram_rows": table.num_ram_rows,
        "ram_bytes": table.num_ram_rows * row_bytes,
        "disk_rows": table.num_fgrams - table.num_ram_rows,
        "disk_bytes": (table.num_fgrams - table.num_ram_rows) * row_bytes,
        "matched_share": plan.pattern.matched_share,
        "disk_share": plan.pattern.disk_share,
        "prompt_tokens": plan.pattern.num_tokens,
        "prompt_memory_us": plan.costs.prompt,
        "prompt_disk_us": plan.prompt_disk_us,
        "batch": plan.batch,
        "step_memory_us": plan.costs.step,
        "step_disk_us": plan.step_disk_us,
        "first_token_ms": plan.first_token_ms,
        "token_ms": plan.token_ms,
    }


def _table(settings: Resolved, fgrams: FGramSet | None, checkpoint: Checkpoint | None) -> PlannedTable:
    if checkpoint is None and settings.dim is None:
        raise SettingError("model and dim are both missing: the width of a row follows from one of them")
    num_fgrams = int(settings.fgrams) if fgrams is None else len(fgrams)
    if num_fgrams < 1:
        raise SettingError(f"fgrams is {settings.fgrams}, wanted a number of at least 1, or an f-gram set")
    try:
        dim = settings.dim if checkpoint is None else checkpoint.config.dim
        codec = RowCodec(settings.codec, settings.dtype, dim)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if not settings.nvme.is_dir():
        raise SettingError(f"nvme is {settings.nvme}, wanted a folder on the disk that will hold the table")
    return PlannedTable(
        num_fgrams=num_fgrams,
        codec=codec,
        backend=settings.backend,
        mean_length=3.0 if fgrams is None else float(fgrams.lengths.mean()),
        folder=settings.nvme,
        config=TableConfig(
            ram_bytes=settings.ram,
            disk_reader="direct",
            io_depth=settings.io_depth,
            num_threads=torch.get_num_threads(),
        ),
    )


def _prompts(settings: Resolved, checkpoint: Checkpoint | None) -> Sequence[Sequence[int]]:
    """Token ids of equally long prompts: of the text, or made up."""
    for name in ("prompt_tokens", "batch"):
        if settings.values[name] < (64 if name == "prompt_tokens" else 1):
            raise SettingError(f"{name} is {settings.values[name]}, wanted more")
    if checkpoint is None:
        if settings.text is not None:
            raise SettingError("text is given without model: a text needs the model's tokenizer")
        return ()
    if settings.text is None:
        rng = np.random.default_rng(0)
        made_up = rng.integers(0, checkpoint.config.vocab_size, (_NUM_PROMPTS, settings.prompt_tokens))
        return [prompt.tolist() for prompt in made_up]
    text = settings.text.read_text(encoding="utf-8", errors="replace")
    return cut_prompts(np.asarray(checkpoint.tokenizer().encode(text)), settings.prompt_tokens)


def cut_prompts(tokens: NDArray[np.int64], length: int) -> list[list[int]]:
    """Stretches spread over a text, one beside the other at least; raises SettingError."""
    if len(tokens) < length * _NUM_PROMPTS:
        raise SettingError(f"text has {len(tokens)} tokens, wanted {_NUM_PROMPTS} x {length}")
    starts = np.linspace(0, len(tokens) - length, _NUM_PROMPTS).astype(int)
    return [tokens[start : start + length].tolist() for start in starts]


def _describe(table: PlannedTable, plan: Plan, facts: dict[str, Any], settings: Resolved) -> str:
    free = shutil.disk_usage(table.folder).free
    costs, pattern = plan.costs, plan.pattern
    lines = [
        f"table      {facts['table_bytes'] / 1e9:,.3f} GB: index {facts['index_bytes'] / 1e9:,.3f} GB,"
        f" {table.num_fgrams:,} rows of {facts['row_bytes']:,} bytes",
        f"RAM        {facts['ram_rows']:,} rows, {facts['ram_bytes'] / 1e9:,.3f} GB (and the index)",
        f"disk       {facts['disk_rows']:,} rows, {facts['disk_bytes'] / 1e9:,.3f} GB"
        + ("" if facts["table_bytes"] <= free else f"; {table.folder} has only {free / 1e9:,.1f} GB free"),
        f"look-ups   {pattern.matched_share:.1%} of positions match, {pattern.disk_share:.1%} need the disk"
        + (" (assumed: Zipf's law)" if settings.text is None else " (of the text)"),
        f"disk       rows read together: {costs.disk_round:.0f} us and {costs.disk_row:.2f} us for each",
        f"prompt     of {pattern.num_tokens} tokens: {costs.prompt / 1e3:.2f} ms in memory,"
        f" {plan.prompt_disk_us / 1e3:.2f} ms from disk",
        f"step       of {plan.batch} sequences: {costs.step:.0f} us in memory,"
        f" {plan.step_disk_us:.0f} us waiting for the disk",
    ]
    if plan.token_ms is not None:
        lines.append(
            f"model      {plan.first_token_ms:.0f} ms to the first token, {plan.token_ms:.2f} ms per token"
        )
    return "\n".join(lines)


COMMAND = Command(
    name="plan",
    help="predict a table's size and tiers, and times to first and next token, from a probe of this machine",
    settings=(
        Setting(name="fgrams", required=True, help="how many f-grams, or an f-gram set"),
        Setting(name="model", help="GGUF file or model folder to probe; gives dim"),
        Setting(name="dim", kind=int, help="values in a row, without a model"),
        Setting(name="codec", default="raw", choices=CODECS, help="how rows are encoded"),
        Setting(name="dtype", default="bfloat16", choices=tuple(DTYPES), help="number format of row values"),
        Setting(name="backend", default="mmap", choices=BACKENDS, help="how rows are stored"),
        Setting(
            name="ram",
            kind=parse_bytes,
            help="bytes of RAM for rows (default: what `scone serve` would take)",
        ),
        Setting(
            name="nvme",
            kind=Path,
            default=Path(),
            help="a folder on the disk that will hold the table; the probe writes up to 0.5 GB there",
        ),
        Setting(name="io_depth", kind=int, default=128, help="direct reads under way at a time"),
        Setting(name="prompt_tokens", kind=int, default=512, help="length of a prompt"),
        Setting(name="batch", kind=int, default=1, help="sequences that decode together"),
        Setting(
            name="matched_share",
            kind=float,
            default=0.7,
            help="positions where an f-gram ends, without a text",
        ),
        Setting(name="text", kind=Path, help="a text to read prompts off, with a model and an f-gram set"),
        Setting(name="json", kind=parse_bool, default=False, help="print one JSON object"),
    ),
    run=run,
)
