"""Measures serving at a GPU's pace: the whole engine and a real table, around a model that only takes time.

What is asked: how much of a warm table's speed is left when the table is on a disk, and what host work a
table adds to a decode step. Keys and text are made up with the skew of real ones; rows are random. "Cold"
drops the rows from the page cache before each run; the share that is resident is taken before and after.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.cache import FGramTable, TableConfig
from scone.cache.lookup_workload import drop_from_page_cache, resident_share, row_file, write_table
from scone.model_store.count_benchmark import made_up_corpus
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tokenizer import Tokenizer, tokenizer_from_vocabulary
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.engine_core import EngineCore
from scone.server.engine.generation import RequestRun
from scone.server.engine.input_rows import read_ahead
from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.paced_model import PacedDevice, PacedModel
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

VOCAB_SIZE = 1024
"""Small, since sampling runs on this machine's CPU here, through its caches, and not on the accelerator."""

DECODE_SECONDS = 0.005
PREFILL_TOKENS_PER_SECOND = 10_000.0
NUM_SEQUENCES = 32
PROMPT_TOKENS = 2048
_SHORT_PROMPT = 64

TABLES: dict[str, TableConfig] = {
    "warm": TableConfig(ram_bytes=1 << 50),
    "cold_mmap": TableConfig(disk_reader="mmap"),
    "cold_direct": TableConfig(disk_reader="direct"),
}
"""All rows in memory; from the page cache, which is empty at first; each row from the disk each time."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A table on disk and text to serve."""

    table: Path
    tokens: NDArray[np.int64]
    tokenizer: Tokenizer
    dim: int

    def texts(self, num: int, length: int) -> list[NDArray[np.int64]]:
        """`num` stretches of the corpus."""
        starts = np.linspace(0, len(self.tokens) - length - 1, num).astype(int)
        return [self.tokens[start : start + length] for start in starts]


def make_workload(work: Path, *, num_rows: int, dim: int, num_corpus_tokens: int) -> Workload:
    """Counts made-up text and writes a table of random rows for it, unless an earlier run did."""
    made_up = made_up_corpus(num_corpus_tokens)
    corpus = TokenCorpus(made_up.tokens % VOCAB_SIZE, made_up.offsets)
    path, _ = write_table(work, corpus, num_rows=num_rows, min_count=5, dim=dim)
    return Workload(path, corpus.tokens.astype(np.int64), paced_tokenizer(), dim)


def benchmark_decode(workload: Workload, *, num_steps: int, repeats: int) -> dict[str, Any]:
    """32 sequences decode together; medians over `repeats` runs."""
    texts = workload.texts(NUM_SEQUENCES, _SHORT_PROMPT + num_steps + 1)
    prompts = [text[:_SHORT_PROMPT] for text in texts]
    result = _compare(workload, texts, prompts, max_tokens=num_steps, repeats=repeats)
    _hold_against_warm(result, NUM_SEQUENCES * num_steps)
    return {
        "num_sequences": NUM_SEQUENCES,
        "num_steps": num_steps,
        "decode_step_ms": 1e3 * DECODE_SECONDS,
        "at_gpu_pace": result,
        "table_adds_us_per_step": _step_cost(workload, num_steps),
    }


def benchmark_prefill(workload: Workload, *, num_prompts: int, repeats: int) -> dict[str, Any]:
    """Prompts of 2,048 tokens, all at once; medians over `repeats` runs."""
    texts = workload.texts(num_prompts, PROMPT_TOKENS + 1)
    prompts = [text[:PROMPT_TOKENS] for text in texts]
    result = _compare(workload, texts, prompts, max_tokens=1, repeats=repeats)
    _hold_against_warm(result, num_prompts * PROMPT_TOKENS)
    return {
        "num_prompts": num_prompts,
        "prompt_tokens": PROMPT_TOKENS,
        "model_tokens_per_second": PREFILL_TOKENS_PER_SECOND,
        "at_gpu_pace": result,
    }


def _hold_against_warm(result: dict[str, dict[str, Any]], num_tokens: int) -> None:
    """Turns each run's seconds for `num_tokens` into speeds, and into shares of the warm table's."""
    for run in result.values():
        run["tokens_per_second"] = round(num_tokens / run.pop("seconds"))
        run["of_warm"] = round(run["tokens_per_second"] / result["warm"]["tokens_per_second"], 3)
        run["p99_step_of_warm"] = round(run["p99_step_ms"] / result["warm"]["p99_step_ms"], 3)


