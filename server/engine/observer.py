"""What the engine tells whoever counts: metrics, logs, tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scone.server.engine.scheduler import Schedule, SchedulerState
from scone.server.sequence import FinishReason, GenerationRequest, RequestUsage


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step: what it computed, and what the engine holds after it."""

    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    seconds: float
    num_prefix_queries: int
    num_prefix_hits: int
    num_preempted: int


class EngineObserver(Protocol):
    """Called on the engine thread; must be quick and must not raise."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_prompt_tokens(self, num_tokens: int) -> None:
        """So many more tokens of a prompt were computed or taken from the prefix cache; each counts once."""

    def on_first_token(self, request: GenerationRequest, seconds: float) -> None:
        """Once a sequence; seconds since the request was submitted."""

    def on_tokens(self, seconds: float, num_tokens: int) -> None:
        """So many sequences had a later token, each so long after its last one."""

    def on_rows_waited(self, seconds: float) -> None:
        """A sequence could have run but for its rows, for so long."""

    def on_restored(self, num_tokens: int, seconds: float) -> None:
        """A prompt's stored blocks, of so many tokens, were fetched; seconds since they were asked for."""

    def on_sequence_finished(
        self, request: GenerationRequest, reason: FinishReason, usage: RequestUsage, seconds: float
    ) -> None:
        """Seconds since the request was submitted."""


class SilentObserver:
    """An observer that takes no notice."""

    def on_step(self, stats: StepStats) -> None:
        pass

    def on_prompt_tokens(self, num_tokens: int) -> None:
        pass

    def on_first_token(self, request: GenerationRequest, seconds: float) -> None:
        pass

    def on_tokens(self, seconds: float, num_tokens: int) -> None:
        pass

    def on_rows_waited(self, seconds: float) -> None:
        pass

    def on_restored(self, num_tokens: int, seconds: float) -> None:
        pass

    def on_sequence_finished(
        self, request: GenerationRequest, reason: FinishReason, usage: RequestUsage, seconds: float
    ) -> None:
        pass


def step_stats(state: SchedulerState, schedule: Schedule, seconds: float) -> StepStats:
    """Of a step that took so many seconds, with the scheduler's state after it."""
    num_decode = sum([c.num_tokens == 1 for c in schedule.chunks])
    return StepStats(
        num_prefill_tokens=sum([c.num_tokens for c in schedule.chunks]) - num_decode,
        num_decode_tokens=num_decode,
        num_running=len(state.running),
        num_waiting=len(state.waiting),
        kv_cache_usage=1 - state.pool.num_free / state.pool.num_blocks,
        seconds=seconds,
        num_prefix_queries=schedule.num_prefix_queries,
        num_prefix_hits=schedule.num_prefix_hits,
        num_preempted=len(schedule.preempted),
    )
