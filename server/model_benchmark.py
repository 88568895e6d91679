"""Measures what a table costs a real model on this machine: decode speed and time to first token, with the
table and without, in one run.

What it costs is less than the machine's speed changes from one second to the next. So two engines take steps
in turn, one with the table (in memory) and one without, and each step is held against its neighbour. Two
copies of the weights differ by more than the table costs, too, by the memory they happen to lie in: all is
done twice, the table once with either copy, and the geometric mean of both ratios taken.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.cache import FGramTable, TableConfig
from scone.model_store.checkpoint import open_checkpoint
from scone.server.engine.engine import runner_for
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.engine_core import EngineCore
from scone.server.engine.generation import RequestRun
from scone.server.engine.input_rows import InputRows, read_ahead
from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.engine.row_overlay import staging_device
from scone.server.errors import SettingError
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

_LONG_PROMPT = 2000
_SHORT_PROMPT = 32
_DECODE_STEPS = {1: 200, 32: 40}
"""Sequences that decode together, and steps for each repeat: four of them make one ratio."""


class ModelBenchmark:
    """Two copies of one model, a table, and text to prompt with."""

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
        self._steps = _LastStep()
        self._cores = []
        for _ in range(2):
            decoder = checkpoint.decoder()
            runner = runner_for(decoder, config, staging_device(decoder.device))
            if runner.cache_pages is not None:  # else new blocks would come with page faults
                runner.cache_pages.start()
                runner.cache_pages.wait(60)
            self._cores.append(EngineCore(config, runner, tokenizer, checkpoint.model_hash, self._steps))
        self._rows = read_ahead(self._table, self._cores[0].overlay.device)
        self._num_requests = 0

    def __enter__(self) -> ModelBenchmark:
        self._both_ways([self._prompt(0, _SHORT_PROMPT)], 8)  # touches memory for the first time
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._table.close()

    def decode(self, repeats: int) -> dict[str, Any]:
        """Tokens per second while 1 or 32 sequences decode."""
        result: dict[str, Any] = {}
        for num, num_steps in _DECODE_STEPS.items():
            steps = []
            for repeat in range(repeats):
                prompts = [self._prompt(repeat * num + i, _SHORT_PROMPT) for i in range(num)]
                seconds, num_decoding = self._both_ways(prompts, num_steps)
                steps.append(seconds[num_decoding == num])
            result[f"{num}_sequences"] = _beside("tokens_per_second", num / np.concatenate(steps))
        return result

    def prefill(self, repeats: int) -> dict[str, Any]:
        """Seconds from the arrival of a prompt of 2,000 tokens to the first token."""
        runs = [self._both_ways([self._prompt(i, _LONG_PROMPT)], 1) for i in range(repeats)]
        seconds = [seconds.sum(axis=0) for seconds, _ in runs]
        return {"prompt_tokens": _LONG_PROMPT, **_beside("seconds_to_first_token", np.array(seconds))}

    def _both_ways(
        self, prompts: Sequence[Sequence[int]], num_tokens: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What the arrival and each step took, and how many sequences decoded in it, without others.

        Returns:
            Seconds (1 + num_steps, copy with the table, with it or not) and numbers (1 + num_steps,).
        """
        ways = [self._in_turn(copy, prompts, num_tokens) for copy in (0, 1)]
        assert (ways[0][1] == ways[1][1]).all(), "the copies took other steps"
        return np.stack([seconds for seconds, _ in ways], axis=1), ways[0][1]

    def _in_turn(
        self, copy: int, prompts: Sequence[Sequence[int]], num_tokens: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(num_steps, 2), with the table on one copy of the model, without it on the other; (num_steps,)."""
        sides = ((self._cores[copy], self._rows), (self._cores[1 - copy], None))
        seconds = [[self._add(core, prompts, num_tokens, rows) for core, rows in sides]]
        num_decoding = [0]
        while any(core.has_work for core, _ in sides):
            step = [0.0, 0.0]
            # Who is first changes: a second step finds other caches than the first.
            for side in (0, 1) if len(seconds) % 2 else (1, 0):
                began = time.perf_counter()
                sides[side][0].step()
                step[side] = time.perf_counter() - began
            seconds.append(step)
            num_decoding.append(self._steps.num_decoding)
        return np.array(seconds), np.array(num_decoding)

    def _add(
        self, core: EngineCore, prompts: Sequence[Sequence[int]], num_tokens: int, rows: InputRows | None
    ) -> float:
        began = time.perf_counter()
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
        for prompt in prompts:
            request = GenerationRequest(
                request_id=str(self._num_requests), input_ids=tuple(prompt), sampling=sampling
            )
            core.add(RequestRun(request, _check, self._num_requests, time.monotonic(), rows))
            self._num_requests += 1
        return time.perf_counter() - began

    def _prompt(self, number: int, length: int) -> list[int]:
        start = number * 997 % (len(self._tokens) - length)
        return self._tokens[start : start + length]


class _LastStep(SilentObserver):
    """Knows how many sequences decoded in the last step; 0 if it had prompts as well."""

    num_decoding = 0

    def on_step(self, stats: StepStats) -> None:
        self.num_decoding = 0 if stats.num_prefill_tokens else stats.num_decode_tokens


def _check(delta: Delta) -> None:
    assert delta.error is None, delta.error


def _beside(unit: str, measured: NDArray[np.float64]) -> dict[str, Any]:
    """Medians, and the ratios of neighbours; `measured` is (n, copy with the table, with it or not)."""
    with_table, without_table = np.median(measured, axis=(0, 1)).tolist()
    ratios = np.sqrt((measured[:, :, 0] / measured[:, :, 1]).prod(axis=1))
    return {
        unit: {"with_table": round(with_table, 4), "without_table": round(without_table, 4)},
        "with_over_without": spread(ratios.tolist()),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """How values lie: median, quartiles, and where the median of endlessly many would be, 19 times of 20.

    That interval lies between two of the values, whatever their distribution: how many of them are below the
    true median is binomial.
    """
    ordered = sorted(values)
    num = len(ordered)
    first = max(0, math.floor((num - 1.96 * math.sqrt(num)) / 2))
    quartiles = statistics.quantiles(ordered, n=4) if num > 1 else [ordered[0]] * 3
    return {
        "median": round(statistics.median(ordered), 4),
        "interval": [round(ordered[first], 4), round(ordered[num - 1 - first], 4)],
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "num_ratios": num,
    }
