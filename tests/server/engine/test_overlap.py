"""A step delivered while the next one runs gives every client what it gets from steps delivered in order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from scone.cache.device import Event
from scone.cache.sim_device import SimDevice
from scone.model_store.decoder import Decoder
from scone.server.sequence import Delta

from .conftest import Outcome, World, random_prompt
from .dict_table import DictTable

MakeWorld = Callable[..., World]


def overlapped(world: World, *, is_overlapped: bool = True) -> World:
    """As on a device that computes beside the host."""
    world.runner.is_asynchronous = is_overlapped
    return world


def told(outcome: Outcome) -> dict[int, list[Delta]]:
    """Each sequence's deltas, without what depends on when a request was begun."""
    when: dict[str, Any] = {"queue_seconds": 0.0, "time_to_first_token_seconds": 0.0, "num_cached_tokens": 0}
    return {
        index: [d if d.usage is None else replace(d, usage=replace(d.usage, **when)) for d in deltas]
        for index, deltas in outcome.deltas.items()
    }


def drawn_request(draw: random.Random) -> dict[str, Any]:
    """Something of everything that a request can ask of its tokens."""
    params: dict[str, Any] = {
        "n": draw.choice((1, 1, 3)),
        "max_tokens": draw.choice((0, 1, 2, 9, 25)),
        "temperature": draw.choice((0.0, 0.0, 0.8, 1.5)),
        "seed": draw.randrange(1000),
        "ignore_eos": draw.random() < 0.5,
        "min_tokens": draw.choice((0, 0, 2)),
        "logprobs": draw.choice((None, None, 0, 2)),
        "prompt_logprobs": draw.choice((None, None, None, 1)),
        "frequency_penalty": draw.choice((0.0, 0.0, 0.5)),
        "stop": tuple(map(chr, draw.sample(range(33, 127), draw.choice((0, 12, 50))))),
        "allowed_token_ids": draw.choice((None, tuple(range(3 + 33, 3 + 127)))),  # printable characters
        "include_stop_str_in_output": draw.random() < 0.3,
    }
    if draw.random() < 0.3:
        params["stop_token_ids"] = tuple(draw.sample(range(3 + 33, 3 + 127), 12))
    params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
    return params


def answers(world: World, seed: int) -> list[dict[int, list[Delta]]]:
    """Of requests that come now and then, twice, so that the second ones find a warm prefix cache."""
    draw = random.Random(seed)
    outcomes = []
    for _ in range(2):
        for _ in range(9):
            prompt = random_prompt(draw.randrange(4), draw.choice((3, 20, 50)))
            outcomes.append(world.add(prompt, **drawn_request(draw)))
            for _ in range(draw.randrange(4)):
                world.step()
        world.run()
    return [told(outcome) for outcome in outcomes]


@pytest.mark.parametrize("num_blocks", [18, 64], ids=["preempting", "roomy"])
@pytest.mark.parametrize("seed", range(6))
def test_all_that_clients_get_is_the_same(
    make_world: MakeWorld, tiny_decoder: Decoder, dict_table: DictTable, seed: int, num_blocks: int
) -> None:
    block_bytes = tiny_decoder.config.kv_values_per_token * 4 * 8
    dict_table.slow = None if seed % 2 else set()
    expected, got = (
        answers(
            overlapped(
                make_world(dict_table, kv_cache_bytes=block_bytes * num_blocks), is_overlapped=is_overlapped
            ),
            seed,
        )
        for is_overlapped in (False, True)
    )
    assert got == expected
    reasons = {d[-1].finish_reason for answer in got for d in answer.values()}
    assert reasons == {"stop", "length"}
    assert any(isinstance(d[-1].stop_reason, str) for answer in got for d in answer.values())


