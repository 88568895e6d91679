"""Whole-text results and states after a layer: the same answers for less, or nothing, computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scone.server.engine.recycled_results import pack_result, result_name, unpack_result
from scone.server.sequence import (
    Delta,
    GenerationRequest,
    PoolingParams,
    RequestUsage,
    SamplingParams,
    TokenLogprob,
)

from .conftest import World, random_prompt
from .dict_table import DictTable
from .recycled_world import MakeWorld, answer, counted, facts, num_cached
from .restarts import Restarts

PROMPT = random_prompt(1, 100)
SCORES = {"max_tokens": 0, "prompt_logprobs": 2, "logprobs": None}
QUESTIONS: list[dict[str, Any]] = [
    SCORES,
    {"max_tokens": 0, "prompt_logprobs": 0, "logprobs": None},
    {"max_tokens": 1, "prompt_logprobs": 1, "logprobs": 1},
    {"max_tokens": 1, "prompt_logprobs": 1, "logprobs": 1, "allowed_token_ids": (5, 70)},
    {"max_tokens": 0, "pooling": PoolingParams(kind="mean")},
    {"max_tokens": 0, "pooling": PoolingParams(kind="last")},
    {"max_tokens": 0, "pooling": PoolingParams(kind="mean", layer=0)},
    {"max_tokens": 0, "pooling": PoolingParams(kind="last", layer=2)},
]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_the_same_question_runs_no_forward_pass(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, question: dict[str, Any]
) -> None:
    cold = answer(make_world(dict_table), PROMPT, **question)
    first = answer(make_world(dict_table, store=restarts.open()), PROMPT, **question)
    store = restarts.open()
    world = make_world(dict_table, store=store)
    num_read = dict_table.num_read
    for tier in ("disk", "ram"):
        counting = counted(world)
        again = answer(world, PROMPT, **question)
        assert facts(again) == facts(first) == facts(cold)
        assert (counting.num_steps, counting.num_computed) == (0, 0)
        assert num_cached(again) == len(PROMPT)
        assert store.stats.hits["results", tier] == 1
    assert dict_table.num_read == num_read, "no row was read either"
    usages = [o.last().usage for o in (cold, again)]
    assert usages[0] is not None
    assert usages[1] is not None
    assert usages[1].num_matched_tokens == usages[0].num_matched_tokens
    assert usages[1].num_generated_tokens == usages[0].num_generated_tokens


@pytest.mark.parametrize(
    "question",
    [
        {"max_tokens": 1, "prompt_logprobs": 1, "temperature": 0.7, "seed": 3},
        {"max_tokens": 2, "prompt_logprobs": 1},
        {"max_tokens": 1, "prompt_logprobs": 1, "n": 2},
        {"max_tokens": 1},
    ],
    ids=str,
)
def test_what_the_text_does_not_determine_is_computed(
    make_world: MakeWorld, restarts: Restarts, question: dict[str, Any]
) -> None:
    store = restarts.open()
    world = make_world(store=store)
    answers = [facts(answer(world, PROMPT, **question)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert store.stats.hits["results", "ram"] == 0
    assert store.stats.bytes_written["results", "disk"] == 0


@pytest.mark.parametrize("change", ["ids", "salt", "kind", "layer", "num_top", "weights", "table"])
def test_another_question_is_computed(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts, change: str
) -> None:
    pooled = change in ("kind", "layer")
    question: dict[str, Any] = {"max_tokens": 0, "pooling": PoolingParams()} if pooled else SCORES
    other, prompt = dict(question), PROMPT
    if change == "ids":
        prompt = [*PROMPT[:-1], PROMPT[-1] + 1]
    elif change == "kind":
        other["pooling"] = PoolingParams(kind="last")
    elif change == "layer":
        other["pooling"] = PoolingParams(layer=1)
    elif change == "num_top":
        other["prompt_logprobs"] = 3
    elif change == "salt":
        other["salt"] = "mine"
    answer(make_world(dict_table, store=restarts.open()), PROMPT, **question)
    store = restarts.open()
    world = make_world(dict_table, store=store)
    assert world.input_rows is not None
    if change == "weights":
        world.core._model_hash = "another"
    elif change == "table":
        world.input_rows.table_id = "another"
    counting = counted(world)
    outcome = answer(world, prompt, **other)
    assert counting.num_steps > 0
    assert store.stats.hits["results", "disk"] == 0
    plain = {k: v for k, v in other.items() if k != "salt"}
    assert facts(outcome) == facts(answer(make_world(dict_table), prompt, **plain))


def test_a_flipped_bit_of_a_result_is_a_miss(make_world: MakeWorld, restarts: Restarts) -> None:
    question = {"max_tokens": 0, "pooling": PoolingParams()}
    first = answer(make_world(store=restarts.open()), PROMPT, **question)
    vector = first.last().embedding
    assert vector is not None
    assert restarts.flip_bits(vector.tobytes()[:64]) >= 1
    store = restarts.open()
    assert facts(answer(make_world(store=store), PROMPT, **question)) == facts(first)
    assert store.stats.damaged["results", "checksum"] == 1


@pytest.mark.parametrize(
    "delta",
    [
        Delta(
            index=0,
            text="é\n",
            token_ids=(9,),
            logprobs=(TokenLogprob(9, -1e-300, ((9, -1e-300), (2**31 - 1, -700.25))),),
            prompt_logprobs=(None, TokenLogprob(4, -0.1, ()), TokenLogprob(5, -1 / 3, ((5, -1 / 3),))),
            finish_reason="stop",
            stop_reason="é",
        ),
        Delta(index=0, finish_reason="length", prompt_logprobs=(None,)),
        Delta(index=0, finish_reason="length", logprobs=(), stop_reason=7),
        Delta(index=0, finish_reason="stop", embedding=np.array([1 / 3, -0.0, 1e-45], np.float32)),
    ],
    ids=lambda delta: delta.finish_reason,
)
def test_results_keep_every_bit(delta: Delta) -> None:
    payload = pack_result(delta)
    assert payload is not None
    usage = RequestUsage(num_prompt_tokens=1, num_generated_tokens=0)
    again = unpack_result(np.frombuffer(payload, np.uint8)).delta(usage)
    assert repr(again) == repr(replace(delta, usage=usage))


def test_what_is_not_finite_is_not_kept() -> None:
    assert pack_result(Delta(index=0, prompt_logprobs=(None, TokenLogprob(4, float("nan"))))) is None
    assert pack_result(Delta(index=0, embedding=np.array([np.inf], np.float32))) is None


def test_names_tell_questions_apart() -> None:
    requests = [
        GenerationRequest(
            request_id="x",
            input_ids=tuple(ids),
            pooling=pooling,
            sampling=SamplingParams(**{"max_tokens": 0} | sampling),
        )
        for ids in ([1, 2, 3], [1, 2, 3, 0], [2, 3])
        for pooling, sampling in (
            (PoolingParams(), {}),
            (PoolingParams(kind="last"), {}),
            (PoolingParams(layer=1), {}),
            (None, {"prompt_logprobs": 0}),
            (None, {"prompt_logprobs": 1}),
            (None, {"prompt_logprobs": 1, "max_tokens": 1, "temperature": 0.0}),
            (None, {"prompt_logprobs": 1, "max_tokens": 1, "temperature": 0.0, "stop": ("a",)}),
        )
    ]
    names = [result_name(request, root) for root in (b"r" * 32, b"s" * 32) for request in requests]
    assert None not in names
    assert len(set(names)) == len(names)
    seeded = replace(requests[5], sampling=replace(requests[5].sampling, seed=4))
    assert result_name(seeded, b"r" * 32) == names[5], "a greedy answer knows no seed"


# -- states after a layer ------------------------------------------------------------------------


class Layers:
    """Counts the layers that each token goes through."""

    def __init__(self, world: World) -> None:
        self.num_token_layers = 0
        forward = world.runner.forward

        def counting(chunks: Any, embeddings: Any, layers: Any) -> Any:
            end = 3 if layers.end is None else layers.end
            self.num_token_layers += len(embeddings) * (end - layers.first)
            return forward(chunks, embeddings, layers)

        world.runner.forward = counting  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("lower", "upper", "num_layers"),
    [(1, 2, 1), (2, None, 1), (1, None, 2), (2, 2, 0), (2, 1, 1)],
)
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16}])
def test_a_second_head_runs_only_the_layers_above(
    make_world: MakeWorld,
    dict_table: DictTable,
    restarts: Restarts,
    lower: int,
    upper: int | None,
    num_layers: int,
    limits: dict[str, int],
) -> None:
    def head(kind: Any) -> dict[str, Any]:
        return {"max_tokens": 0, "pooling": PoolingParams(kind=kind, layer=upper)}

    expected = {
        kind: facts(answer(make_world(dict_table), PROMPT, **head(kind))) for kind in ("mean", "last")
    }
    first = make_world(dict_table, store=restarts.open(), **limits)
    answer(first, PROMPT, max_tokens=0, pooling=PoolingParams(layer=lower, kind="mean"))

    store = restarts.open()
    world = make_world(dict_table, store=store, **limits)
    layers, num_read = Layers(world), dict_table.num_read
    assert facts(answer(world, PROMPT, **head("last"))) == expected["last"]
    assert layers.num_token_layers == num_layers * len(PROMPT)
    is_useful = lower <= (upper or 3)
    assert store.stats.hits["layer_k", "disk"] == is_useful
    assert (dict_table.num_read == num_read) == is_useful, "rows are inputs of layers that are not run"

    # The upper layer's states were kept as well: another head on it, if it is not the very same question.
    store = restarts.open()
    world = make_world(dict_table, store=store, **limits)
    layers = Layers(world)
    assert facts(answer(world, PROMPT, **head("mean"))) == expected["mean"]
    assert layers.num_token_layers == (0 if upper is not None else num_layers * len(PROMPT))
    assert store.stats.hits["results" if lower == upper else "layer_k", "disk"] == 1


def test_second_heads_among_completions(
    make_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    prompts = [random_prompt(40 + i, 20 + 9 * i) for i in range(5)]
    head: dict[str, Any] = {"max_tokens": 0, "pooling": PoolingParams(layer=2)}
    plain = [facts(answer(make_world(dict_table), p, **head)) for p in prompts]
    written = [facts(answer(make_world(dict_table), p)) for p in prompts]
    first = make_world(dict_table, store=restarts.open())
    for prompt in prompts[:3]:
        answer(first, prompt, max_tokens=0, pooling=PoolingParams(layer=1))
    store = restarts.open()
    world = make_world(dict_table, store=store, max_num_batched_tokens=24)
    pooled = [world.add(p, **head) for p in prompts]
    completed = [world.add(p, max_tokens=6, logprobs=2) for p in prompts]
    world.run()
    assert [facts(o) for o in pooled] == plain
    assert [facts(o) for o in completed] == written
    assert store.stats.hits["layer_k", "disk"] == 3


def test_a_text_of_another_salt_shares_nothing(make_world: MakeWorld, restarts: Restarts) -> None:
    store = restarts.open()
    world = make_world(store=store)
    layers = Layers(world)
    for salt in ("a", "b"):
        answer(world, PROMPT, max_tokens=0, pooling=PoolingParams(layer=1), salt=salt)
    assert layers.num_token_layers == 2 * len(PROMPT)
    answer(world, PROMPT, max_tokens=0, pooling=PoolingParams(layer=2), salt="a")
    assert layers.num_token_layers == 3 * len(PROMPT)
