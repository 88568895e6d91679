"""How fast a model runs on this machine with a table: the whole engine, one prompt, then steps of a batch."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from scone.cache import FGramTable
from scone.model_store.checkpoint import Checkpoint
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

SHORT_PROMPT = 32
"""Tokens of the prompts that decoding starts from."""

_STEP_TOKENS = 512  # as the engine's default
_DECODE_TOKENS = 24
_REPEATS = 3
_request_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """Seconds to the first token of one prompt, and for one step of decoding `batch` sequences."""

    first_token: float
    step: float


def measure_model_speed(
    checkpoint: Checkpoint, table: FGramTable, prompts: Sequence[Sequence[int]], batch: int
) -> ModelSpeed:
    """Medians over `prompts`, all of one length; decoding starts from the beginnings of them.

    Raises:
        SconeError: the engine cannot run this model here.
    """
    config = EngineConfig(
        max_model_len=len(prompts[0]) + _DECODE_TOKENS + SHORT_PROMPT,
        max_num_seqs=batch,
        max_num_batched_tokens=max(batch, _STEP_TOKENS),
        enable_prefix_caching=False,
    )
    engine = Engine(config, checkpoint.decoder(), checkpoint.tokenizer(), table, checkpoint.model_hash)
    engine.start()
    try:
        _generate(engine, [prompts[0][:SHORT_PROMPT]] * batch, 2)  # touches memory for the first time
        return ModelSpeed(_first_token(engine, prompts), _step(engine, prompts, batch))
    finally:
        engine.shutdown(timeout_seconds=10)


def _first_token(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    seconds = []
    for prompt in prompts:
        began = time.perf_counter()
        seconds.append(_generate(engine, [prompt], 1).all_began - began)
    return statistics.median(seconds)


def _step(engine: Engine, prompts: Sequence[Sequence[int]], batch: int) -> float:
    seconds = []
    for repeat in range(_REPEATS):
        starts = [prompts[(repeat * batch + i) % len(prompts)][:SHORT_PROMPT] for i in range(batch)]
        run = _generate(engine, starts, _DECODE_TOKENS)
        seconds.append((run.ended - run.all_began) / (_DECODE_TOKENS - 1))
    return statistics.median(seconds)


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


def _generate(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> _Run:
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