class WatchedDevice(SimDevice):
    """Says when the host waits."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(seed=0)
        self._log = log

    def synchronize(self, event: Event) -> None:
        self._log.append("wait")
        super().synchronize(event)


def test_a_step_is_told_while_the_next_one_runs(make_world: MakeWorld) -> None:
    log: list[str] = []
    world = make_world(None, WatchedDevice(log))
    forward = world.runner.forward

    def launched(*args: Any) -> torch.Tensor:
        log.append("launch")
        return forward(*args)

    world.runner.forward = launched  # type: ignore[method-assign, assignment]
    world.core.after_deliveries = lambda: log.append("told")
    world.add([5, 6, 7], max_tokens=4)
    world.run()
    # The first token at once, since it is waited for most; the last when nothing runs any more.
    assert "".join(entry[0] for entry in log) == "lwt" + "lw" + "ltw" + "ltw" + "t"


@pytest.mark.parametrize("num_tokens", [6, 7, 8, 9])
def test_a_stop_string_at_the_edge_of_a_block(make_world: MakeWorld, num_tokens: int) -> None:
    """The step that it is found in computes one token more, whose keys and values may fill a block."""
    in_order, beside = (overlapped(make_world(), is_overlapped=i) for i in (False, True))
    allowed = tuple(range(3 + 97, 3 + 123))
    prompt = random_prompt(1, 9)
    results = []
    for world in (in_order, beside):
        free = world.add(prompt, max_tokens=30, allowed_token_ids=allowed, temperature=1.0, seed=4)
        world.run()
        text = free.text()
        end = next(i for i in range(num_tokens, 30) if text[i] not in text[:i])
        stopped = world.add(
            prompt,
            max_tokens=30,
            allowed_token_ids=allowed,
            temperature=1.0,
            seed=4,
            stop=(text[end],),
            logprobs=0,
        )
        world.run()
        assert stopped.text() == text[:end]
        assert stopped.tokens() == free.tokens()[: end + 1]
        usage = stopped.last().usage
        assert usage is not None
        assert (usage.num_generated_tokens, len(stopped.logprobs())) == (end + 1, end + 1)
        # what the cache now holds of it is right: the answer goes on from there as it did
        again = world.add(
            prompt + free.tokens()[: end + 2],
            max_tokens=5,
            allowed_token_ids=allowed,
            temperature=0.0,
            logprobs=0,
        )
        world.run()
        results.append((told(stopped), again.tokens(), again.logprobs()))
    assert results[0] == results[1]


@pytest.mark.parametrize("num_steps", range(1, 6))
def test_an_abort_comes_after_what_was_generated(make_world: MakeWorld, num_steps: int) -> None:
    """Between a step and its delivery: the client gets the step's tokens, and its usage counts these."""
    outcomes = []
    for is_overlapped in (False, True):
        world = overlapped(make_world(), is_overlapped=is_overlapped)
        aborted = world.add([5, 6, 7], n=2, max_tokens=40, temperature=1.0, seed=1)
        other = world.add([8, 9], max_tokens=12)
        for _ in range(num_steps):
            world.step()
        world.core.abort(world.runs[0])
        assert aborted.last(0).finish_reason == aborted.last(1).finish_reason == "abort"
        world.run()
        outcomes.append((told(aborted), told(other)))
    assert outcomes[0] == outcomes[1]
    usage = aborted.last().usage
    assert usage is not None
    assert usage.num_generated_tokens == len(aborted.tokens()) == num_steps


def test_what_failed_comes_after_what_was_generated(make_world: MakeWorld) -> None:
    """A step that fails ends its sequences; what the step before it made is told first."""
    world = overlapped(make_world())
    outcomes = [world.add([5, 6, seed], max_tokens=9) for seed in range(3, 6)]
    for _ in range(4):
        world.step()
    assert [len(o.tokens()) for o in outcomes] == [3, 3, 3], "the fourth step's are still to be told"
    forward = world.runner.forward

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    world.runner.forward = fail  # type: ignore[method-assign, assignment]
    world.step()
    assert [len(o.tokens()) for o in outcomes] == [4, 4, 4]
    assert {o.last().finish_reason for o in outcomes} == {"error"}
    usages = [o.last().usage for o in outcomes]
    assert [usage and usage.num_generated_tokens for usage in usages] == [4, 4, 4]
    world.runner.forward = forward  # type: ignore[method-assign]
    again = world.add([5, 6, 3], max_tokens=9)
    world.run()
    assert again.tokens()[:4] == outcomes[0].tokens()
    assert len(again.tokens()) == 9


