"""Measures what a table costs a real model on this machine: decode speed and time to first token, with the
table and without, in turn, in one run.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scone.cache import FGramTable, TableConfig
from scone.model_store.checkpoint import open_checkpoint
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.errors import SettingError
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

_LONG_PROMPT = 2000
_SHORT_PROMPT = 32
_DECODE_TOKENS = 32
_BATCHES = (1, 32)
_request_ids = itertools.count()


class ModelBenchmark:
    """Two engines of one model, with the table (in memory) and without, and text to prompt them with."""

    def __init__(self, model: str, table: str, text: Path) -> None:
        """Raises SconeError where these do not fit together."""
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
        self._tokens = tokenizer.encode(text.read_text(encoding="utf-8", errors="replace"))
        if len(self._tokens) < 2 * _LONG_PROMPT:
            raise SettingError(
                f"text {text} has {len(self._tokens)} tokens, wanted at least {2 * _LONG_PROMPT}"
            )
        self._table = FGramTable.open(table, TableConfig(ram_bytes=1 << 50))
        self._table.check_model(checkpoint.model_hash, tokenizer.hash)
        self._table.wait_loaded()
        config = EngineConfig(max_model_len=_LONG_PROMPT + 64, enable_prefix_caching=False)
        self._engines = {
            name: Engine(config, checkpoint.decoder(), tokenizer, used, checkpoint.model_hash)
            for name, used in (("with_table", self._table), ("without_table", None))
        }

    def __enter__(self) -> ModelBenchmark:
        with ExitStack() as undo:
            undo.callback(self.close)
            for engine in self._engines.values():
                engine.start()
                generate(engine, [self._prompt(0, _SHORT_PROMPT)], 2)  # touches memory for the first time
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.shutdown(timeout_seconds=10)
        self._table.close()

    def decode(self, repeats: int) -> dict[str, Any]:
        """Tokens per second while 1 or 32 sequences decode; medians."""
        result: dict[str, Any] = {}
        for num in _BATCHES:
            speeds: dict[str, list[float]] = {name: [] for name in self._engines}
            for repeat in range(repeats):
                prompts = [self._prompt(repeat * num + i, _SHORT_PROMPT) for i in range(num)]
                for name, engine in self._in_turn(repeat):
                    run = generate(engine, prompts, _DECODE_TOKENS)
                    speeds[name].append(num * (_DECODE_TOKENS - 1) / (run.ended - run.all_began))
            result[f"{num}_sequences"] = _beside("tokens_per_second", speeds)
        return result

    def prefill(self, repeats: int) -> dict[str, Any]:
        """Seconds to the first token of a prompt of 2,000 tokens; medians."""
        seconds: dict[str, list[float]] = {name: [] for name in self._engines}
        for repeat in range(repeats):
            prompt = self._prompt(repeat, _LONG_PROMPT)
            for name, engine in self._in_turn(repeat):
                began = time.perf_counter()
                seconds[name].append(generate(engine, [prompt], 1).all_began - began)
        return {"prompt_tokens": _LONG_PROMPT, **_beside("seconds_to_first_token", seconds)}

    def _in_turn(self, repeat: int) -> list[tuple[str, Engine]]:
        """Who is first changes: a second run finds other caches than the first."""
        return list(self._engines.items())[:: -1 if repeat % 2 else 1]

    def _prompt(self, number: int, length: int) -> list[int]:
        start = number * 997 % (len(self._tokens) - length)
        return self._tokens[start : start + length]


@dataclass
class _Run:
    """Follows some sequences to their ends."""

    num_sequences: int
    began: set[str] = field(default_factory=set)
    num_ended: int = 0
    all_began: float = 0.0
    ended: float = 0.0
    is_over: threading.Event = field(default_factory=threading.Event)

    def on_delta(self, request_id: str, delta: Delta) -> None:
        assert delta.error is None, delta.error
        if request_id not in self.began:
            self.began.add(request_id)
            self.all_began = time.perf_counter()
        if delta.finish_reason is not None:
            self.num_ended += 1
            self.ended = time.perf_counter()
            if self.num_ended == self.num_sequences:
                self.is_over.set()


def generate(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> _Run:
    run = _Run(len(prompts))
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
    requests = [
        GenerationRequest(request_id=str(next(_request_ids)), input_ids=tuple(prompt), sampling=sampling)
        for prompt in prompts
    ]
    engine.submit_batch(
        [(r, lambda delta, name=r.request_id: run.on_delta(name, delta)) for r in requests]  # type: ignore[misc]
    )
    if not run.is_over.wait(600):
        raise TimeoutError("the requests did not end within 600 s")
    return run


def _beside(unit: str, measured: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median ratio of neighbours in time."""
    pairs = zip(measured["with_table"], measured["without_table"], strict=True)
    return {
        unit: {name: round(statistics.median(values), 4) for name, values in measured.items()},
        "with_over_without": round(statistics.median(a / b for a, b in pairs), 4),
    }