def _compare(
    workload: Workload,
    texts: Sequence[NDArray[np.int64]],
    prompts: Sequence[NDArray[np.int64]],
    *,
    max_tokens: int,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """The same requests with each kind of table, in turn."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TABLES}
    for _ in range(repeats):
        for name, config in TABLES.items():
            runs[name].append(_serve(workload, config, texts, prompts, max_tokens))
    return {
        name: {key: round(statistics.median(run[key] for run in several), 4) for key in several[0]}
        for name, several in runs.items()
    }


def _serve(
    workload: Workload,
    config: TableConfig,
    texts: Sequence[NDArray[np.int64]],
    prompts: Sequence[NDArray[np.int64]],
    max_tokens: int,
) -> dict[str, float]:
    gc.collect()  # the run before may still map the file: mapped pages stay in the page cache
    drop_from_page_cache(row_file(workload.table))
    resident_before = resident_share(row_file(workload.table))
    table = FGramTable.open(workload.table, config)
    table.wait_loaded()
    watch = _Stopwatch(len(prompts), only_decode=max_tokens > 1)
    device = PacedDevice()
    model = _paced_model(device, workload, texts, DECODE_SECONDS, PREFILL_TOKENS_PER_SECOND)
    engine = Engine(
        _engine_config(len(texts[0])),
        model,
        workload.tokenizer,
        table,
        "paced",
        observer=watch,
        device=device,
    )
    engine.start()
    began = time.perf_counter()
    requests = [_request(i, prompt, max_tokens) for i, prompt in enumerate(prompts)]
    engine.submit_batch([(request, watch.on_delta) for request in requests])
    watch.wait()
    seconds = time.perf_counter() - began
    engine.shutdown(timeout_seconds=10)
    stats = table.stats
    table.close()
    return {
        "seconds": seconds,
        "p99_step_ms": 1e3 * float(np.percentile(watch.steps, 99)),
        "p99_inter_token_ms": 1e3 * float(np.percentile(watch.gaps or [0.0], 99)),
        "rows_read": stats.rows_read.total(),
        "rows_read_ahead": stats.rows_requested,
        "resident_before": resident_before,
        "resident_after": resident_share(row_file(workload.table)),
    }


def _step_cost(workload: Workload, num_steps: int) -> dict[str, float]:
    """Host work of a decode step of 32 sequences with a table in memory, less that without a table."""
    texts = workload.texts(NUM_SEQUENCES, _SHORT_PROMPT + num_steps + 1)
    with FGramTable.open(workload.table, TABLES["warm"]) as table:
        table.wait_loaded()
        rows = read_ahead(table, PacedDevice())
        cores = [_core(workload, texts), _core(workload, texts)]
        for core, input_rows in zip(cores, (rows, None), strict=True):
            for i, text in enumerate(texts):
                request = _request(i, text[:_SHORT_PROMPT], num_steps)
                core.add(RequestRun(request, lambda _: None, i, time.monotonic(), input_rows))
        seconds: list[list[float]] = []
        while all(core.has_work for core in cores):
            seconds.append([_timed(core.step) for core in cores])
        rows.close()
    decode = np.array(seconds[len(seconds) // 10 : -5])  # without the prompts and the ends
    with_table, without = np.median(decode, axis=0)
    return {
        "with": round(1e6 * float(with_table), 1),
        "without": round(1e6 * float(without), 1),
        "added": round(1e6 * float(np.median(decode[:, 0] - decode[:, 1])), 1),
    }


def _core(workload: Workload, texts: Sequence[NDArray[np.int64]]) -> EngineCore:
    device = PacedDevice()
    model = _paced_model(device, workload, texts, 0.0, 1e12)
    return EngineCore(
        _engine_config(len(texts[0])), model, workload.tokenizer, "paced", SilentObserver(), device
    )


def _paced_model(
    device: PacedDevice,
    workload: Workload,
    texts: Sequence[NDArray[np.int64]],
    decode_seconds: float,
    prefill_tokens_per_second: float,
) -> PacedModel:
    config = _engine_config(len(texts[0]))
    return PacedModel(
        device,
        texts,
        config,
        dim=workload.dim,
        vocab_size=VOCAB_SIZE,
        num_blocks=(len(texts) + 1) * -(-len(texts[0]) // config.block_size),
        decode_seconds=decode_seconds,
        prefill_tokens_per_second=prefill_tokens_per_second,
    )


def _engine_config(max_model_len: int) -> EngineConfig:
    return EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=NUM_SEQUENCES,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,  # what was computed before would not be computed again
    )


def _request(number: int, prompt: NDArray[np.int64], max_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=str(number),
        input_ids=tuple(prompt.tolist()),
        sampling=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens),
    )


@dataclass
class _Stopwatch(SilentObserver):
    """Notes how long steps took and tokens were apart; `wait`s for the last token.

    Of a run that decodes, only steps without prompt tokens count.
    """

    num_open: int
    only_decode: bool
    steps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def on_step(self, stats: StepStats) -> None:
        if not (self.only_decode and stats.num_prefill_tokens):
            self.steps.append(stats.seconds)

    def on_tokens(self, seconds: float, num_tokens: int) -> None:
        self.gaps += [seconds] * num_tokens

    def on_delta(self, delta: Delta) -> None:
        if delta.finish_reason is not None:
            assert delta.error is None, delta.error
            self.num_open -= 1
            if not self.num_open:
                self.is_over.set()

    def wait(self) -> None:
        assert self.is_over.wait(600), "the requests did not end"


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def paced_tokenizer() -> Tokenizer:
    """Of ids below `VOCAB_SIZE`, each with a text of its own."""
    pieces = [f"<{i}>" for i in range(VOCAB_SIZE)]
    return tokenizer_from_vocabulary(
        pieces=pieces,
        piece_types=[1] * VOCAB_SIZE,
        merges=[],
        pre_tokenizer="gpt-2",
        bos_id=None,
        add_bos=False,
        eos_ids=(0,),
        chat_template=None,
    )