def test_an_unreadable_row_comes_after_what_was_generated(
    make_world: MakeWorld, dict_table: DictTable
) -> None:
    """A row that is found to be damaged when a step lays it."""
    expected: list[dict[int, list[Delta]]] = []
    got: list[dict[int, list[Delta]]] = []
    for is_overlapped, outcomes in ((False, expected), (True, got)):
        dict_table.slow, dict_table.broken = set(), set()
        world = overlapped(make_world(dict_table), is_overlapped=is_overlapped)
        added = [
            world.add(random_prompt(seed, 20), max_tokens=30, allowed_token_ids=tuple(range(3, 12)))
            for seed in range(5)
        ]
        for _ in range(3):
            world.step()
        rows = world.runs[0].generations[0]
        newest = [dict_table.longest(rows.seq.token_ids[: i + 1]) for i in range(len(rows.seq.token_ids))]
        dict_table.broken = set(range(len(dict_table.fgrams()))) - set(newest)
        world.run()
        outcomes += [told(outcome) for outcome in added]
    assert got == expected
    assert any(d[0][-1].finish_reason == "error" for d in got)


def test_a_receiver_that_raises_late_ends_its_request_only(make_world: MakeWorld) -> None:
    world = overlapped(make_world())
    good = world.add([5, 6], max_tokens=9)
    bad = world.add([5, 6], n=2, max_tokens=9, temperature=1.0, seed=2)
    receive = world.runs[1].on_delta

    def explode(delta: Delta) -> None:
        if len(bad.tokens()) == 5 and delta.finish_reason is None:
            raise RuntimeError("receiver")
        receive(delta)

    world.runs[1].on_delta = explode
    world.run()
    assert len(good.tokens()) == 9
    assert bad.last(0).finish_reason == bad.last(1).finish_reason == "abort"


def test_text_that_cannot_be_made_ends_its_request_only(make_world: MakeWorld) -> None:
    """Also where the token ends the sequence, which has given back its blocks by then."""
    for max_tokens in (2, 5):
        world = overlapped(make_world())
        good = world.add([5, 6], max_tokens=5)
        bad = world.add([5, 6], n=2, max_tokens=max_tokens)
        world.step()
        for generation in world.runs[1].generations:
            generation.detokenizer.append = None  # type: ignore[method-assign, assignment]
        world.run()
        assert len(good.tokens()) == 5
        assert bad.last(0).finish_reason == bad.last(1).finish_reason == "error"


def test_a_stopped_sequence_whose_last_step_is_not_finite_is_not_found_again(make_world: MakeWorld) -> None:
    world = overlapped(make_world(block_size=4))
    prompt = random_prompt(1, 10)
    free = world.add(prompt, max_tokens=8, allowed_token_ids=tuple(range(100, 120)))
    world.run()
    text = free.text()
    stopped = world.add(prompt, max_tokens=8, allowed_token_ids=tuple(range(100, 120)), stop=(text[1],))
    logits_of, num_calls = world.runner.logits_of, 0

    def poisoned(hidden: torch.Tensor, token_ids: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        logits = logits_of(hidden, token_ids)
        if num_calls == text.index(text[1]) + 2:  # the step after that of the stop string
            logits[:] = torch.nan
        return logits

    world.runner.logits_of = poisoned  # type: ignore[method-assign]
    world.run()
    assert stopped.last().finish_reason == "stop"
    assert num_calls == text.index(text[1]) + 2
    assert not world.core.state.pool.find(world.runs[1].generations[0].seq.block_hashes)
