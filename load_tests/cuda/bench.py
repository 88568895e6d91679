"""The engine itself, in process: steps that decode, and first tokens of long prompts, by engine and table."""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from load_tests.cuda.smollm2_shape import load_model
from load_tests.cuda.texts import TextFollower, Texts
from scone.cache import FGramTable, TableConfig
from scone.cache.device import Device
from scone.cache.lookup_workload import drop_from_page_cache, resident_share, row_file, write_table
from scone.model_store.count_benchmark import made_up_corpus
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.engine.row_overlay import staging_device
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

TABLES: dict[str, TableConfig | None] = {
    "none": None,
    "device": TableConfig(device_bytes=1 << 50),
    "ram": TableConfig(ram_bytes=1 << 50),
    "disk_warm": TableConfig(ram_bytes=0, disk_reader="mmap"),
    "disk_cold": TableConfig(ram_bytes=0, disk_reader="mmap"),
    "disk_cold_direct": TableConfig(ram_bytes=0, disk_reader="direct"),
}
SHORT_PROMPT, LONG_PROMPT = 64, 2000
MAX_MODEL_LEN = 2304
_numbers = itertools.count()


class StepTimes(SilentObserver):
    """Seconds of the steps that only decoded so many sequences."""

    def __init__(self) -> None:
        self.num_seqs = 0
        self.seconds: list[float] = []

    def on_step(self, stats: StepStats) -> None:
        if stats.num_decode_tokens == self.num_seqs and not stats.num_prefill_tokens:
            self.seconds.append(stats.seconds)


