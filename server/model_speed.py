"""How fast a model runs on this machine with a table: the whole engine, one prompt, then steps of a batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scone.cache import FGramTable
from scone.model_store.checkpoint import Checkpoint
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.model_benchmark import generate

SHORT_PROMPT = 32
"""Tokens of the prompts that decoding starts from."""

_STEP_TOKENS = 512  # as the engine's default
_DECODE_TOKENS = 24
_REPEATS = 3


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
        generate(engine, [prompts[0][:SHORT_PROMPT]] * batch, 2)  # touches memory for the first time
        return ModelSpeed(_first_token(engine, prompts), _step(engine, prompts, batch))
    finally:
        engine.shutdown(timeout_seconds=10)


def _first_token(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    seconds = []
    for prompt in prompts:
        began = time.perf_counter()
        seconds.append(generate(engine, [prompt], 1).all_began - began)
    return statistics.median(seconds)


def _step(engine: Engine, prompts: Sequence[Sequence[int]], batch: int) -> float:
    seconds = []
    for repeat in range(_REPEATS):
        starts = [prompts[(repeat * batch + i) % len(prompts)][:SHORT_PROMPT] for i in range(batch)]
        run = generate(engine, starts, _DECODE_TOKENS)
        seconds.append((run.ended - run.all_began) / (_DECODE_TOKENS - 1))
    return statistics.median(seconds)
