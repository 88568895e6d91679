"""Embeddings against an oracle that computes each prompt whole and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scone.kernels.extension import native
from scone.model_store.decoder import CausalAttention, Decoder
from scone.server.sequence import PoolingParams

from .conftest import Outcome, World, naive_greedy, random_prompt
from .dict_table import DictTable

MakeWorld = Callable[..., World]
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((1, 2, 7, 16, 17, 40, 63, 128))]


def naive_embedding(
    decoder: Decoder, input_ids: Sequence[int], params: PoolingParams, table: DictTable | None
) -> NDArray[np.float32]:
    with torch.inference_mode():
        hidden = decoder.embed(torch.tensor(list(input_ids)))
        for i in range(len(input_ids)):
            if table is not None and (row_id := table.longest(input_ids[: i + 1])) >= 0:
                hidden[i] = table.row(row_id)
        hidden = hidden[None]
        rope = decoder.rope(torch.arange(len(input_ids))[None])
        layers = list(decoder.layers)
        for layer_id, block in enumerate(layers[: params.layer]):
            hidden = block(hidden, rope, layer_id, CausalAttention())
        if params.layer is None:
            hidden = decoder.norm(hidden)
    pooled = hidden[0].mean(0) if params.kind == "mean" else hidden[0, -1]
    return pooled.numpy()


def embedding(outcome: Outcome) -> NDArray[np.float32]:
    last = outcome.last()
    assert last.finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.num_generated_tokens == 0
    assert last.embedding is not None
    assert last.embedding.dtype == np.float32
    return last.embedding


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["mean", "last"])
@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_equals_full_recompute(
    make_world: MakeWorld,
    tiny_decoder: Decoder,
    dict_table: DictTable,
    with_table: bool,
    backend: str,
    kind: Any,
    layer: int | None,
) -> None:
    table = dict_table if with_table else None
    params = PoolingParams(kind=kind, layer=layer)
    world = make_world(table, backend=backend, max_num_batched_tokens=48)
    outcomes = [world.add(prompt, max_tokens=0, pooling=params) for prompt in PROMPTS]
    world.run()
    for prompt, outcome in zip(PROMPTS, outcomes, strict=True):
        expected = naive_embedding(tiny_decoder, prompt, params, table)
        np.testing.assert_allclose(embedding(outcome), expected, atol=2e-5)


def test_among_completions_nothing_changes(
    make_world: MakeWorld, tiny_decoder: Decoder, dict_table: DictTable
) -> None:
    """All depths and completions in the same steps; the prefix cache serves both and is not spoilt."""
    world = make_world(dict_table, max_num_batched_tokens=24)
    depths = (None, 0, 1, 2)
    for _ in range(2):
        pooled = [
            (prompt, params, world.add(prompt, max_tokens=0, pooling=params))
            for i, prompt in enumerate(PROMPTS[:6])
            for params in [PoolingParams(kind=("mean", "last")[i % 2], layer=depths[i % 4])]
        ]
        texts = [(prompt, world.add(prompt, max_tokens=6)) for prompt in PROMPTS[:6]]
        world.run()
        for prompt, outcome in texts:
            assert outcome.tokens() == naive_greedy(tiny_decoder, prompt, 6, dict_table)
        for prompt, params, outcome in pooled:
            expected = naive_embedding(tiny_decoder, prompt, params, dict_table)
            np.testing.assert_allclose(embedding(outcome), expected, atol=2e-5)


def test_prefix_cache(make_world: MakeWorld, dict_table: DictTable) -> None:
    """The last position may start from cached blocks; a mean and a layer within may not."""
    world = make_world(dict_table)
    prompt = random_prompt(4, 60)

    def run(**params: Any) -> tuple[int, NDArray[np.float32]]:
        outcome = world.add(prompt, max_tokens=0, pooling=PoolingParams(**params))
        world.run()
        usage = outcome.last().usage
        assert usage is not None
        return usage.num_cached_tokens, embedding(outcome)

    assert run(kind="last", layer=1)[0] == 0
    cold = run(kind="last")
    assert cold[0] == 0, "blocks of a shallow pass are not taken for whole ones"
    warm = run(kind="last")
    assert warm[0] == 56
    np.testing.assert_array_equal(warm[1], cold[1])
    assert run(kind="mean")[0] == 0
    assert run(kind="last", layer=1)[0] == 0


@pytest.mark.skipif(native is None, reason="the native extension was not built")
@pytest.mark.parametrize("kind", ["mean", "last"])
def test_same_bits_in_any_batch(make_world: MakeWorld, dict_table: DictTable, kind: Any) -> None:
    params = PoolingParams(kind=kind)

    def embeddings(world: World, prompts: list[list[int]]) -> list[bytes]:
        outcomes = [world.add(prompt, max_tokens=0, pooling=params) for prompt in prompts]
        world.run()
        return [embedding(outcome).tobytes() for outcome in outcomes]

    alone = [embeddings(make_world(dict_table, deterministic=True), [prompt])[0] for prompt in PROMPTS]
    assert embeddings(make_world(dict_table, deterministic=True), PROMPTS) == alone
    chunked = make_world(dict_table, deterministic=True, max_num_batched_tokens=9, block_size=4)
    assert embeddings(chunked, PROMPTS) == alone
    small = make_world(
        dict_table, deterministic=True, kv_cache_bytes=3 * 2 * 2 * 16 * 4 * 8 * 17, max_num_batched_tokens=40
    )
    decoding = [small.add(random_prompt(i, 4), max_tokens=100) for i in range(2)]
    assert embeddings(small, PROMPTS) == alone
    assert all(len(outcome.tokens()) == 100 for outcome in decoding)


def test_rows_that_cannot_be_read_fail_it_alone(make_world: MakeWorld, dict_table: DictTable) -> None:
    world = make_world(dict_table)
    prompt = random_prompt(1, 20)
    row_id = max(dict_table.match(np.array(prompt))[0])
    dict_table.broken.add(row_id)
    failed = world.add(prompt, max_tokens=0, pooling=PoolingParams())
    good = world.add([200, 201, 202], max_tokens=0, pooling=PoolingParams())
    world.run()
    assert failed.last().finish_reason == "error"
    assert failed.last().embedding is None
    assert len(embedding(good)) == dict_table.dim


def test_not_a_number_is_an_error(make_world: MakeWorld, dict_table: DictTable) -> None:
    world = make_world(dict_table)
    prompt = random_prompt(1, 20)
    for row_id in dict_table.match(np.array(prompt))[0]:
        if row_id >= 0:
            dict_table.row(row_id)[0] = torch.nan
    outcome = world.add(prompt, max_tokens=0, pooling=PoolingParams())
    world.run()
    assert outcome.last().finish_reason == "error"
    assert "not finite" in (outcome.last().error or "")
