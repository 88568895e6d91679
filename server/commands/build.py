"""`scone build`: f-gram model x f-gram set -> table."""

from __future__ import annotations

from pathlib import Path

from scone.model_store.build_table import build_table
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.fgram_set import FGramSet
from scone.server.settings import Command, Resolved, Setting


def run(settings: Resolved) -> int:
    report = build_table(
        open_checkpoint(settings.model),
        FGramSet.load(settings.fgrams),
        settings.out,
        backend=settings.backend,
        codec=settings.codec,
        dtype=settings.dtype,
    )
    resumed = report.num_fgrams - report.num_embedded
    print(
        f"embedded {report.num_embedded:,} f-grams in {report.seconds:.1f} s"
        + (f" ({resumed:,} were there already)" if resumed else "")
        + f"\nwrote {settings.out} ({report.table_bytes / 1e6:,.1f} MB)"
    )
    return 0


COMMAND = Command(
    name="build",
    help="embed an f-gram set into a table; goes on where an interrupted build stopped",
    settings=(
        Setting(name="model", kind=Path, help="checkpoint folder with an f-gram model", required=True),
        Setting(name="fgrams", kind=Path, help="f-gram set written by `scone count`", required=True),
        Setting(name="out", kind=Path, help="the table folder to write", required=True),
        Setting(name="backend", default="mmap", choices=("mmap", "lmdb"), help="how rows are stored"),
        Setting(
            name="codec", default="raw", choices=("raw", "int8", "int4", "fp8"), help="how rows are encoded"
        ),
        Setting(
            name="dtype",
            default="bfloat16",
            choices=("float32", "bfloat16", "float16"),
            help="number format of row values",
        ),
    ),
    run=run,
)
