"""`scone bench`: measurements beside rivals, in one run; the last line is one JSON object."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from scone.cache.lookup_benchmark import benchmark_lookup
from scone.model_store.count_benchmark import benchmark as benchmark_count
from scone.model_store.count_benchmark import made_up_corpus
from scone.server.settings import Command, Resolved, Setting


def run(settings: Resolved) -> int:
    print(json.dumps({"lookup": _lookup, "count": _count}[settings.what](settings)))
    return 0


def _count(settings: Resolved) -> dict[str, Any]:
    corpus = made_up_corpus(settings.corpus_tokens)
    return benchmark_count(corpus, max_n=4, top=settings.rows, memory_bytes=None)


def _lookup(settings: Resolved) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=settings.work, prefix="scone-bench-") as folder:
        print(f"building a table in {folder}", file=sys.stderr)
        return benchmark_lookup(
            Path(folder),
            num_rows=settings.rows,
            dim=settings.dim,
            num_corpus_tokens=settings.corpus_tokens,
            num_tokens=settings.tokens,
            batch=settings.batch,
            repeats=settings.repeats,
        )


COMMAND = Command(
    name="bench",
    help="measure look-up or counting beside rivals; the last line is JSON",
    settings=(
        Setting(
            name="what", positional=True, required=True, choices=("lookup", "count"), help="what to measure"
        ),
        Setting(name="rows", kind=int, default=1_000_000, help="f-grams of the table, at most"),
        Setting(name="dim", kind=int, default=576, help="values in a row (bfloat16)"),
        Setting(name="corpus_tokens", kind=int, default=20_000_000, help="made-up tokens to count"),
        Setting(name="tokens", kind=int, default=2048, help="tokens of the prompt"),
        Setting(name="batch", kind=int, default=16, help="sequences of a decode step"),
        Setting(name="repeats", kind=int, default=30, help="measurements of each kind; medians count"),
        Setting(name="work", kind=Path, help="folder for the table (default: the system's temporary one)"),
    ),
    run=run,
)
