"""What the engine tells its observer, and when."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scone.server.engine.observer import SilentObserver
from scone.server.sequence import GenerationRequest

from .conftest import World, random_prompt
from .dict_table import DictTable

MakeWorld = Callable[..., World]
BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * 8


class TokenCounter(SilentObserver):
    """Prompt and generated tokens so far."""

    def __init__(self) -> None:
        self.num_prompt = self.num_generated = 0

    def on_prompt_tokens(self, num_tokens: int) -> None:
        self.num_prompt += num_tokens

    def on_first_token(self, request: GenerationRequest, seconds: float) -> None:
        self.num_generated += 1

    def on_tokens(self, seconds: float, num_tokens: int) -> None:
        self.num_generated += num_tokens


def test_tokens_are_counted_as_they_are_computed(make_world: MakeWorld, dict_table: DictTable) -> None:
    world = make_world(dict_table, max_num_batched_tokens=16)
    world.core.observer = counter = TokenCounter()
    world.add(random_prompt(1, 40), max_tokens=3)
    seen = []
    while world.core.has_work:
        world.core.step()
        seen.append((counter.num_prompt, counter.num_generated))
    assert [at for i, at in enumerate(seen) if at not in seen[:i]] == [
        (16, 0),
        (32, 0),
        (40, 1),
        (40, 2),
        (40, 3),
    ]


@pytest.mark.parametrize(("n", "num_blocks"), [(1, 64), (3, 128), (3, 16)])
def test_each_token_counts_once(
    make_world: MakeWorld, dict_table: DictTable, n: int, num_blocks: int
) -> None:
    """However often preemption, siblings without room and cached prefixes change what is computed."""
    world = make_world(dict_table, kv_cache_bytes=BLOCK_BYTES * num_blocks)
    world.core.observer = counter = TokenCounter()
    for _ in range(2):
        for seed in range(4):
            world.add(random_prompt(seed, 20), n=n, max_tokens=60)
        world.run()
    assert counter.num_prompt == 2 * 4 * 20
    assert counter.num_generated == 2 * 4 * n * 60
    was_preempted = any(g.seq.num_preemptions for run in world.runs for g in run.generations)
    assert was_preempted is (num_blocks == 16)


def test_tokens_of_an_aborted_request_stay_counted(make_world: MakeWorld) -> None:
    world = make_world(None, max_num_batched_tokens=8)
    world.core.observer = counter = TokenCounter()
    world.add(random_prompt(1, 20), max_tokens=3)
    world.core.step()
    world.core.abort(world.runs[0])
    world.run()
    assert (counter.num_prompt, counter.num_generated) == (8, 0)
