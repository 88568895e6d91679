"""`scone bench`: measurements beside rivals, in one run; the last line is one JSON object."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from scone.cache.continuation_benchmark import benchmark_continuations
from scone.cache.lookup_benchmark import LookupBenchmark
from scone.cache.lookup_workload import hold_out, write_table
from scone.model_store.checkpoint import open_checkpoint
from scone.model_store.codec_benchmark import benchmark_codecs
from scone.model_store.corpus import read_documents
from scone.model_store.count_benchmark import benchmark as benchmark_count
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize
from scone.server.commands.plan import cut_prompts
from scone.server.errors import SettingError
from scone.server.model_benchmark import ModelBenchmark
from scone.server.paced_benchmark import Workload, benchmark_decode, benchmark_prefill, make_workload
from scone.server.plan_benchmark import benchmark_plan
from scone.server.recycled_benchmark import RecycledBenchmark
from scone.server.serve_settings import KV_CACHE_DTYPE
from scone.server.settings import Command, Resolved, Setting, parse_bool, parse_bytes


def run(settings: Resolved) -> int:
    measure = {
        "lookup": _lookup,
        "continuations": _continuations,
        "count": _count,
        "codec": _codec,
        "plan": _plan,
        "prefill": _prefill,
        "decode": _decode,
        "recycled": _recycled,
    }
    print(json.dumps(measure[settings.what](settings)))
    return 0


def _count(settings: Resolved) -> dict[str, Any]:
    corpus = made_up_corpus(settings.corpus_tokens)
    return benchmark_count(corpus, max_n=4, top=settings.rows, memory_bytes=None)


def _codec(settings: Resolved) -> dict[str, Any]:
    if None in (settings.model, settings.table, settings.text):
        raise SettingError("model, table or text is missing: codecs are measured on a real table's rows")
    checkpoint = open_checkpoint(settings.model)
    tokenizer = checkpoint.tokenizer()
    corpus = tokenize(read_documents([str(settings.text)]), tokenizer)
    stream = TokenStream.from_corpus(corpus, tokenizer)
    return benchmark_codecs(Path(settings.table), checkpoint, stream, settings.max_tokens)


def _plan(settings: Resolved) -> dict[str, Any]:
    if None in (settings.model, settings.table, settings.text, settings.ram):
        raise SettingError("model, table, text or ram is missing: a plan is held against a real table")
    checkpoint = open_checkpoint(settings.model)
    text = settings.text.read_text(encoding="utf-8", errors="replace")
    prompts = cut_prompts(np.asarray(checkpoint.tokenizer().encode(text)), settings.tokens)
    return _machine("plan") | benchmark_plan(
        checkpoint,
        Path(settings.table),
        prompts,
        ram_bytes=settings.ram,
        batch=settings.batch,
        repeats=settings.repeats,
    )


def _texts(settings: Resolved) -> tuple[TokenCorpus, TokenCorpus]:
    """The corpus, and text that was held out of it."""
    if settings.corpus is None:
        return hold_out(made_up_corpus(settings.corpus_tokens), settings.tokens * settings.repeats)
    if settings.heldout is None:
        return hold_out(TokenCorpus.load(settings.corpus), settings.tokens * settings.repeats)
    return TokenCorpus.load(settings.corpus), TokenCorpus.load(settings.heldout)


def _continuations(settings: Resolved) -> dict[str, Any]:
    corpus, heldout = _texts(settings)
    with _work_folder(settings) as work:
        table, _ = write_table(
            work, corpus, num_rows=settings.rows, min_count=settings.min_count, dim=settings.dim
        )
        found = benchmark_continuations(table, heldout, num_tokens=settings.tokens * settings.repeats)
    return _described("continuations", settings) | found


def _lookup(settings: Resolved) -> dict[str, Any]:
    corpus, heldout = _texts(settings)
    with _work_folder(settings) as work:
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


def _prefill(settings: Resolved) -> dict[str, Any]:
    result = _described("prefill", settings)
    with _workload(settings) as workload:
        result["simulated"] = benchmark_prefill(workload, num_prompts=8, repeats=settings.repeats)
    if settings.model is not None:
        with ModelBenchmark(settings.model, settings.table, settings.text) as benchmark:
            result["model"] = benchmark.prefill(settings.repeats)
    return result


def _decode(settings: Resolved) -> dict[str, Any]:
    result = _described("decode", settings)
    with _workload(settings) as workload:
        result["simulated"] = benchmark_decode(workload, num_steps=settings.steps, repeats=settings.repeats)
    if settings.model is not None:
        with ModelBenchmark(settings.model, settings.table, settings.text) as benchmark:
            result["model"] = benchmark.decode(settings.repeats)
    return result


def _recycled(settings: Resolved) -> dict[str, Any]:
    if settings.model is None:
        raise SettingError("model is not given: wanted the model whose states are recycled")
    result: dict[str, Any] = _machine("recycled") | {"repeats": settings.repeats}
    with _work_folder(settings) as work:
        benchmark = RecycledBenchmark(settings.model, work, settings.kv_cache_dtype)
        result["first_token"] = benchmark.first_token(settings.repeats)
        result["seconds_to_first_token_from_slower_disks"] = benchmark.paced(settings.repeats)
        result["choice"] = benchmark.choice()
        result["identity"] = [
            *(benchmark.identity(settings.prompts, "native", form) for form in benchmark.forms),
            benchmark.identity(max(2, settings.prompts // 10), "torch"),
        ]
    return result


@contextmanager
def _workload(settings: Resolved) -> Iterator[Workload]:
    with _work_folder(settings) as work:
        yield make_workload(
            work,
            num_rows=settings.rows,
            dim=settings.dim,
            num_corpus_tokens=settings.corpus_tokens,
        )


def _described(name: str, settings: Resolved) -> dict[str, Any]:
    if settings.model is not None and (settings.table is None or settings.text is None):
        raise SettingError("model is given without table or text: wanted all three, or none of them")
    return _machine(name) | {"rows": settings.rows, "dim": settings.dim, "repeats": settings.repeats}


def _machine(benchmark: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(("scone", *sys.argv[1:])),
    }


@contextmanager
def _work_folder(settings: Resolved) -> Iterator[Path]:
    with ExitStack() as stack:
        work = settings.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scone-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        print(f"table and other files: {work}", file=sys.stderr)
        yield work


COMMAND = Command(
    name="bench",
    help="measure look-up, counting, codecs, predictions, prefill or decode; the last line is JSON",
    settings=(
        Setting(
            name="what",
            positional=True,
            required=True,
            choices=("lookup", "continuations", "count", "codec", "plan", "prefill", "decode", "recycled"),
            help="what to measure; prefill and decode: the whole engine at a GPU's pace, table warm and cold",
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
        Setting(
            name="ram",
            kind=parse_bytes,
            help="plan: bytes of rows in memory; the others are read from the disk",
        ),
        Setting(name="steps", kind=int, default=200, help="decode steps of a simulated run"),
        Setting(
            name="model",
            help="prefill, decode: a model to measure too, with its table and without; codec: the table's;"
            " recycled: the model",
        ),
        Setting(name="table", help="the table of that model; codec: a raw one"),
        Setting(name="text", kind=Path, help="a text file to prompt that model with; codec: a corpus file"),
        Setting(
            name="max_tokens", kind=int, default=6144, help="codec: tokens of it to compare predictions on"
        ),
        Setting(
            name="prompts",
            kind=int,
            default=200,
            help="recycled: prompts whose answers are compared cold and restored",
        ),
        KV_CACHE_DTYPE,
        Setting(name="repeats", kind=int, default=10, help="prompts or runs to measure; medians count"),
        Setting(
            name="work",
            kind=Path,
            help="folder for the table, kept for other runs (default: a temporary one)",
        ),
    ),
    run=run,
)
