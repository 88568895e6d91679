"""The engine against an oracle that computes every sequence whole, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.kernels.extension import native
from scone.model_store.decoder import Decoder

from .conftest import World, naive_greedy, naive_logits, random_prompt
from .dict_table import DictTable

MakeWorld = Callable[..., World]


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"backend": "torch"},
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 8, "backend": "torch"},
        {"block_size": 1},
        {"block_size": 64},
    ],
)
def test_greedy_batch_equals_full_recompute(
    make_world: MakeWorld,
    tiny_decoder: Decoder,
    dict_table: DictTable,
    config: dict[str, int],
    with_table: bool,
) -> None:
    table = dict_table if with_table else None
    world = make_world(table, **config)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((1, 2, 7, 16, 17, 40, 63, 100))]
    outcomes = [world.add(p, max_tokens=12) for p in prompts]
    world.run()
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.tokens() == naive_greedy(tiny_decoder, prompt, 12, table)
    if table is not None:
        assert table.num_read > 100


def test_logprobs_equal_full_recompute(
    make_world: MakeWorld, tiny_decoder: Decoder, dict_table: DictTable
) -> None:
    world = make_world(dict_table)
    prompt = random_prompt(3, 50)
    for _ in range(2):  # the second time with a warm prefix cache
        outcome = world.add(prompt, max_tokens=6, logprobs=3, prompt_logprobs=2)
        world.run()
        ids = prompt + outcome.tokens()
        expected = naive_logits(tiny_decoder, ids, dict_table).log_softmax(-1)
        first = outcome.deltas[0][0].prompt_logprobs
        assert first is not None
        assert first[0] is None
        scored = [*first[1:], *(p for d in outcome.deltas[0] for p in d.logprobs or ())]
        assert len(scored) == len(ids) - 1
        for position, logprob in enumerate(scored):
            assert logprob is not None
            assert logprob.token_id == ids[position + 1]
            assert logprob.logprob == pytest.approx(float(expected[position, ids[position + 1]]), abs=1e-4)
            best = expected[position].topk(2).indices.tolist()
            assert [t for t, _ in logprob.top[:2]] == best
        assert all(d.prompt_logprobs is None for d in outcome.deltas[0][1:])


def test_prefix_cache_is_used_and_changes_nothing(make_world: MakeWorld, dict_table: DictTable) -> None:
    prompt = random_prompt(4, 60)
    world = make_world(dict_table)
    cold = world.add(prompt, max_tokens=8)
    world.run()
    warm = world.add(prompt, max_tokens=8)
    salted = world.add(prompt, max_tokens=8, salt="other")
    world.run()
    assert cold.tokens() == warm.tokens() == salted.tokens()
    usages = [o.last().usage for o in (cold, warm, salted)]
    assert [u.num_cached_tokens for u in usages if u is not None] == [0, 56, 0]
    assert all(u is not None and u.num_matched_tokens == usages[0].num_matched_tokens for u in usages)  # type: ignore[union-attr]


def test_preemption_changes_nothing(
    make_world: MakeWorld, tiny_decoder: Decoder, dict_table: DictTable
) -> None:
    block_bytes = tiny_decoder.config.kv_values_per_token * 4 * 8
    world = make_world(dict_table, kv_cache_bytes=block_bytes * 16)
    prompts = [random_prompt(seed, 20) for seed in range(6)]
    outcomes = [world.add(p, max_tokens=60, temperature=1.0, seed=5) for p in prompts]
    runs = [g for run in world.runs for g in run.generations]
    world.run()
    assert sum(g.seq.num_preemptions for g in runs) > 0
    alone = make_world(dict_table)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        again = alone.add(prompt, max_tokens=60, temperature=1.0, seed=5)
        alone.run()
        assert again.tokens() == outcome.tokens()


@pytest.mark.parametrize("num_blocks", [16, 64])
def test_n_sequences_share_the_prompt(make_world: MakeWorld, dict_table: DictTable, num_blocks: int) -> None:
    block_bytes = 3 * 2 * 2 * 16 * 4 * 8
    world = make_world(dict_table, kv_cache_bytes=block_bytes * num_blocks)
    prompt = random_prompt(6, 45)
    many = world.add(prompt, n=5, max_tokens=20, temperature=1.0, seed=100)
    world.run()
    assert len(many.deltas) == 5
    assert len({tuple(many.tokens(i)) for i in range(5)}) == 5
    for index in range(5):
        alone = make_world(dict_table)
        one = alone.add(prompt, max_tokens=20, temperature=1.0, seed=100 + index)
        alone.run()
        assert one.tokens() == many.tokens(index)


def test_more_sequences_than_seats(make_world: MakeWorld) -> None:
    world = make_world(None, max_num_seqs=2)
    outcome = world.add(random_prompt(1, 9), n=5, max_tokens=4)
    world.run()
    assert all(outcome.tokens(i) == outcome.tokens(0) for i in range(5))


def test_a_failed_read_ends_its_request_only(make_world: MakeWorld, dict_table: DictTable) -> None:
    healthy = [random_prompt(seed, 30, high=7) for seed in range(3)]
    expected = []
    for prompt in healthy:
        world = make_world(dict_table)
        expected.append(world.add(prompt, max_tokens=10))
        world.run()
    bad = [3, 4, 11, 10, 9, 11, 10, 9]
    dict_table.broken = {dict_table.longest(bad[: i + 1]) for i in range(len(bad))} - {-1}
    good_ids = {dict_table.longest(p[: i + 1]) for p in healthy for i in range(len(p))}
    dict_table.broken -= good_ids
    assert dict_table.broken
    world = make_world(dict_table)
    outcomes = [world.add(p, max_tokens=10) for p in healthy]
    failing = world.add(bad, n=2, max_tokens=10)
    world.run()
    for index in range(2):
        assert failing.last(index).finish_reason == "error"
        assert "cannot be read" in (failing.last(index).error or "")
    for outcome, alone in zip(outcomes, expected, strict=True):
        if outcome.last().finish_reason != "error":  # a generated token may have met a broken row
            assert outcome.tokens() == alone.tokens()
    assert any(o.last().finish_reason == "length" for o in outcomes)


def test_decode_rows_that_fail_are_read_again_alone(make_world: MakeWorld, tiny_decoder: Decoder) -> None:
    prompts = [random_prompt(seed, 10, high=200) for seed in range(4)]
    followers = [naive_greedy(tiny_decoder, p, 1)[0] for p in prompts]
    rows: dict[tuple[int, ...], Tensor] = {
        (p[-1], t): torch.zeros(tiny_decoder.config.dim) for p, t in zip(prompts, followers, strict=True)
    }
    assert len(rows) == 4
    table = DictTable(rows, tiny_decoder.config.dim)
    table.broken = {2}
    world = make_world(table)
    outcomes = [world.add(p, max_tokens=5) for p in prompts]
    world.run()
    assert [o.last().finish_reason for o in outcomes] == ["length", "length", "error", "length"]


@pytest.mark.parametrize("slow", [None, set()], ids=["disk", "memory"])
def test_a_failed_match_ends_its_request_only(
    make_world: MakeWorld, dict_table: DictTable, slow: set[int] | None
) -> None:
    match_newest = dict_table.match_newest

    def damaged(sequences: list[list[int]], *out: Any) -> int:
        if any(5 in tokens for tokens in sequences):
            raise RowReadError("the index is damaged")
        return match_newest(sequences, *out)

    dict_table.match_newest = damaged  # type: ignore[method-assign, assignment]
    dict_table.slow = slow
    world = make_world(dict_table)
    good = world.add([6, 7], max_tokens=6, allowed_token_ids=(6, 7))
    bad = world.add([4, 5], max_tokens=6)
    world.run()
    assert len(good.tokens()) == 6
    assert (bad.last().finish_reason, bad.last().error) == ("error", "the index is damaged")


def test_waiting_for_rows_delays_only_those_who_wait(make_world: MakeWorld, dict_table: DictTable) -> None:
    world = make_world(dict_table)
    dict_table.is_held = True
    plain = world.add([200, 201, 202], max_tokens=5, allowed_token_ids=(210,))  # nothing ever matches
    waiting = world.add(random_prompt(1, 30), max_tokens=5)
    for _ in range(10):
        world.core.step()
    assert plain.last().finish_reason == "length"
    assert waiting.deltas == {}
    assert world.core.step() is False
    dict_table.is_held = False
    world.run()
    assert waiting.last().finish_reason == "length"


@pytest.mark.parametrize("num_steps", range(6))
def test_abort_in_every_state(make_world: MakeWorld, dict_table: DictTable, num_steps: int) -> None:
    world = make_world(dict_table, max_num_batched_tokens=16, max_num_seqs=3)
    dict_table.is_held = num_steps == 1
    outcomes = [world.add(random_prompt(seed, 40), n=2, max_tokens=50) for seed in range(4)]
    for _ in range(num_steps):
        world.core.step()
    for run in world.runs:
        world.core.abort(run)
        world.core.abort(run)
    assert not world.core.has_work
    world.run()
    assert all(o.last(i).finish_reason == "abort" for o in outcomes for i in range(2))


def test_not_finite_logits_end_their_request_and_poison_nothing(
    make_world: MakeWorld, tiny_decoder: Decoder
) -> None:
    prompt = random_prompt(8, 30)
    table = DictTable(
        {tuple(prompt[3:6]): torch.full((tiny_decoder.config.dim,), torch.nan)}, tiny_decoder.config.dim
    )
    world = make_world(table)
    good = world.add(random_prompt(9, 30), max_tokens=5)
    bad = world.add(prompt, max_tokens=5)
    world.run()
    assert bad.last().finish_reason == "error"
    assert good.tokens() == naive_greedy(tiny_decoder, random_prompt(9, 30), 5)
    world.input_rows = None  # the same prompt, with nothing left of the broken run's keys
    again = world.add(prompt, max_tokens=5)
    world.run()
    assert again.tokens() == naive_greedy(tiny_decoder, prompt, 5)


def test_a_receiver_that_raises_ends_its_request_only(make_world: MakeWorld) -> None:
    world = make_world()
    good = world.add([5, 6], max_tokens=5)
    bad = world.add([5, 6], n=2, max_tokens=5)

    def explode(delta: object) -> None:
        raise RuntimeError("receiver")

    world.runs[1].on_delta = explode
    world.run()
    assert len(good.tokens()) == 5
    assert bad.deltas == {}


def test_a_batch_of_best_tokens_takes_those_of_all_logits(make_world: MakeWorld) -> None:
    """Where all sequences are greedy no logits are made; beside one that draws, they are made for all."""
    world = make_world()
    prompts = [random_prompt(seed, 9 + seed) for seed in range(4)]
    alone = [world.add(prompt, max_tokens=12) for prompt in prompts]
    world.run()
    beside = [world.add(prompt, max_tokens=12) for prompt in prompts]
    world.add(prompts[0], max_tokens=12, temperature=1.0, seed=3)
    world.run()
    assert [o.tokens() for o in alone] == [o.tokens() for o in beside]


def test_allowed_token_ids_only(make_world: MakeWorld) -> None:
    world = make_world()
    free = world.add([5, 6, 7], max_tokens=4)
    outcome = world.add(
        [5, 6, 7], max_tokens=20, temperature=1.5, seed=3, allowed_token_ids=(50, 60, 70), logprobs=5
    )
    world.run()
    assert set(outcome.tokens()) <= {50, 60, 70}
    assert len(free.tokens()) == 4
    for delta in outcome.deltas[0]:
        assert delta.logprobs is not None
        assert {t for t, _ in delta.logprobs[0].top} == {50, 60, 70}
        assert math.fsum(math.exp(p) for _, p in delta.logprobs[0].top) == pytest.approx(1, abs=1e-5)


def test_ends(make_world: MakeWorld, tiny_decoder: Decoder) -> None:
    prompt = random_prompt(10, 12)
    tokens = naive_greedy(tiny_decoder, prompt, 10)
    stop_id = next(t for i, t in enumerate(tokens) if t not in tokens[:i] and i > 2)
    at = tokens.index(stop_id)
    world = make_world()
    by_id = world.add(prompt, max_tokens=10, stop_token_ids=(stop_id,))
    biased_to_eos = world.add(prompt, max_tokens=10, logit_bias={2: 100.0}, ignore_eos=False)
    at_least = world.add(prompt, max_tokens=10, logit_bias={2: 100.0}, ignore_eos=False, min_tokens=4)
    nothing = world.add(prompt, max_tokens=0, prompt_logprobs=0)
    full = world.add(random_prompt(11, 120), max_tokens=100)
    world.run()
    assert by_id.tokens() == tokens[: at + 1]
    assert by_id.last().finish_reason == "stop"
    assert by_id.last().stop_reason == stop_id
    assert biased_to_eos.tokens() == [2]
    assert (biased_to_eos.last().finish_reason, biased_to_eos.last().stop_reason) == ("stop", None)
    assert len(at_least.tokens()) == 5
    assert 2 not in at_least.tokens()[:4]
    assert nothing.tokens() == []
    assert nothing.last().finish_reason == "length"
    assert len(nothing.last().prompt_logprobs or ()) == 12
    assert len(full.tokens()) == 8
    assert full.last().finish_reason == "length"


@pytest.mark.skipif(native is None, reason="the native extension was not built")
@pytest.mark.parametrize("quantization", ["none", "bfloat16", "int8", "int4"])
def test_deterministic_mode(make_world: MakeWorld, dict_table: DictTable, quantization: str) -> None:
    """The same bits alone, in a batch, cold, warm, chunked, preempted and forked."""
    settings: dict[str, Any] = {"deterministic": True, "quantization": quantization}
    wanted: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 3, "logprobs": 4}
    prompts = [random_prompt(seed, 10 + 9 * seed) for seed in range(6)]

    def answers(world: World, n: int = 1) -> list[tuple[list[int], list[float]]]:
        outcomes = [world.add(p, n=n, **wanted) for p in prompts]
        world.run()
        return [(o.tokens(), o.logprobs()) for o in outcomes]

    alone = []
    for prompt in prompts:
        world = make_world(dict_table, **settings)
        outcome = world.add(prompt, **wanted)
        world.run()
        alone.append((outcome.tokens(), outcome.logprobs()))
    world = make_world(dict_table, **settings)
    assert answers(world) == alone  # together, cold
    assert answers(world) == alone  # together, warm
    assert answers(make_world(dict_table, max_num_batched_tokens=9, block_size=4, **settings)) == alone
    small = make_world(dict_table, kv_cache_bytes=3 * 2 * 2 * 16 * 4 * 8 * 17, **settings)
    assert answers(small) == alone
    assert any(g.seq.num_preemptions for run in small.runs for g in run.generations)
    assert answers(make_world(dict_table, num_threads=3, **settings), n=3) == alone
