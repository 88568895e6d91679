"""Eviction while an engine serves: whatever goes, and whenever it goes, no token changes."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from scone.cache.recycled_config import LEAST_DISK_BYTES
from scone.cache.recycled_record import state_key
from scone.cache.recycled_store import RecycledStore

from .conftest import random_prompt
from .dict_table import DictTable
from .recycled_world import MakeWorld, answer, counted, facts, num_cached
from .restarts import Restarts

BLOCK_SIZE = 8
BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * BLOCK_SIZE


class EvictingStore(RecycledStore):
    """Evicts between a look-up and the reads that follow it, from some block of the prefix on."""

    evict_from = 0

    def locate(self, kind: Any, keys: Sequence[bytes]) -> Any:
        tiers = super().locate(kind, keys)
        for key in keys[self.evict_from :]:
            self._ram.discard(state_key(kind, key))
            assert self._disk is not None
            self._disk.discard(state_key(kind, key))
        return tiers


@pytest.mark.parametrize("evict_from", [0, 1, 5, 11])
@pytest.mark.parametrize("ram_bytes", [0, 64 << 20])
def test_blocks_evicted_between_look_up_and_read_are_computed(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, evict_from: int, ram_bytes: int
) -> None:
    prompt = random_prompt(1, 100)
    cold = facts(answer(make_world(dict_table), prompt))
    answer(make_world(dict_table, store=restarts.open()), prompt)
    store = restarts.open(ram_bytes, EvictingStore)
    assert isinstance(store, EvictingStore)
    store.evict_from = evict_from
    world = make_world(dict_table, store=store)
    counting = counted(world)
    restored = answer(world, prompt)
    assert facts(restored) == cold
    assert num_cached(restored) == counting.num_restored == evict_from * BLOCK_SIZE
    assert store.stats.misses["blocks"] >= 1


@pytest.mark.parametrize("seed", range(3))
def test_budgets_that_shrink_and_grow_while_requests_run_change_no_token(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, seed: int
) -> None:
    """Memory for a few blocks at most; both tiers are resized and emptied by another thread meanwhile."""
    rng = random.Random(seed)
    shared = random_prompt(30 + seed, 60)
    prompts = [shared[: 8 * (i % 8)] + random_prompt(100 + i, 5 + 2 * i) for i in range(16)]
    expected = [facts(answer(make_world(dict_table), p, max_tokens=8)) for p in prompts]
    store = restarts.open(12 * BLOCK_BYTES)
    is_over = threading.Event()
    faults: list[BaseException] = []

    def disturb() -> None:
        disturber = random.Random(seed)
        try:
            while not is_over.wait(disturber.uniform(0, 0.01)):
                match disturber.randrange(20):
                    case 0:
                        store.clear("blocks")
                    case 1:
                        store.set_budgets(disk_bytes=LEAST_DISK_BYTES * disturber.choice((1, 2)))
                    case _:
                        store.set_budgets(ram_bytes=disturber.randrange(40) * BLOCK_BYTES)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        num_restored = num_rounds = 0
        while num_rounds < 4 or (num_restored == 0 and num_rounds < 40):
            num_rounds += 1
            # A new engine each time: what it restores comes from the store.
            world = make_world(dict_table, store=store, kv_cache_bytes=BLOCK_BYTES * 40, max_num_seqs=6)
            counting = counted(world)
            order = rng.sample(range(len(prompts)), len(prompts))
            outcomes = {i: world.add(prompts[i], max_tokens=8, logprobs=2) for i in order}
            world.run()
            assert [facts(outcomes[i]) for i in range(len(prompts))] == expected
            num_restored += counting.num_restored
            assert store.flush(60)
    finally:
        is_over.set()
        thread.join()
    assert not faults
    assert num_restored > 0
    assert sum(store.stats.evictions.values()) > 0
    assert not store.stats.damaged
    in_flight_bytes = 12 * BLOCK_BYTES // 8  # what waits to be written keeps its part
    assert store.memory.used_bytes <= max(store.memory.total_bytes, in_flight_bytes)
