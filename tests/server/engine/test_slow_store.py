"""A slow store of recycled states: nobody else waits, what takes too long is computed, nothing is late."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from scone.server.engine import recycler as recycler_module
from scone.server.engine.scheduler import Status

from .conftest import World, num_landings, random_prompt
from .dict_table import DictTable
from .recycled_world import (
    BLOCK_BYTES,
    MakeWorld,
    abort_after,
    answer,
    counted,
    facts,
    preempted_while_restoring,
)
from .restarts import Restarts, SlowStore


def slow_world(
    make_world: MakeWorld, restarts: Restarts, prompt: list[int], call: str, **limits: Any
) -> tuple[World, SlowStore]:
    """A world whose store holds `prompt` and answers no `call` until it is released."""
    answer(make_world(store=restarts.open()), prompt)
    store = restarts.open(kind=SlowStore)
    assert isinstance(store, SlowStore)
    store.held, store.released = frozenset({call}), threading.Event()
    return make_world(store=store, **limits), store


@pytest.mark.parametrize("call", ["locate", "read"])
def test_a_slow_store_delays_nobody_else(
    make_world: MakeWorld, restarts: Restarts, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recycler_module, "LOOK_UP_PATIENCE_SECONDS", 60.0)  # also where steps are slow
    prompt = random_prompt(10, 100)
    cold = facts(answer(make_world(), prompt))
    world, store = slow_world(make_world, restarts, prompt, call)
    waiting = world.add(prompt, max_tokens=6, logprobs=2)
    others = [world.add([200, 201 + i], max_tokens=20) for i in range(2)]
    if call == "locate":  # their own look-ups are held too
        others = []
        store.held = frozenset()
        other = world.add([200], max_tokens=20)  # has no full block: nothing is asked for it
        others.append(other)
        store.held = frozenset({call})
    began = time.monotonic()
    # Where the processor is busy, the others may have ended before the look-up has.
    while any(not o.deltas or o.last().finish_reason is None for o in others) or (
        call == "read" and not world.core.state.running
    ):
        world.step()
        assert time.monotonic() - began < 30
    assert not waiting.deltas
    if call == "read":
        (seq,) = world.core.state.running
        assert seq.status is Status.RESTORING
    store.released.set()
    world.run()
    assert facts(waiting) == cold


@pytest.mark.parametrize("call", ["locate", "read"])
def test_what_takes_too_long_is_computed(
    make_world: MakeWorld, restarts: Restarts, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recycler_module, "LOOK_UP_PATIENCE_SECONDS", 0.05)
    prompt = random_prompt(11, 100)
    cold = facts(answer(make_world(), prompt))
    world, store = slow_world(make_world, restarts, prompt, call)
    counting = counted(world)
    first, second = (world.add(prompt, max_tokens=6, logprobs=2) for _ in range(2))
    while world.core.has_work:
        world.step()
    assert facts(first) == facts(second) == cold
    assert counting.num_restored == 0
    third = world.add(random_prompt(12, 40), max_tokens=1)  # nothing is asked for a while
    queries = store.stats.queries.total()
    while world.core.has_work:
        world.step()
    assert len(third.tokens()) == 1
    assert store.stats.queries.total() == queries
    store.released.set()
    world.run()


class LateStore(SlowStore):
    """Writes what is no state, when nobody waits for it any more."""

    def read(self, kind: Any, key: Any, token_ids: Any, out: Any = None) -> None:
        self._wait("read")
        out[:] = 255


def test_a_read_that_ends_late_writes_to_nobodys_blocks(
    make_world: MakeWorld, restarts: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are read straight into the cache: those of a restore that was given up are nobody's by then."""
    monkeypatch.setattr(recycler_module, "LOOK_UP_PATIENCE_SECONDS", 0.05)
    prompt = random_prompt(17, 100)
    cold = facts(answer(make_world(), prompt, max_tokens=30))
    answer(make_world(store=restarts.open()), prompt)
    store = restarts.open(kind=LateStore)
    assert isinstance(store, LateStore)
    store.held, store.released = frozenset({"read"}), threading.Event()
    world = make_world(store=store)
    late = world.add(prompt, max_tokens=30, logprobs=2)
    while len(late.tokens()) < 5:
        world.step()
    assert world.core.recycler is not None
    assert num_landings(world) > 0
    store.released.set()
    while num_landings(world):
        world.step()
    world.run()
    assert facts(late) == cold


@pytest.mark.parametrize("num_rounds", range(14))
def test_cancelled_at_any_moment(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, num_rounds: int
) -> None:
    prompt = random_prompt(13, 100)
    cold = facts(answer(make_world(dict_table, store=restarts.open()), prompt))
    world = make_world(dict_table, store=restarts.open(0), max_num_batched_tokens=16)
    abort_after(num_rounds, world, prompt)
    assert facts(answer(world, prompt)) == cold


def test_preempted_while_restoring(make_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(14, 100)
    cold = facts(answer(make_world(), prompt))
    world, store = slow_world(make_world, restarts, prompt, "read", kv_cache_bytes=BLOCK_BYTES * 17)
    assert facts(preempted_while_restoring(world, store.released, prompt)) == cold