class Bench:
    """One model, one engine with graphs and one without, a table, and text."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.device = torch.device(args.device)
        self._work, self._args = work, args
        self.decoder, self.tokenizer, self.weights = load_model(args.model, self.device, args.layers)
        corpus = made_up_corpus(args.corpus_tokens)
        self.texts = Texts(corpus.tokens.astype(np.int64), MAX_MODEL_LEN)
        self.engines: dict[str, Engine] = {}
        self.runners: dict[str, ModelRunner] = {}
        self.times = StepTimes()
        self._corpus = corpus
        self._table_path: Path | None = None
        self._held: FGramTable | None = None

    @property
    def table_path(self) -> Path:
        """The table, written when it is first asked for."""
        if self._table_path is None:
            path, _ = write_table(
                self._work, self._corpus, num_rows=self._args.rows, min_count=5, dim=self.decoder.config.dim
            )
            self._table_path = path
        return self._table_path

    def engine(self, name: str) -> Engine:
        """`graphs`, `eager` or `torch`; started when first asked for."""
        if name not in self.engines:
            config = EngineConfig(
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=max(self._args.seqs),
                max_num_batched_tokens=max(2048, *self._args.seqs),
                kv_cache_bytes=self._args.kv_cache_bytes,
                enable_prefix_caching=False,
                enforce_eager=name == "eager",
                backend="torch" if name == "torch" else "auto",
            )
            device = staging_device(self.device)
            runner = self._runner(config, device)
            self.runners[name] = runner
            self.engines[name] = engine = Engine(
                config, runner, self.tokenizer, None, "6d" * 32, observer=self.times, device=device
            )
            engine.start()
        return self.engines[name]

    def start(self, name: str) -> str:
        """Starts an engine; says what computes there."""
        self.engine(name)
        return self.runners[name].backend

    def _runner(self, config: EngineConfig, device: Device) -> ModelRunner:
        if self.device.type == "cuda" and config.backend == "auto":
            from scone.server.engine.cuda_runner import CudaRunner

            class Runner(TextFollower, CudaRunner):
                texts = self.texts

            return Runner(self.decoder, config, device)

        class PlainRunner(TextFollower):
            texts = self.texts

        return PlainRunner(self.decoder, config)

    def use(self, engine: Engine, table: str) -> FGramTable | None:
        """Gives the engine this kind of table, newly opened: the page cache keeps what is mapped."""
        self._swap(engine, None)
        config = TABLES[table]
        if config is None:
            return None
        if table.startswith("disk_cold"):
            drop_from_page_cache(row_file(self.table_path))
        elif table == "disk_warm":
            row_file(self.table_path).read_bytes()
        opened = FGramTable.open(self.table_path, config)
        opened.wait_loaded()
        self._swap(engine, opened)
        return opened

    def _swap(self, engine: Engine, table: FGramTable | None) -> None:
        retired = threading.Event()
        engine.swap_table(table, retired.set)
        if not retired.wait(60):
            raise TimeoutError("the former table is still in use after 60 s")
        if self._held is not None:
            self._held.close()
        self._held = table

    def resident(self) -> float:
        """The share of the rows that is in the page cache."""
        return round(resident_share(row_file(self.table_path)), 3)

    def generate(
        self, engine: Engine, num_seqs: int, prompt_tokens: int, num_tokens: int
    ) -> dict[str, float]:
        """Equal requests, submitted at once: seconds until all have their first token, and from then on."""
        self.times.num_seqs, self.times.seconds = num_seqs, []
        firsts: dict[str, float] = {}
        ends: list[tuple[float, str | None]] = []
        is_over = threading.Event()

        def on_delta(name: str, delta: Delta) -> None:
            firsts.setdefault(name, time.perf_counter())
            if delta.finish_reason is not None:
                ends.append((time.perf_counter(), delta.error))
                if len(ends) == num_seqs:
                    is_over.set()

        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
        requests = []
        for _ in range(num_seqs):
            name = str(next(_numbers))
            request = GenerationRequest(
                request_id=name, input_ids=self.texts.prompt(prompt_tokens), sampling=sampling
            )
            requests.append((request, partial(on_delta, name)))
        began = time.perf_counter()
        engine.submit_batch(requests)
        if not is_over.wait(60):
            raise TimeoutError("the requests did not end within 60 s")
        errors = [error for _, error in ends if error]
        if errors:
            raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
        first = max(firsts.values())
        return {"first_token": first - began, "decode": max(t for t, _ in ends) - first}

    def decode(self, kind: str, table: str, num_seqs: int) -> dict[str, Any]:
        """Steps of `num_seqs` sequences that decode, for a number of tokens each."""
        engine, num_tokens = self.engine(kind), self._args.tokens
        opened = self.use(engine, table)
        if not table.startswith("disk_cold"):
            self.generate(engine, num_seqs, SHORT_PROMPT, 4)
        resident = None if opened is None else self.resident()
        looked_up = None if opened is None else opened.stats.lookups.copy()
        run = self.generate(engine, num_seqs, SHORT_PROMPT, num_tokens)
        result: dict[str, Any] = {
            "step_ms": round(1e3 * median(self.times.seconds), 4),
            "p99_step_ms": round(1e3 * float(np.percentile(self.times.seconds, 99)), 4),
            "period_ms": round(1e3 * run["decode"] / (num_tokens - 1), 4),
            "tokens_per_second": round(num_seqs * (num_tokens - 1) / run["decode"]),
        }
        if resident is not None:
            result["resident"] = resident
        if opened is not None and looked_up is not None:
            met = {n: int(v - looked_up.get(n, 0)) for n, v in opened.stats.lookups.items()}
            result["matched"] = round(1 - met.get(1, 0) / max(1, sum(met.values())), 3)
        return result

    def first_token(self, kind: str, table: str, repeats: int) -> dict[str, Any]:
        """Milliseconds to the first token of a long prompt that is alone."""
        engine, is_cold = self.engine(kind), table.startswith("disk_cold")
        opened = self.use(engine, table)
        if not is_cold:
            self.generate(engine, 1, LONG_PROMPT, 1)
        resident, seconds = 0.0, []
        for _ in range(repeats):
            if is_cold:
                self.use(engine, table)
            resident = 0.0 if opened is None else self.resident()
            seconds.append(self.generate(engine, 1, LONG_PROMPT, 1)["first_token"])
        ms = {"ms": round(1e3 * median(seconds), 3), "least_ms": round(1e3 * min(seconds), 3)}
        return ms if opened is None else ms | {"resident": resident}

    def graph_times(self) -> dict[str, float]:
        """Milliseconds of a replay alone, on the device; contexts are empty."""
        self.engine("graphs")
        runner: Any = self.runners["graphs"]
        result = {}
        with torch.inference_mode():
            for shape in reversed(runner._shapes.all()):
                runner._prepare_padding(shape)
                events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]  # type: ignore[no-untyped-call]
                for event in events:
                    event.record()
                    runner._graphs.replay(shape)
                torch.cuda.synchronize()
                times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
                name = f"{'decode' if shape.decodes else 'mixed'} {shape.num_tokens}"
                result[name] = round(median(times), 4)
        return result

    def close(self) -> None:
        for engine in self.engines.values():
            engine.shutdown(timeout_seconds=5)
        if self._held is not None:
            self._held.close()
