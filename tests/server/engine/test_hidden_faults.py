"""Blocks kept as the inputs of layers where something goes wrong: the rest is computed, no slot is lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from scone.cache.recycled_record import state_key

from .conftest import hidden_form, num_slots_in_use, random_prompt
from .dict_table import DictTable
from .hidden_world import KV_BYTES, blocks_on_disk
from .recycled_world import (
    BLOCK_SIZE,
    MakeWorld,
    abort_after,
    answer,
    counted,
    facts,
    preempted_while_restoring,
)
from .restarts import RAM_BYTES, Restarts, SlowStore


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_a_block_that_cannot_be_had_is_computed_and_kept_again(
    make_hidden_world: MakeWorld, dict_table: DictTable, restarts: Restarts, fault: str
) -> None:
    prompt = random_prompt(7, 100)
    store = restarts.open()
    first = make_hidden_world(dict_table, store=store)
    cold = facts(answer(first, prompt))
    seq = first.runs[-1].generations[0].seq
    key = hidden_form(first).key(seq.block_hashes[5])
    payload = store.read("blocks", key, torch.tensor(prompt[40:48], dtype=torch.int32).numpy())
    assert payload is not None
    if fault == "damaged":
        assert restarts.flip_bits(payload.tobytes()[:512]) >= 1
    else:
        assert store._disk is not None
        store._disk.discard(state_key("blocks", key))
    store = restarts.open()
    world = make_hidden_world(dict_table, store=store)
    counting = counted(world)
    assert facts(answer(world, prompt)) == cold
    assert counting.num_restored == 5 * BLOCK_SIZE
    assert store.stats.damaged["blocks", "checksum"] == (fault == "damaged")
    again = make_hidden_world(dict_table, store=restarts.open())
    counting = counted(again)
    assert facts(answer(again, prompt)) == cold
    assert counting.num_restored == 96


def test_values_that_are_not_finite_are_not_kept(make_hidden_world: MakeWorld, restarts: Restarts) -> None:
    store = restarts.open()
    world = make_hidden_world(store=store)
    states = hidden_form(world)._computed.states
    forward = world.runner.forward

    def spoilt(*args: Any) -> Any:
        hidden = forward(*args)
        states[:, 1, 2, 3] = torch.nan
        return hidden

    world.runner.forward = spoilt  # type: ignore[method-assign,assignment]
    answer(world, random_prompt(8, 40))
    assert store.stats.writes["blocks", "failed"] == 5
    assert store.stats.writes["blocks", "stored"] == 0


def test_a_budget_that_shrinks_meanwhile_fails_nothing(
    make_hidden_world: MakeWorld, restarts: Restarts
) -> None:
    prompt = random_prompt(9, 100)
    cold = facts(answer(make_hidden_world(store=restarts.open()), prompt))
    store = restarts.open(RAM_BYTES, SlowStore)
    assert isinstance(store, SlowStore)
    store.held, store.released = frozenset({"read"}), threading.Event()
    world = make_hidden_world(store=store)
    restoring = world.add(prompt, max_tokens=6, logprobs=2)
    while num_slots_in_use(world) == 0:
        world.step()
    store.set_budgets(ram_bytes=0, disk_bytes=64 << 20)
    store.clear("blocks")
    store.released.set()
    world.run()
    assert facts(restoring) == cold
    assert store.flush(60)
    assert store.file_bytes <= 64 << 20
    assert blocks_on_disk(store)[0] == 12, "what was computed instead was kept"
    assert not any(u.num_bytes for u in store.usage() if u.tier == "ram")


@pytest.mark.parametrize("num_rounds", range(14))
def test_cancelled_at_any_moment(
    make_hidden_world: MakeWorld, dict_table: DictTable, restarts: Restarts, num_rounds: int
) -> None:
    """Half of the prompt restored, half computed and kept."""
    prompt = random_prompt(13, 100)
    cold = facts(answer(make_hidden_world(dict_table, store=restarts.open()), prompt))
    restarts.remove()
    answer(make_hidden_world(dict_table, store=restarts.open()), prompt[:50])
    world = make_hidden_world(dict_table, store=restarts.open(0), max_num_batched_tokens=10)
    abort_after(num_rounds, world, prompt)
    assert num_slots_in_use(world) == 0
    assert facts(answer(world, prompt)) == cold


def test_preempted_while_restoring(make_hidden_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(14, 100)
    cold = facts(answer(make_hidden_world(store=restarts.open()), prompt))
    store = restarts.open(kind=SlowStore)
    assert isinstance(store, SlowStore)
    store.held, store.released = frozenset({"read"}), threading.Event()
    world = make_hidden_world(store=store, kv_cache_bytes=KV_BYTES * 17)
    assert facts(preempted_while_restoring(world, store.released, prompt)) == cold
