"""`scone append`: a new generation of a table, with f-grams added."""

from __future__ import annotations

from pathlib import Path

from scone.model_store.change_table import SourceTable, append_fgrams
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.fgram_set import FGramSet
from scone.server.settings import Command, Resolved, Setting
from scone.server.table_perplexity import describe_table_change


def run(settings: Resolved) -> int:
    checkpoint = open_checkpoint(settings.model)
    num_new = append_fgrams(
        SourceTable(settings.table), FGramSet.load(settings.fgrams), checkpoint, settings.out
    )
    print(f"wrote {settings.out} with {num_new:,} new f-grams")
    if settings.heldout:
        print(
            describe_table_change(
                checkpoint, settings.table, settings.out, settings.heldout, settings.max_tokens
            )
        )
    return 0


COMMAND = Command(
    name="append",
    help="write a new generation of a table with f-grams added; rows it has already are copied",
    settings=(
        Setting(name="table", kind=Path, positional=True, required=True, help="folder of the table"),
        Setting(name="model", kind=Path, required=True, help="the checkpoint that the table was built with"),
        Setting(
            name="fgrams",
            kind=Path,
            required=True,
            help="f-grams to add, from `scone count`; counts of those the table has are added up",
        ),
        Setting(name="out", kind=Path, required=True, help="the table folder to write"),
        Setting(name="heldout", many=True, help="text to print the change of perplexity on"),
        Setting(name="max_tokens", kind=int, default=20_000, help="tokens of it at most"),
    ),
    run=run,
)
