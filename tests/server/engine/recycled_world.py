"""What tests of recycled states share: requests one by one, what was answered, what was computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from scone.server.engine.observer import SilentObserver, StepStats
from scone.server.sequence import Delta

from .conftest import Outcome, World

BLOCK_SIZE = 8
"""Tokens of a world's blocks, and the bytes of one: 3 layers of keys and values, 2 heads of 16 floats."""

BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * BLOCK_SIZE


class Counting(SilentObserver):
    """Counts what was computed and what was restored."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_computed = 0
        self.num_restored = 0

    def on_step(self, stats: StepStats) -> None:
        if stats.num_prefill_tokens + stats.num_decode_tokens:
            self.num_steps += 1
        self.num_computed += stats.num_prefill_tokens + stats.num_decode_tokens

    def on_restored(self, num_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.num_restored += num_tokens


def counted(world: World) -> Counting:
    """Has the world's engine tell a fresh counter from now on."""
    world.core.observer = counting = Counting()
    return counting


def answer(world: World, prompt: Sequence[int], **params: Any) -> Outcome:
    """A request by itself, until it has ended and the store has what it was given."""
    outcome = world.add(prompt, **{"max_tokens": 6, "logprobs": 2} | params)
    world.run()
    recycler = world.core.recycler
    if recycler is not None:
        assert recycler.flush(60)
    return outcome


def abort_after(num_rounds: int, world: World, prompt: Sequence[int]) -> None:
    """Sends a prompt twice and aborts the first request, or both, after so many steps."""
    for _ in range(2):
        world.add(prompt, max_tokens=6)
    for _ in range(num_rounds):
        world.step()
        time.sleep(0.0005)
    world.core.abort(world.runs[0])
    if num_rounds % 2:
        world.core.abort(world.runs[1])
    world.run()


def facts(outcome: Outcome) -> list[Any]:
    """All that a client sees of sequence 0, but for what it cost."""
    return [facts_of(delta) for delta in outcome.deltas[0]]


def facts_of(delta: Delta) -> tuple[Any, ...]:
    vector = None if delta.embedding is None else delta.embedding.tobytes()
    return (
        delta.text,
        delta.token_ids,
        delta.logprobs,
        delta.prompt_logprobs,
        delta.finish_reason,
        delta.stop_reason,
        vector,
        delta.error,
    )


def num_cached(outcome: Outcome) -> int:
    usage = outcome.last().usage
    assert usage is not None
    return usage.num_cached_tokens


MakeWorld = Callable[..., World]


def preempted_while_restoring(world: World, released: threading.Event, prompt: Sequence[int]) -> Outcome:
    """A prompt's outcome whose stored blocks are `released` only once an older sequence took its seat.

    The world has so few blocks that this one needs them.
    """
    old = world.add([200, 201], max_tokens=60)
    while not old.deltas:
        world.step()
    young = world.add(prompt, max_tokens=6, logprobs=2)
    (generation,) = world.runs[-1].generations
    while generation.seq.num_preemptions == 0:
        world.step()
    released.set()
    world.run()
    assert len(old.tokens()) == 60
    return young
