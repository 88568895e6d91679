"""Measures what recycled states bring a real model: time to first token, and whether answers stay the same.

Every engine is a fresh one on the same folder, as after a restart, so that nothing is in its memory; files
are dropped from the page cache where the disk is to be measured. An engine that has just started would wait
for the first use of its KV cache's memory, so each is asked when it has that.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scone.cache.disk_speed import direct_read_speed
from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.model_store.checkpoint import open_checkpoint
from scone.server.engine.block_form import FormName
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig, KvCacheDtype, RecycledBlocks
from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.paced_store import PacedStore
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

PREFIX_TOKENS = 1500
NUM_TOKENS = 8
"""Of each answer that is compared."""

PACED_SPEEDS = (150_000_000, 250_000_000, 500_000_000, 750_000_000, 1_000_000_000)
"""Bytes per second of slower disks."""

_CONFIG = RecycledConfig(disk_bytes=8 << 30)
_LENGTHS = (5, 30, 70, 150, 300, 700)

Answer = list[tuple[tuple[int, ...], list[float]]]


class _Computed(SilentObserver):
    """Counts tokens that go through the model."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def on_step(self, stats: StepStats) -> None:
        self.num_tokens += stats.num_prefill_tokens + stats.num_decode_tokens


class _Runs:
    """What was measured of one form.

    Attributes:
        state_bytes: of the prefix.
        work_seconds: of making keys and values of all its blocks once they were read, in each run.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.num_computed: dict[str, set[int]] = {}
        self.state_bytes = 0
        self.work_seconds: list[float] = []

    def note(self, name: str, seconds: float, num_computed: int) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.num_computed.setdefault(name, set()).add(num_computed)

    def result(self, disk_speed: float) -> dict[str, Any]:
        """As it is printed."""
        medians = {name: statistics.median(values) for name, values in self.seconds.items()}
        work_seconds = statistics.median(self.work_seconds)
        saved_seconds = medians["computed"] - work_seconds
        return {
            "prompt_tokens": PREFIX_TOKENS + 1,
            "state_bytes": self.state_bytes,
            "seconds_to_first_token": {name: round(value, 4) for name, value in medians.items()},
            "all_seconds": {name: [round(v, 4) for v in values] for name, values in self.seconds.items()},
            "tokens_computed": {name: sorted(numbers) for name, numbers in self.num_computed.items()},
            "times_faster_than_computing": {
                name: round(medians["computed"] / value, 1) for name, value in medians.items()
            },
            "seconds_making_keys_and_values": round(work_seconds, 4),
            "break_even_bytes_per_second": round(self.state_bytes / saved_seconds),
            "disk": {
                "bytes_per_second": round(disk_speed),
                "least_seconds": round(self.state_bytes / disk_speed, 4),
                "seconds_beside_a_memory_hit": round(medians["disk"] - medians["memory"], 4),
            },
        }


class RecycledBenchmark:
    """One model and a folder for its states."""

    def __init__(self, model: str, work: Path, kv_cache_dtype: KvCacheDtype = "auto") -> None:
        """Raises SconeError."""
        self._kv_cache_dtype = kv_cache_dtype
        self._checkpoint = open_checkpoint(model)
        self._tokenizer = self._checkpoint.tokenizer()
        self._work = work

    @cached_property
    def forms(self) -> tuple[FormName, ...]:
        """In which blocks of the model may be kept: hidden states only where they are smaller."""
        with self._engine(ram_bytes=0, form="kv") as (engine, _, _):
            assert engine.recycler is not None
            return tuple(form.name for form in engine.recycler.forms.readable)

    def choice(self) -> str:
        """The form that a server would keep them in, and why."""
        with self._engine(ram_bytes=0) as (engine, _, _):
            assert engine.recycler is not None
            return engine.recycler.forms.reason

    def first_token(self, repeats: int) -> dict[FormName, Any]:
        """Seconds to the first token of a prompt with a known prefix, by form and where it is; medians."""
        runs = {form: _Runs() for form in self.forms}
        for repeat in range(repeats):
            prompt = self._prompt(repeat, PREFIX_TOKENS + 1)
            for form, its_runs in runs.items():
                self._first_tokens(prompt, form, its_runs)
        result = {}
        for form, its_runs in runs.items():
            speeds = [self._disk_bytes_per_second(form) for _ in range(2 * repeats)]
            result[form] = its_runs.result(statistics.median(speeds))
        return result

    def _first_tokens(self, prompt: Sequence[int], form: FormName, runs: _Runs) -> None:
        """One prompt, computed, then with its prefix in each place."""
        with self._engine(ram_bytes=0, form=form) as (engine, store, computed):
            runs.note("computed", *_first_token(engine, computed, prompt))
            store.flush(60)
            runs.note("memory", *_first_token(engine, computed, prompt))
        for name in ("disk", "page_cache"):
            with self._engine(ram_bytes=0, form=form) as (engine, store, computed):
                if name == "disk":
                    self._drop_page_cache(form)
                stats, recycler = store.stats, engine.recycler
                assert recycler is not None
                bytes_before, hits_before = stats.bytes_read["blocks", "disk"], stats.hits["blocks", "disk"]
                runs.note(name, *_first_token(engine, computed, prompt))
                runs.state_bytes = stats.bytes_read["blocks", "disk"] - bytes_before
                num_blocks = stats.hits["blocks", "disk"] - hits_before
                runs.work_seconds.append(recycler.forms.kept[0].work_seconds * num_blocks)

    def paced(self, repeats: int) -> dict[FormName, dict[int, float]]:
        """Seconds to the first token of `first_token`'s prompts, by the bytes per second of a slower disk."""
        return {
            form: {speed: self._paced(form, speed, repeats) for speed in PACED_SPEEDS} for form in self.forms
        }

    def _paced(self, form: FormName, bytes_per_second: int, repeats: int) -> float:
        with self._engine(ram_bytes=0, form=form) as (engine, store, computed):
            store.bytes_per_second = bytes_per_second
            prompts = [self._prompt(repeat, PREFIX_TOKENS + 1) for repeat in range(repeats)]
            return round(statistics.median(_first_token(engine, computed, p)[0] for p in prompts), 4)

    def identity(
        self, num_prompts: int, backend: Literal["native", "torch"], form: FormName = "kv"
    ) -> dict[str, Any]:
        """Whether answers and log-probabilities are the same cold, in memory and restored, in other batches.

        The prompts of all lengths share beginnings; each is answered in one batch and chunking where its
        state is computed, and in another where it is restored.
        """
        prompts = [self._prompt(i // 3, _LENGTHS[i % len(_LENGTHS)], seed=i) for i in range(num_prompts)]
        wide, narrow = (512, 16), (96, 5)
        with self._engine(0, limits=narrow, backend=backend, recycles=False) as (engine, _, _):
            cold = _answers(engine, prompts)
        with self._engine(0, limits=wide, backend=backend, form=form) as (engine, store, computed):
            filled = _answers(engine, prompts)
            store.flush(60)
            num_cold = computed.num_tokens
            warm = _answers(engine, prompts)
        self._drop_page_cache(form)
        with self._engine(0, limits=narrow, backend=backend, form=form) as (engine, _, computed):
            restored = _answers(engine, prompts)
            num_restored = computed.num_tokens
        return {
            "prompts": num_prompts,
            "backend": backend,
            "form": form,
            "tokens_computed": {"first": num_cold, "restored": num_restored},
            **{
                name: _difference(cold, other)
                for name, other in (("first", filled), ("memory", warm), ("restarted", restored))
            },
        }

    @contextmanager
    def _engine(
        self,
        ram_bytes: int,
        *,
        limits: tuple[int, int] = (512, 32),
        backend: Literal["native", "torch"] = "native",
        recycles: bool = True,
        form: RecycledBlocks = "auto",
    ) -> Iterator[tuple[Engine, PacedStore, _Computed]]:
        """`limits`: tokens and sequences of a step."""
        computed = _Computed()
        config = EngineConfig(
            max_model_len=2048,
            backend=backend,
            deterministic=backend == "native",
            enable_prefix_caching=recycles,
            max_num_batched_tokens=limits[0],
            max_num_seqs=limits[1],
            recycled_blocks=form,
            kv_cache_dtype=self._kv_cache_dtype,
        )
        with PacedStore.open(self._folder(form), _CONFIG, MemoryBudget(ram_bytes)) as store:
            engine = Engine(
                config,
                self._checkpoint.decoder(),
                self._tokenizer,
                None,
                self._checkpoint.model_hash,
                observer=computed,
                recycled=store if recycles else None,
            )
            engine.start()
            try:
                _answers(engine, [self._prompt(9999, 40)])  # touches memory for the first time
                if engine.cache_pages is not None:
                    engine.cache_pages.start()
                    assert engine.cache_pages.wait(60)
                yield engine, store, computed
            finally:
                engine.shutdown(timeout_seconds=10)

    def _prompt(self, number: int, length: int, seed: int = 0) -> list[int]:
        """Made-up token ids: a third of a prompt is its number's, the rest its own."""
        shared = np.random.default_rng(number).integers(100, 40_000, length)
        own = np.random.default_rng((number, seed)).integers(100, 40_000, length)
        num_shared = length if not seed else length // 3
        return [*shared[:num_shared].tolist(), *own[num_shared:].tolist()]

    def _folder(self, form: RecycledBlocks) -> Path:
        """Each form has its own, or blocks in the other would be restored."""
        return self._work / f"recycled-{form}"

    def _drop_page_cache(self, form: FormName) -> None:
        for path in self._folder(form).iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def _disk_bytes_per_second(self, form: FormName) -> float:
        """Of reads past the page cache, of the store's own files: what the disk gives at most."""
        self._drop_page_cache(form)
        return direct_read_speed(sorted(self._folder(form).glob("shard-*.lmdb")))


class _Waiter:
    """Follows one request to its end."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.first_at = 0.0
        self._done = threading.Event()

    def __call__(self, delta: Delta) -> None:
        if not self.deltas:
            self.first_at = time.perf_counter()
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self._done.set()

    def wait(self) -> None:
        if not self._done.wait(600):
            raise TimeoutError("a request did not end within 600 s")
        assert self.deltas[-1].error is None, self.deltas[-1].error


def _first_token(engine: Engine, computed: _Computed, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds until it came, and tokens that were computed for it."""
    waiter, before = _Waiter(), computed.num_tokens
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    began = time.perf_counter()
    engine.submit(GenerationRequest(request_id="first", input_ids=tuple(prompt), sampling=sampling), waiter)
    waiter.wait()
    while engine.stats().has_work:  # the step's report comes after its deltas
        time.sleep(0.001)
    return waiter.first_at - began, computed.num_tokens - before


def _answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """Tokens and log-probabilities of all prompts, asked at once."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    waiters = [_Waiter() for _ in prompts]
    for i, (prompt, waiter) in enumerate(zip(prompts, waiters, strict=True)):
        request = GenerationRequest(request_id=str(i), input_ids=tuple(prompt), sampling=sampling)
        engine.submit(request, waiter)
    for waiter in waiters:
        waiter.wait()
    while engine.stats().has_work:
        time.sleep(0.001)
    return [
        [(d.token_ids, [p.logprob for p in d.logprobs or ()]) for d in waiter.deltas] for waiter in waiters
    ]


def _difference(cold: Sequence[Answer], other: Sequence[Answer]) -> dict[str, Any]:
    """How many answers differ in a bit, how many in a token, and the largest difference where none does."""
    num_other_tokens, largest = 0, 0.0
    for a, b in zip(cold, other, strict=True):
        if [tokens for tokens, _ in a] != [tokens for tokens, _ in b]:
            num_other_tokens += 1
            continue
        pairs = zip((p for _, ps in a for p in ps), (p for _, ps in b for p in ps), strict=True)
        largest = max(largest, *(abs(x - y) for x, y in pairs))
    return {
        "answers_that_differ": sum(a != b for a, b in zip(cold, other, strict=True)),
        "with_other_tokens": num_other_tokens,
        "largest_logprob_difference": largest,
    }
