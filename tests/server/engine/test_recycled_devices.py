"""Restoring and keeping blocks on a device as late as may be, and proof that no synchronisation is idle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.cache.recycled_store import RecycledStore
from scone.cache.sim_device import SimDevice
from scone.server.engine import block_landing
from tests.conftest import Forgetful

from .conftest import World, random_prompt
from .dict_table import DictTable
from .recycled_world import Counting, MakeWorld, answer, counted
from .restarts import Restarts


class InlineStore(RecycledStore):
    """Takes payloads on the engine's thread, a little later: a simulated device knows one thread."""

    world: World

    def write(self, kind: Any, key: bytes, token_ids: Any, payload: Any, **options: Any) -> bool:
        if not callable(payload):
            return super().write(kind, key, token_ids, payload, **options)

        def later() -> None:
            with torch.inference_mode():
                taken: NDArray[np.uint8] = payload()
            super(InlineStore, self).write(kind, key, token_ids, taken, **options)

        self.world.commands.append(later)
        return True


PROMPTS = [random_prompt(20, 90), random_prompt(21, 41), random_prompt(20, 57)]


def device_answers(
    make_world: MakeWorld, table: DictTable, restarts: Restarts, saving: SimDevice, restoring: SimDevice
) -> tuple[list[Any], Counting]:
    """Answers of an engine on one device that restores what an engine on another one has kept."""
    store = restarts.open(kind=InlineStore)
    assert isinstance(store, InlineStore)
    world = store.world = make_world(table, saving, store=store, max_num_batched_tokens=16)
    for prompt in PROMPTS[:2]:
        world.add(prompt, max_tokens=2)
    world.run()
    store.flush(60)
    store.world = world = make_world(table, restoring, store=store, max_num_batched_tokens=16)
    counting = counted(world)
    outcomes = [world.add(prompt, max_tokens=4) for prompt in PROMPTS]
    world.run()
    with torch.inference_mode():
        restoring.drain()
    assert world.core.recycler is not None
    assert world.core.recycler.restorer.landings.num_in_use == 0
    restarts.remove()
    return [o.tokens() for o in outcomes], counting


def test_a_late_device_restores_and_keeps_the_same_blocks(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    dict_table.slow = set()
    expected = [answer(make_world(dict_table), p, max_tokens=4).tokens() for p in PROMPTS]
    for seed in range(8):
        monkeypatch.setattr(block_landing, "MOST_UNDER_WAY", 3 + seed % 2 * 61)
        tokens, counting = device_answers(
            make_world, dict_table, restarts, SimDevice(seed), SimDevice(100 + seed)
        )
        assert tokens == expected
        assert counting.num_restored >= 88 + 40


@pytest.mark.parametrize(
    "forgotten",
    ["compute stream waits", "copy stream waits", "copy stream is recorded", "compute stream is recorded"],
)
def test_without_any_one_synchronisation_restored_blocks_are_wrong(
    make_world: MakeWorld, restarts: Restarts, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_landing, "MOST_UNDER_WAY", 3)  # that slots are soon used again
    table = DictTable({}, 64)
    expected = [answer(make_world(table), p, max_tokens=4).tokens() for p in PROMPTS]
    num_wrong = 0
    for seed in range(8):
        device = Forgetful(seed, forgotten)
        tokens, _ = device_answers(make_world, table, restarts, SimDevice(seed), device)
        num_wrong += tokens != expected
    assert num_wrong >= 4


def test_without_waiting_for_the_step_kept_blocks_are_wrong(
    make_world: MakeWorld, restarts: Restarts
) -> None:
    table = DictTable({}, 64)
    expected = [answer(make_world(table), p, max_tokens=4).tokens() for p in PROMPTS]
    num_wrong = 0
    for seed in range(8):
        device = Forgetful(seed, "compute stream is recorded")
        tokens, _ = device_answers(make_world, table, restarts, device, SimDevice(seed))
        num_wrong += tokens != expected
    assert num_wrong >= 4
