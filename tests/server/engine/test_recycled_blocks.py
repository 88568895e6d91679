"""Restored from memory or disk, by this engine or another: the same bits, and only the rest is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_store import RecycledStore

from .conftest import DictTable, Outcome, World, random_prompt

MakeWorld = Callable[..., World]
OpenStore = Callable[..., RecycledStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the store in tmp_path, as after a restart; ram_bytes=0 leaves the disk alone."""
    stores: list[RecycledStore] = []

    def open_it(ram_bytes: int = 1 << 26, on_disk: bool = True) -> RecycledStore:
        for store in stores:
            store.close()
        stores.clear()
        config = RecycledConfig(disk_bytes=256 << 20)
        store = RecycledStore.open(tmp_path / "store" if on_disk else None, config, MemoryBudget(ram_bytes))
        stores.append(store)
        return store

    yield open_it
    for store in stores:
        store.close()


def answer(world: World, prompt: list[int], **params: Any) -> Outcome:
    outcome = world.add(prompt, **{"max_tokens": 6, "logprobs": 2} | params)
    world.run()
    return outcome


def facts(outcome: Outcome) -> list[Any]:
    return [(d.token_ids, d.logprobs, d.finish_reason) for d in outcome.deltas[0]]


def num_cached(outcome: Outcome) -> int:
    usage = outcome.last().usage
    assert usage is not None
    return usage.num_cached_tokens


def test_cold_memory_ram_disk_and_restart_give_the_same_bits(
    make_world: MakeWorld, dict_table: DictTable, open_store: OpenStore
) -> None:
    prompt = random_prompt(1, 100)
    cold = facts(answer(make_world(dict_table), prompt))
    first = make_world(dict_table, store=open_store())
    filled = answer(first, prompt)
    assert (facts(filled), num_cached(filled)) == (cold, 0)
    warm = answer(first, prompt)
    assert (facts(warm), num_cached(warm)) == (cold, 96)
    for ram_bytes in (1 << 26, 0):
        store = open_store(ram_bytes)
        for _ in range(2):
            restored = answer(make_world(dict_table, store=store), prompt)
            assert (facts(restored), num_cached(restored)) == (cold, 96)
        assert store.stats.hits["blocks", "disk"] == (12 if ram_bytes else 24)
        assert store.stats.hits["blocks", "ram"] == (12 if ram_bytes else 0)
