"""Blocks kept as the inputs of layers: half the bytes, the same answers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scone.cache.recycled_record import state_key
from scone.model_store.decoder import Decoder
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.tokenizer import Tokenizer
from scone.server import recycled_benchmark
from scone.server.recycled_benchmark import RecycledBenchmark

from .conftest import hidden_form, random_prompt
from .dict_table import DictTable
from .hidden_world import KV_BYTES, STATE_BYTES, blocks_on_disk
from .recycled_world import BLOCK_SIZE, MakeWorld, answer, counted, facts, num_cached
from .restarts import RAM_BYTES, Restarts


def test_cold_memory_ram_disk_and_restart_give_the_same_bits(
    make_hidden_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    prompt = random_prompt(1, 100)
    cold = facts(answer(make_hidden_world(dict_table, recycled_blocks="kv"), prompt))
    store = restarts.open()
    first = make_hidden_world(dict_table, store=store)
    for expected in (0, 96):
        outcome = answer(first, prompt)
        assert (facts(outcome), num_cached(outcome)) == (cold, expected)
    number, num_bytes = blocks_on_disk(store)
    assert number == 12
    assert 12 * STATE_BYTES <= num_bytes < 12 * (STATE_BYTES + 64), "half of keys and values, and token ids"
    for ram_bytes, hits in ((RAM_BYTES, {"disk": 12, "ram": 12}), (0, {"disk": 24, "ram": 0})):
        store = restarts.open(ram_bytes)
        for _ in range(2):
            world = make_hidden_world(dict_table, store=store)
            counting = counted(world)
            restored = answer(world, prompt)
            assert (facts(restored), num_cached(restored)) == (cold, 96)
            assert (counting.num_restored, counting.num_computed) == (96, 100 - 96 + 5)
        assert {tier: store.stats.hits["blocks", tier] for tier in hits} == hits
        assert store.stats.writes["blocks", "stored"] == 0, "what is there already is not written again"


@pytest.mark.parametrize(
    "shape",
    [
        {"architecture": "qwen2", "attention_bias": True, "num_kv_heads": 4},
        {"architecture": "qwen3", "qk_norm": True, "head_dim": 32},  # grouped queries, but large heads
    ],
)
def test_a_hugging_face_folder_in_other_chunks_and_batches(
    random_decoder: Callable[..., Decoder],
    byte_tokenizer: Tokenizer,
    tmp_path: Path,
    shape: dict[str, Any],
) -> None:
    decoder = random_decoder(vocab_size=40_000, max_position=2048, **shape)
    save_hf_folder(tmp_path / "model", decoder, byte_tokenizer)
    benchmark = RecycledBenchmark(str(tmp_path / "model"), tmp_path)
    identity = benchmark.identity(12, "native", "hidden")
    assert identity["tokens_computed"]["restored"] < identity["tokens_computed"]["first"] / 2
    for where in ("first", "memory", "restarted"):
        assert identity[where]["answers_that_differ"] == 0


def test_the_benchmark_restores_in_either_form(
    random_decoder: Callable[..., Decoder],
    byte_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recycled_benchmark, "PACED_SPEEDS", (10_000_000,))
    decoder = random_decoder(num_kv_heads=4, vocab_size=40_000, max_position=2048)
    save_hf_folder(tmp_path / "model", decoder, byte_tokenizer)
    benchmark = RecycledBenchmark(str(tmp_path / "model"), tmp_path)
    measured = benchmark.first_token(1)
    paced = benchmark.paced(1)
    assert list(measured) == list(paced) == ["kv", "hidden"]
    for form, speeds in paced.items():
        assert speeds[10_000_000] >= measured[form]["state_bytes"] / 10_000_000
    assert (
        measured["kv"]["state_bytes"]
        == 1488 * KV_BYTES // BLOCK_SIZE
        == 2 * measured["hidden"]["state_bytes"]
    )
    for form in measured.values():
        assert form["tokens_computed"] == {
            "computed": [1501],
            "memory": [13],
            "disk": [13],
            "page_cache": [13],
        }
    assert measured["hidden"]["seconds_making_keys_and_values"] > 0
    assert "a token takes 1,536 bytes as keys and values in float32" in benchmark.choice()


def test_many_prompts_in_small_chunks_and_few_blocks(
    make_hidden_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    """Shared beginnings, chunks within blocks, batches, preemption while computing or restoring."""
    shared = random_prompt(4, 40)
    prompts = [shared[: 8 * (i % 5)] + random_prompt(50 + i, 5 + 3 * i) for i in range(12)]
    expected = [
        facts(answer(make_hidden_world(dict_table, recycled_blocks="kv"), p, max_tokens=20)) for p in prompts
    ]
    limits: list[dict[str, int]] = [
        {"max_num_batched_tokens": 11, "kv_cache_bytes": KV_BYTES * 16},
        {"max_num_batched_tokens": 16, "max_num_seqs": 3},
        {"kv_cache_bytes": KV_BYTES * 20, "max_num_seqs": 12},
    ]
    for some, limit in zip((prompts, prompts[::2], prompts[1::2]), limits, strict=True):
        for each in ({}, limit):
            world = make_hidden_world(dict_table, store=restarts.open(0), **each)
            outcomes = [world.add(p, max_tokens=20, logprobs=2) for p in some]
            world.run()
            assert [facts(o) for o in outcomes] == [expected[prompts.index(p)] for p in some]
    for limit in limits:
        world = make_hidden_world(dict_table, store=restarts.open(0), **limit)
        counting = counted(world)
        outcomes = [world.add(p, max_tokens=20, logprobs=2) for p in prompts]
        world.run()
        assert [facts(o) for o in outcomes] == expected
        assert counting.num_restored > 50


def test_forms_lie_side_by_side(make_hidden_world: MakeWorld, restarts: Restarts) -> None:
    """A chain of keys and values, then of hidden states; whoever comes later restores both."""
    prompt = random_prompt(3, 100)
    cold = facts(answer(make_hidden_world(recycled_blocks="kv"), prompt))
    answer(make_hidden_world(recycled_blocks="kv", store=restarts.open()), prompt[:41])
    store = restarts.open()
    assert facts(answer(make_hidden_world(store=store), prompt)) == cold
    assert store.stats.queries["blocks"] == 12, "of each block, in whichever form"
    number, num_bytes = blocks_on_disk(store)
    assert (number, round(num_bytes / STATE_BYTES, 1)) == (12, 5 * 2 + 7)
    for form in ("hidden", "kv", "auto"):
        store = restarts.open()
        world = make_hidden_world(recycled_blocks=form, store=store)
        counting = counted(world)
        assert facts(answer(world, prompt)) == cold
        assert counting.num_restored == 96
        assert store.stats.writes.total() == 0


def test_an_answers_blocks_are_kept_as_keys_and_values(
    make_hidden_world: MakeWorld, restarts: Restarts
) -> None:
    """Nobody keeps what goes into the layers of generated tokens; the chain has no gap for it."""
    prompt = random_prompt(15, 16)
    store = restarts.open()
    world = make_hidden_world(store=store)
    first = answer(world, prompt, max_tokens=40)
    assert blocks_on_disk(store)[0] == 2
    conversation = prompt + first.tokens()[:-1] + random_prompt(16, 30)
    cold = facts(answer(make_hidden_world(), conversation))
    assert facts(answer(world, conversation)) == cold
    number, num_bytes = blocks_on_disk(store)
    num_answered = len(prompt + first.tokens()[:-1]) // BLOCK_SIZE - 2
    assert number == len(conversation) // BLOCK_SIZE
    assert round(num_bytes / STATE_BYTES, 1) == number + num_answered
    world = make_hidden_world(store=restarts.open())
    counting = counted(world)
    assert facts(answer(world, conversation)) == cold
    assert counting.num_restored == (len(conversation) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_only_what_the_store_lacks_is_kept(make_hidden_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(18, 60)
    answer(make_hidden_world(store=restarts.open()), prompt[:40])
    world = make_hidden_world(store=restarts.open(), max_num_batched_tokens=16)
    kept: list[list[int]] = []
    forward = world.runner.forward

    def noting(chunks: Any, *rest: Any) -> Any:
        kept.append([block for c in chunks for block in c.seq.state_slots])
        return forward(chunks, *rest)

    world.runner.forward = noting  # type: ignore[method-assign,assignment]
    answer(world, prompt)
    assert {block for step in kept for block in step} == {5, 6}
    kept.clear()
    answer(world, prompt)
    assert not any(kept)


def test_any_mixture_with_any_gaps_gives_the_same_answers(
    make_hidden_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    """Engines of either form on one store, from which states vanish in between."""
    rng = random.Random(0)
    stem = random_prompt(30, 60)
    prompts = [stem[: rng.randint(0, 60)] + random_prompt(31 + i, rng.randint(5, 40)) for i in range(6)]
    expected = [facts(answer(make_hidden_world(dict_table), p, max_tokens=12)) for p in prompts]
    num_restored = 0
    for _ in range(16):
        store = restarts.open(rng.choice([0, RAM_BYTES]))
        limits = rng.choice([{}, {"max_num_batched_tokens": 13}, {"kv_cache_bytes": KV_BYTES * 18}])
        world = make_hidden_world(
            dict_table, rng.choice(["kv", "hidden", "hidden", "auto"]), store=store, **limits
        )
        counting = counted(world)
        chosen = rng.sample(range(6), 3)
        outcomes = [world.add(prompts[i], max_tokens=12, logprobs=2) for i in chosen]
        world.run()
        assert [facts(o) for o in outcomes] == [expected[i] for i in chosen]
        num_restored += counting.num_restored
        assert store.flush(60)
        hashes = [h for run in world.runs for h in run.generations[0].seq.block_hashes]
        assert store._disk is not None
        for block_hash in rng.sample(hashes, len(hashes) // 8):
            for key in (block_hash, hidden_form(world).key(block_hash)):
                store._disk.discard(state_key("blocks", key))
    assert num_restored > 200


def test_memory_for_hidden_states_is_bounded(make_hidden_world: MakeWorld, restarts: Restarts) -> None:
    """While the writer stands still, blocks beyond a share of the cache are kept otherwise, then dropped."""
    store = restarts.open()
    release = threading.Event()
    inner, store._writer._sink.holds = store.holds, lambda name: release.wait(60) and inner(name)  # type: ignore[method-assign]
    world = make_hidden_world(store=store, kv_cache_bytes=KV_BYTES * 16)
    form = hidden_form(world)
    assert form.staging_bytes == (16 + 4) * STATE_BYTES
    outcomes = [world.add(random_prompt(i, 60), max_tokens=3) for i in range(4)]
    while any(not o.deltas or o.last().finish_reason is None for o in outcomes):
        world.step()
        assert form._computed.num_in_use <= 4
    assert store.stats.writes["blocks", "dropped"] > 0
    release.set()
    world.run()
    assert store.flush(60)
    number, num_bytes = blocks_on_disk(store)
    assert (number, round(num_bytes / STATE_BYTES, 1)) == (8, 4 + 4 * 2)


def test_others_are_delayed_by_little_at_a_time(make_hidden_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(19, 100)
    cold = facts(answer(make_hidden_world(store=restarts.open()), prompt))
    world = make_hidden_world(store=restarts.open())
    form = hidden_form(world)
    other = world.add([200, 201], max_tokens=100)
    while not other.deltas:
        world.step()
    form.work_seconds = 1.0  # by far more than a share of a step
    laid, lay = [], form.lay
    form.lay = lambda landings: (laid.append(len(landings)), lay(landings))[1]  # type: ignore[method-assign,func-returns-value]
    restored = world.add(prompt, max_tokens=6, logprobs=2)
    while not restored.deltas:
        world.step()
        time.sleep(0.001)
        form.work_seconds = 1.0
    assert laid == [1] * 12
    world.run()
    assert facts(restored) == cold
    assert len(other.tokens()) == 100
