"""Blocks restored from memory or disk, by this engine or another: the same bits, and the rest is computed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from scone.cache.recycled_store import RecycledStore

from .conftest import World, random_prompt
from .dict_table import DictTable
from .recycled_world import BLOCK_BYTES, BLOCK_SIZE, MakeWorld, answer, counted, facts, num_cached
from .restarts import RAM_BYTES, Restarts, SlowStore


def test_cold_memory_ram_disk_and_restart_give_the_same_bits(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    prompt = random_prompt(1, 100)
    cold = facts(answer(make_world(dict_table), prompt))
    first = make_world(dict_table, store=restarts.open())
    for expected in (0, 96):
        outcome = answer(first, prompt)
        assert (facts(outcome), num_cached(outcome)) == (cold, expected)
    for ram_bytes, hits in ((RAM_BYTES, {"disk": 12, "ram": 12}), (0, {"disk": 24, "ram": 0})):
        store = restarts.open(ram_bytes)
        for _ in range(2):
            world = make_world(dict_table, store=store)
            counting = counted(world)
            restored = answer(world, prompt)
            assert (facts(restored), num_cached(restored)) == (cold, 96)
            assert (counting.num_restored, counting.num_computed) == (96, 100 - 96 + 5)
        assert {tier: store.stats.hits["blocks", tier] for tier in hits} == hits
        assert store.stats.writes["blocks", "stored"] == 0, "what is there already is not written again"


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 100])
def test_at_least_one_token_is_computed(make_world: MakeWorld, restarts: Restarts, length: int) -> None:
    prompt = random_prompt(2, length)
    cold = answer(make_world(store=restarts.open()), prompt)
    world = make_world(store=restarts.open())
    counting = counted(world)
    restored = answer(world, prompt, max_tokens=1)
    assert restored.tokens() == cold.tokens()[:1]
    assert counting.num_restored == num_cached(restored) == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert counting.num_computed == length - counting.num_restored


def test_memory_first_then_the_store_then_computing(make_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(3, 100)
    cold = facts(answer(make_world(store=restarts.open()), prompt[:64]))
    whole = facts(answer(make_world(), prompt))
    store = restarts.open()
    world = make_world(store=store)
    answer(world, prompt[:33], max_tokens=1)  # 4 blocks into memory, from the store
    hits = store.stats.hits.total()
    counting = counted(world)
    assert facts(answer(world, prompt)) == whole
    assert counting.num_restored == 64 - 32, "of the rest, those that the first prompt had in full"
    assert store.stats.hits.total() - hits == 4
    assert facts(answer(world, prompt[:64])) == cold


def test_blocks_that_were_computed_while_the_store_was_asked(
    make_world: MakeWorld, restarts: Restarts
) -> None:
    """What the store has is counted from what was in memory when it was asked, not when it answered."""
    prompt = random_prompt(8, 100)
    whole = facts(answer(make_world(store=restarts.open()), prompt))
    store = restarts.open(0, SlowStore)
    assert isinstance(store, SlowStore)
    store.held, store.released = frozenset({"locate"}), threading.Event()
    world = make_world(store=store)
    counting = counted(world)
    asking = world.add(prompt, max_tokens=6, logprobs=2)
    assert world.core.recycler is not None
    world.core.recycler._paused_until = float("inf")  # the next one asks nothing
    other = world.add(prompt[:64], max_tokens=1)
    while not other.deltas:
        world.step()
    store.released.set()
    world.run()
    assert facts(asking) == whole
    assert (num_cached(asking), counting.num_restored) == (96, 96 - 64)


def test_many_prompts_in_small_chunks_and_few_blocks(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    """Shared beginnings, chunks, batches, preemption while decoding or restoring: answers as if alone."""
    shared = random_prompt(4, 40)
    prompts = [shared[: 8 * (i % 5)] + random_prompt(50 + i, 5 + 3 * i) for i in range(12)]
    expected = [facts(answer(make_world(dict_table), p, max_tokens=20)) for p in prompts]
    for some in (prompts, prompts[::2]):
        first = make_world(dict_table, store=restarts.open())
        for prompt in some:
            answer(first, prompt, max_tokens=3)
    for limits in (
        {"max_num_batched_tokens": 8, "kv_cache_bytes": BLOCK_BYTES * 16},
        {"max_num_batched_tokens": 16, "max_num_seqs": 3},
        {"kv_cache_bytes": BLOCK_BYTES * 20, "max_num_seqs": 12},
    ):
        world = make_world(dict_table, store=restarts.open(0), **limits)
        counting = counted(world)
        outcomes = [world.add(p, max_tokens=20, logprobs=2) for p in prompts]
        world.run()
        assert [facts(o) for o in outcomes] == expected
        assert counting.num_restored > 50


def test_the_torch_backend_gives_the_same_up_to_rounding(make_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(5, 90)
    cold = answer(make_world(backend="torch"), prompt)
    answer(make_world(backend="torch", store=restarts.open()), prompt)
    restored = answer(make_world(backend="torch", store=restarts.open()), prompt)
    assert num_cached(restored) == 88
    assert restored.tokens() == cold.tokens()
    assert restored.logprobs() == pytest.approx(cold.logprobs(), abs=1e-5)


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    ["weights", "tokenizer", "table", "codec", "salt", "block_size", "backend", "quantization", "nothing"],
)
def test_whatever_changes_the_states_is_a_miss(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, change: str
) -> None:
    prompt = random_prompt(6, 60)
    answer(make_world(dict_table, store=restarts.open()), prompt, salt="mine")
    settings: dict[str, dict[str, Any]] = {
        "block_size": {"block_size": 4},
        "backend": {"backend": "torch"},
        "quantization": {"quantization": "int8"},
    }
    store = restarts.open()
    world = make_world(dict_table, store=store, **settings.get(change, {}))
    core, rows = world.core, world.input_rows
    assert rows is not None
    if change == "weights":
        core._model_hash = "another"
    elif change == "tokenizer":
        core._tokenizer.hash, before = "another", core._tokenizer.hash
    elif change == "table":
        rows.table_id = "another"
    elif change == "codec":
        rows.row_codec = "int8"
    counting = counted(world)
    try:
        answer(world, prompt, salt="yours" if change == "salt" else "mine")
    finally:
        if change == "tokenizer":
            core._tokenizer.hash = before
    assert store.stats.queries["blocks"] > 0
    assert counting.num_restored == (56 if change == "nothing" else 0)
    assert store.stats.hits.total() == (7 if change == "nothing" else 0)


# -- faults --------------------------------------------------------------------------------------


def test_a_flipped_bit_is_a_miss_and_a_counter_never_a_wrong_token(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    prompt = random_prompt(7, 100)
    first = make_world(dict_table, store=restarts.open())
    cold = facts(answer(first, prompt))
    block_id = first.core.state.pool.find(block_hashes(first, prompt))[5]
    payload = first.runner.block(block_id).numpy().tobytes()
    assert restarts.flip_bits(payload[:512]) >= 1
    store = restarts.open()
    world = make_world(dict_table, store=store)
    counting = counted(world)
    assert facts(answer(world, prompt)) == cold
    assert counting.num_restored == 5 * BLOCK_SIZE
    assert store.stats.damaged["blocks", "checksum"] == 1
    again = make_world(dict_table, store=restarts.open())
    counting = counted(again)
    assert facts(answer(again, prompt)) == cold
    assert counting.num_restored == 96, "what was computed anew was kept again"


def block_hashes(world: World, prompt: list[int]) -> list[bytes]:
    seq = next(g.seq for run in world.runs for g in run.generations if run.request.input_ids == tuple(prompt))
    return seq.block_hashes


def test_values_that_are_not_finite_are_not_kept(make_world: MakeWorld, restarts: Restarts) -> None:
    store = restarts.open()
    world = make_world(store=store)
    write, kept = world.runner.block, []
    world.runner.block = lambda block_id: kept.append(block_id) or spoilt(write(block_id))  # type: ignore[method-assign,func-returns-value]
    answer(world, random_prompt(8, 40))
    assert len(kept) == 5
    assert store.stats.writes["blocks", "failed"] == 5
    assert store.stats.writes["blocks", "stored"] == 0


def spoilt(block: torch.Tensor) -> torch.Tensor:
    copy = block.clone()
    copy.view(torch.float32)[1, 2, 1, 3, 4] = torch.inf
    return copy


def test_a_full_queue_drops_and_nothing_else(make_world: MakeWorld, restarts: Restarts) -> None:
    store = restarts.open()
    store._writer._max_jobs = 3  # of a queue that nobody empties meanwhile
    release = threading.Event()
    inner, store._writer._sink.holds = store.holds, lambda name: release.wait(60) and inner(name)  # type: ignore[method-assign]
    world = make_world(store=store)
    prompt = random_prompt(9, 100)
    outcome = world.add(prompt, max_tokens=3)
    while world.core.has_work:
        world.step()
    assert len(outcome.tokens()) == 3, "no step waited for the writer"
    pool = world.core.state.pool
    assert 0 < world.core.recycler.saver.num_held == pool.num_blocks - pool.num_free <= 4  # type: ignore[union-attr]
    assert store.stats.writes["blocks", "dropped"] >= 8
    release.set()
    world.run()
    assert pool.num_free == pool.num_blocks


def test_of_a_small_cache_only_a_part_is_held_for_the_writer(
    make_world: MakeWorld, restarts: Restarts
) -> None:
    store = restarts.open()
    release = threading.Event()
    inner, store._writer._sink.holds = store.holds, lambda name: release.wait(60) and inner(name)  # type: ignore[method-assign]
    world = make_world(store=store, kv_cache_bytes=BLOCK_BYTES * 16)
    outcomes = [world.add(random_prompt(i, 100), max_tokens=3) for i in range(4)]
    for _ in range(500):
        world.step()
        assert world.core.recycler.saver.num_held <= 4  # type: ignore[union-attr]
    # At full length a sequence needs the whole cache, which is held in part: it ends when that is over.
    release.set()
    world.run()
    assert all(len(o.tokens()) == 3 for o in outcomes)


# -- what is kept --------------------------------------------------------------------------------


def test_an_answers_blocks_are_kept_once_a_prompt_begins_with_them(
    make_world: MakeWorld, restarts: Restarts
) -> None:
    store = restarts.open()
    world = make_world(store=store)
    prompt = random_prompt(15, 16)
    first = answer(world, prompt, max_tokens=40)
    assert kept(store) == 2
    conversation = prompt + first.tokens()[:-1] + [7]
    answer(world, conversation, max_tokens=1)
    assert kept(store) == len(conversation) // BLOCK_SIZE
    answer(world, conversation, max_tokens=1)
    assert kept(store) == len(conversation) // BLOCK_SIZE
    assert store.stats.writes["blocks", "held"] == 0, "nothing was handed over twice"


def test_sequences_of_one_request_keep_their_prompt_once(make_world: MakeWorld, restarts: Restarts) -> None:
    store = restarts.open()
    answer(make_world(store=store), random_prompt(16, 33), n=3)
    assert kept(store) == 4


def kept(store: RecycledStore) -> int:
    return next(u.num_entries for u in store.usage() if (u.kind, u.tier) == ("blocks", "disk"))
