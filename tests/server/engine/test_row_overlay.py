"""The engine on a device that is as late as may be answers as on a CPU; its staging leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scone.cache.sim_device import SimDevice
from tests.conftest import Forgetful

from .conftest import World, random_prompt
from .dict_table import DictTable

MakeWorld = Callable[..., World]
NUM_SEEDS = 25
PROMPTS = [random_prompt(seed, length) for seed, length in ((1, 60), (2, 5), (3, 47), (4, 1))]


def answers(make_world: MakeWorld, table: DictTable, device: SimDevice | None) -> list[Any]:
    """Tokens of a few requests; long prompts go through in small chunks, several of them in flight.

    What is generated is of the ids that f-grams are made of.
    """
    world = make_world(table, device, max_num_batched_tokens=8, max_num_seqs=4)
    params: dict[str, Any] = {"max_tokens": 8, "allowed_token_ids": tuple(range(3, 12))}
    outcomes = [world.add(prompt, n=n, **params) for prompt, n in zip(PROMPTS, (1, 2, 1, 1), strict=True)]
    world.run()
    return [
        (d.token_ids, d.finish_reason)
        for o in outcomes
        for index in sorted(o.deltas)
        for d in o.deltas[index]
    ]


@pytest.mark.parametrize("slow", [set(), None, set(range(0, 510, 3))], ids=["memory", "disk", "both"])
def test_a_late_device_gives_the_same_tokens(
    make_world: MakeWorld, dict_table: DictTable, slow: set[int] | None
) -> None:
    dict_table.slow = slow
    expected = answers(make_world, dict_table, None)
    for seed in range(NUM_SEEDS):
        device = SimDevice(seed)
        num_before, num_gathered = dict_table.num_looked_up, dict_table.num_gathered
        assert answers(make_world, dict_table, device) == expected
        # in one call, where all is in memory and where it is not
        assert (dict_table.num_looked_up > num_before) == (slow == set())
        assert (dict_table.num_gathered > num_gathered) == (slow != set())
        assert device.usage.copied_bytes > 50 * 4 * dict_table.dim


@pytest.mark.parametrize("forgotten", ["host waits for copied", "copy stream waits", "compute stream waits"])
def test_without_any_one_synchronisation_the_answers_are_wrong(
    make_world: MakeWorld, dict_table: DictTable, forgotten: str
) -> None:
    dict_table.slow = set()
    expected = answers(make_world, dict_table, None)
    num_wrong = sum(
        answers(make_world, dict_table, Forgetful(seed, forgotten)) != expected for seed in range(NUM_SEEDS)
    )
    assert num_wrong > NUM_SEEDS // 2


def test_one_slow_row_holds_its_own_sequence_only(make_world: MakeWorld, dict_table: DictTable) -> None:
    """Two sequences get rows in the same step; the first one's comes from a disk that does not answer."""
    fgrams = {fgram: dict_table.longest(fgram) for fgram in dict_table.fgrams() if len(fgram) == 2}
    (first, slow_row), (second, _) = list(fgrams.items())[:2]
    dict_table.slow = dict_table.held = {slow_row}
    world = make_world(dict_table)
    # each is made to generate the last token of its f-gram
    held = world.add([3, first[0]], max_tokens=3, allowed_token_ids=(first[1],))
    free = world.add([3, second[0]], max_tokens=3, allowed_token_ids=(second[1],))
    for _ in range(20):
        world.core.step()
    assert free.last().finish_reason == "length"
    assert held.tokens() == [first[1]]
    dict_table.held = set()
    world.run()
    assert held.tokens() == [first[1]] * 3


def test_a_step_waits_no_longer_than_leaving_a_sequence_out_would_cost(
    make_world: MakeWorld, dict_table: DictTable
) -> None:
    fgram, row = next((f, dict_table.longest(f)) for f in dict_table.fgrams() if len(f) == 2)
    dict_table.slow = dict_table.held = {row}
    world = make_world(dict_table)
    held = world.add([3, fgram[0]], max_tokens=3, allowed_token_ids=(fgram[1],))
    others = [world.add([200, 201], max_tokens=50, allowed_token_ids=(202,)) for _ in range(3)]
    for _ in range(20):
        world.core.step()
    assert len(dict_table.waits) == 1, "a row is waited for once"
    assert 0 < dict_table.waits[0] <= world.core._step_seconds * 100 / 4
    assert held.tokens() == [fgram[1]]
    assert all(len(other.tokens()) == 20 for other in others)
    dict_table.held = set()
    world.run()


@pytest.mark.parametrize("num_steps", range(1, 12))
def test_nothing_is_held_after_an_abort_on_a_late_device(
    make_world: MakeWorld, dict_table: DictTable, num_steps: int
) -> None:
    dict_table.slow = set(range(0, 510, 2))
    device = SimDevice(num_steps)
    world = make_world(dict_table, device, max_num_batched_tokens=8, max_num_seqs=4, kv_cache_bytes=100_000)
    for prompt in PROMPTS * 2:
        world.add(prompt, max_tokens=6)
    for _ in range(num_steps):
        world.core.step()
    for run in world.runs[::2]:
        world.core.abort(run)
    world.run()
    with torch.inference_mode():
        device.drain()
    assert world.core.overlay.ring.num_in_use == 0


def test_a_damaged_row_in_memory_ends_its_request_only(make_world: MakeWorld, dict_table: DictTable) -> None:
    bad, good = random_prompt(1, 30), random_prompt(2, 30)
    dict_table.slow = set()
    good_ids = {dict_table.longest(good[: i + 1]) for i in range(len(good))}
    dict_table.broken = {dict_table.longest(bad[: i + 1]) for i in range(len(bad))} - {-1} - good_ids
    assert dict_table.broken
    world = make_world(dict_table, SimDevice(1))
    failed, served = world.add(bad, max_tokens=1), world.add(good, max_tokens=1)
    world.run()
    assert failed.last().finish_reason == "error"
    assert "cannot be read" in (failed.last().error or "")
    assert served.last().finish_reason == "length"
