"""`scone bench`: measurements beside rivals, in one run; the last line is one JSON object."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scone.cache.lookup_benchmark import LookupBenchmark
from scone.cache.lookup_workload import hold_out
from scone.model_store.count_benchmark import benchmark as benchmark_count
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.token_corpus import TokenCorpus
from scone.server.settings import Command, Resolved, Setting, parse_bool


def run(settings: Resolved) -> int:
    print(json.dumps({"lookup": _lookup, "count": _count}[settings.what](settings)))
    return 0


def _count(settings: Resolved) -> dict[str, Any]:
    corpus = made_up_corpus(settings.corpus_tokens)
    return benchmark_count(corpus, max_n=4, top=settings.rows, memory_bytes=None)


def _lookup(settings: Resolved) -> dict[str, Any]:
    if settings.corpus is None:
        made_up = made_up_corpus(settings.corpus_tokens)
        corpus, heldout = hold_out(made_up, settings.tokens * settings.repeats)
    elif settings.heldout is None:
        corpus, heldout = hold_out(TokenCorpus.load(settings.corpus), settings.tokens * settings.repeats)
    else:
        corpus, heldout = TokenCorpus.load(settings.corpus), TokenCorpus.load(settings.heldout)
    with ExitStack() as stack:
        work = settings.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scone-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        print(f"table and rivals' files: {work}", file=sys.stderr)
        return LookupBenchmark(
            work=work,
            corpus=corpus,
            heldout=heldout,
            num_rows=settings.rows,
            min_count=settings.min_count,
            dim=settings.dim,
            num_tokens=settings.tokens,
            batch=settings.batch,
            with_lmdb=settings.lmdb,
            repeats=settings.repeats,
        ).run()


COMMAND = Command(
    name="bench",
    help="measure look-up or counting beside rivals; the last line is JSON",
    settings=(
        Setting(
            name="what", positional=True, required=True, choices=("lookup", "count"), help="what to measure"
        ),
        Setting(name="rows", kind=int, default=1_000_000, help="f-grams of the table, at most"),
        Setting(name="dim", kind=int, default=576, help="values in a row (bfloat16)"),
        Setting(name="corpus", kind=Path, help="tokenised text to count f-grams in (.npz; default: made up)"),
        Setting(name="heldout", kind=Path, help="other text to look up (default: the end of the corpus)"),
        Setting(name="corpus_tokens", kind=int, default=20_000_000, help="made-up tokens, without a corpus"),
        Setting(name="min_count", kind=int, default=5, help="f-grams rarer than this get no row"),
        Setting(name="tokens", kind=int, default=2048, help="tokens of the prompt"),
        Setting(name="batch", kind=int, default=16, help="sequences of a decode step"),
        Setting(
            name="lmdb", kind=parse_bool, default=True, help="measure the paper's LMDB too: a large file"
        ),
        Setting(name="repeats", kind=int, default=10, help="prompts to measure; medians count"),
        Setting(
            name="work",
            kind=Path,
            help="folder for the table, kept for other runs (default: a temporary one)",
        ),
    ),
    run=run,
)
