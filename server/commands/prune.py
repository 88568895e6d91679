"""`scone prune`: a new generation of a table, with f-grams dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scone.cache import FGramTable
from scone.model_store.change_table import SourceTable, keep_fgrams
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.corpus import read_documents
from scone.model_store.fgram_selection import keep_most_used
from scone.server.errors import SettingError
from scone.server.settings import Command, Resolved, Setting, parse_bytes
from scone.server.table_perplexity import describe_table_change


def run(settings: Resolved) -> int:
    table = SourceTable(settings.table)
    num_kept = _num_kept(settings, table)
    if (settings.uses or settings.heldout) and settings.model is None:
        raise SettingError("model is missing: --uses and --heldout need the one that the table belongs to")
    if settings.uses:
        kept = keep_most_used(table.fgrams, _count_uses(settings), num_kept)
    else:
        kept = table.fgrams.head(num_kept)
    keep_fgrams(table, kept, settings.out)
    print(f"wrote {settings.out} with {len(kept):,} of {len(table.fgrams):,} f-grams")
    if settings.heldout:
        checkpoint = open_checkpoint(settings.model)
        print(
            describe_table_change(
                checkpoint, settings.table, settings.out, settings.heldout, settings.max_tokens
            )
        )
    return 0


def _num_kept(settings: Resolved, table: SourceTable) -> int:
    limits = []
    if settings.min_count is not None:
        limits.append(int((table.fgrams.counts >= settings.min_count).sum()))
    if settings.top is not None:
        limits.append(settings.top)
    if settings.max_row_bytes is not None:
        limits.append(settings.max_row_bytes // table.manifest.row_bytes)
    if not limits:
        raise SettingError("nothing says what to drop: give --top, --min-count or --max-row-bytes")
    num_kept = min(*limits, len(table.fgrams))
    if num_kept < 1:
        raise SettingError(
            "no f-gram would be left: give a larger --top or --max-row-bytes, or a smaller --min-count"
        )
    return num_kept


def _count_uses(settings: Resolved) -> NDArray[np.int64]:
    """How often each f-gram is the longest match in the sample of text."""
    tokenizer = open_checkpoint(settings.model).tokenizer()
    with FGramTable.open(settings.table) as table:
        num_uses = np.zeros(table.num_fgrams, np.int64)
        for text in read_documents(settings.uses):
            row_ids, _ = table.match(tokenizer.encode(text))
            np.add.at(num_uses, row_ids[row_ids >= 0], 1)
    return num_uses


COMMAND = Command(
    name="prune",
    help="write a new generation of a table with f-grams dropped: the rarest, or the least used in a sample",
    settings=(
        Setting(name="table", kind=Path, positional=True, required=True, help="folder of the table"),
        Setting(name="out", kind=Path, required=True, help="the table folder to write"),
        Setting(name="top", kind=int, help="f-grams to keep at most"),
        Setting(name="min_count", kind=int, help="drop f-grams rarer than this in the corpus"),
        Setting(name="max_row_bytes", kind=parse_bytes, help="bytes of rows to keep at most, such as 20G"),
        Setting(
            name="uses",
            many=True,
            help="a sample of what is served: those it uses most are kept (default: the most frequent ones)",
        ),
        Setting(name="model", kind=Path, help="the table's model, for --uses and --heldout"),
        Setting(name="heldout", many=True, help="text to print the change of perplexity on"),
        Setting(name="max_tokens", kind=int, default=20_000, help="tokens of it at most"),
    ),
    run=run,
)
