"""Keys and values held in bfloat16: rounded once, when they are stored, and the same answers from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scone.kernels.extension import native
from scone.kernels.packed_linear import rounded_weight_reference
from scone.model_store.decoder import Block, Decoder
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.engine_config import EngineConfig, KvCacheDtype
from scone.server.engine.kv_dtype import choose_kv_dtype
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk, Sequence
from scone.server.errors import SettingError

from .conftest import World, random_prompt
from .dict_table import DictTable
from .native_runs import CONFIG, PROMPTS, hidden_states
from .native_runs import random_decoder as native_decoder
from .recycled_world import BLOCK_BYTES, MakeWorld, answer, counted, facts
from .restarts import Restarts

needs_native = pytest.mark.skipif(native is None, reason="the native extension was not built")

KV_DTYPES: tuple[KvCacheDtype, ...] = ("float32", "bfloat16")
HALF_BLOCK_BYTES = BLOCK_BYTES // 2
FIRST_LAYER = LayerRange(0, 1)
NUM_QUERIES = 5


def first_layer_over(runner: ModelRunner, seqs: list[Sequence]) -> Tensor:
    """What the first layer makes of tokens whose embeddings are zero, at the end of each sequence."""
    chunks = [Chunk(seq, len(seq.token_ids) - NUM_QUERIES, NUM_QUERIES) for seq in seqs]
    with torch.inference_mode():
        zeros = torch.zeros(len(seqs) * NUM_QUERIES, runner.dim)
        return runner.forward(chunks, zeros, FIRST_LAYER).clone()


@needs_native
@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("block_size", [8, 12, 16, 40])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64},
        {"num_heads": 7, "num_kv_heads": 1, "head_dim": 40},
        {"num_heads": 16, "num_kv_heads": 1, "head_dim": 24},
        {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8},
    ],
)
def test_attention_is_that_of_floats_over_rounded_keys_and_values(
    shape: dict[str, Any], block_size: int
) -> None:
    """Bit for bit. The queries' own keys are zero and their values fit 16 bits: both caches hold the same."""
    decoder = native_decoder(attention_bias=True, **shape)
    block = decoder.layers[0]
    assert isinstance(block, Block)
    block.k_proj.bias.zero_()
    block.v_proj.bias.copy_(block.v_proj.bias.bfloat16())
    config = EngineConfig(
        max_model_len=640, max_num_seqs=8, max_num_batched_tokens=1024, block_size=block_size
    )
    floats, halves = (ModelRunner(decoder, replace(config, kv_cache_dtype=d)) for d in KV_DTYPES)
    seqs = [
        Sequence(i, 0, random_prompt(i, length + NUM_QUERIES, high=200), block_ids=list(range(i, 400, 5)))
        for i, length in enumerate((1, 9, 40, 253, 300))  # spans and blocks end within the queries
    ]
    contexts = [Chunk(seq, 0, len(seq.token_ids) - NUM_QUERIES) for seq in seqs]
    with torch.inference_mode():
        for runner in (floats, halves):
            runner.forward(contexts, runner.embed(contexts), FIRST_LAYER)
    assert torch.equal(floats._kv_cache.bfloat16(), halves._kv_cache)
    unrounded = first_layer_over(floats, seqs)
    floats._kv_cache.copy_(halves._kv_cache)
    expected = first_layer_over(floats, seqs)
    assert not torch.equal(unrounded, expected)
    assert torch.equal(first_layer_over(halves, seqs), expected)


@needs_native
@pytest.mark.usefixtures("_instruction_set")
def test_what_is_stored_is_rounded_to_nearest_even() -> None:
    special = [0.0, 1e-40, -1e-45, 3.4e38, -3.39e38, torch.inf, -torch.inf, torch.nan]
    ties = [x * (1 + n * 2.0**-8) for n in (1, 3, 5) for x in (1.0, -1.5, 2.0**-126, 2.0**100)]
    near = torch.nextafter(torch.tensor(ties), torch.tensor(0.0)).tolist()
    values = torch.tensor([*special, *ties, *near])
    decoder = native_decoder(attention_bias=True)
    block = decoder.layers[0]
    assert isinstance(block, Block)
    block.v_proj.bias.copy_(values)
    runner = ModelRunner(decoder, replace(CONFIG, kv_cache_dtype="bfloat16"))
    first_layer_over(runner, [Sequence(0, 0, [5] * NUM_QUERIES, block_ids=[3])])
    stored = runner._kv_cache[1, 0, 3, :, :NUM_QUERIES].transpose(0, 1).flatten(1)
    wanted = values.bfloat16().expand(NUM_QUERIES, -1)
    assert torch.equal(stored.isnan(), wanted.isnan())
    stored, wanted = (x.nan_to_num(7.0, torch.inf, -torch.inf).view(torch.int16) for x in (stored, wanted))
    assert torch.equal(stored, wanted)


@needs_native
@pytest.mark.usefixtures("_instruction_set")
def test_a_prompts_own_tokens_are_read_as_they_are_stored() -> None:
    """Each token meets all before it as later chunks do: any chunking gives the same bits."""
    decoder, config = native_decoder(), replace(CONFIG, kv_cache_dtype="bfloat16")
    whole = hidden_states(ModelRunner(decoder, config), PROMPTS, [])
    for cuts in ([1, 2, 3], [7, 8, 30], list(range(1, 77))):
        parts = hidden_states(ModelRunner(decoder, config), PROMPTS, cuts)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    floats = hidden_states(ModelRunner(decoder, CONFIG), PROMPTS, [])
    assert not torch.equal(floats[-1], whole[-1])


@needs_native
def test_equals_torch_over_a_rounded_cache() -> None:
    decoder, config = native_decoder(), replace(CONFIG, kv_cache_dtype="bfloat16")
    ours = hidden_states(ModelRunner(decoder, config), PROMPTS, [16, 33])
    oracle = hidden_states(ModelRunner(decoder, replace(config, backend="torch")), PROMPTS, [16, 33])
    for a, b in zip(ours, oracle, strict=True):  # where sums differ in a bit, rounding may fall otherwise
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


# -- in the engine -------------------------------------------------------------------------------


@pytest.fixture
def world_of_halves(make_world: MakeWorld) -> Callable[..., World]:
    return partial(make_world, kv_cache_dtype="bfloat16")


def test_batches_chunks_preemption_and_forks_change_nothing(
    world_of_halves: MakeWorld, dict_table: DictTable
) -> None:
    prompts = [random_prompt(seed, 20 + seed) for seed in range(6)]
    sampling: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "logprobs": 2}
    world = world_of_halves(dict_table, kv_cache_bytes=HALF_BLOCK_BYTES * 17, max_num_batched_tokens=9)
    assert world.runner.num_blocks == 17
    together = [world.add(prompt, n=2, **sampling) for prompt in prompts]
    world.run()
    assert sum(g.seq.num_preemptions for run in world.runs for g in run.generations) > 0
    for prompt, outcome in zip(prompts, together, strict=True):
        cold = world_of_halves(dict_table)
        for index in range(2):
            one = cold.add(prompt, **{**sampling, "seed": 5 + index})
            cold.run()
            assert [d.logprobs for d in one.deltas[0]] == [d.logprobs for d in outcome.deltas[index]]


def test_cold_memory_disk_and_restart_give_the_same_bits(
    world_of_halves: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    prompt = random_prompt(1, 100)
    cold = facts(answer(world_of_halves(dict_table), prompt))
    first = world_of_halves(dict_table, store=restarts.open(), max_num_batched_tokens=11)
    assert [facts(answer(first, prompt)) for _ in range(2)] == [cold, cold]
    usage = next(u for u in restarts.open().usage() if (u.kind, u.tier) == ("blocks", "disk"))
    assert 12 * HALF_BLOCK_BYTES <= usage.num_bytes < 12 * (HALF_BLOCK_BYTES + 64)
    again = world_of_halves(dict_table, store=restarts.open(0))
    counting = counted(again)
    assert facts(answer(again, prompt)) == cold
    assert counting.num_restored == 96


@needs_native
def test_blocks_come_back_from_hidden_states(
    random_decoder: Callable[..., Decoder], byte_tokenizer: Tokenizer, restarts: Restarts
) -> None:
    """Heads so large that hidden states are smaller even than keys and values of 16 bits."""
    decoder = random_decoder(num_kv_heads=4, head_dim=64)

    def world(**settings: Any) -> World:
        return World(decoder, byte_tokenizer, kv_cache_dtype="bfloat16", **settings)

    prompt = random_prompt(2, 100)
    cold = facts(answer(world(), prompt))
    for num_restored in (0, 96):
        hidden = world(store=restarts.open(), recycled_blocks="hidden", max_num_batched_tokens=13)
        counting = counted(hidden)
        assert facts(answer(hidden, prompt)) == cold
        assert counting.num_restored == num_restored
        assert hidden.core.recycler is not None
        assert hidden.core.recycler.forms.kept[0].name == "hidden"
        hidden.core.recycler.close()


def test_a_store_of_one_type_never_serves_the_other(make_world: MakeWorld, restarts: Restarts) -> None:
    prompt = random_prompt(3, 60)
    cold = {name: facts(answer(make_world(kv_cache_dtype=name), prompt)) for name in KV_DTYPES}
    assert cold["float32"] != cold["bfloat16"]
    for num_restored in (0, 56):
        for name in KV_DTYPES:
            world = make_world(kv_cache_dtype=name, store=restarts.open())
            counting = counted(world)
            assert facts(answer(world, prompt)) == cold[name]
            assert counting.num_restored == num_restored


# -- the choice ----------------------------------------------------------------------------------


def kv_dtype(decoder: Decoder, **settings: Any) -> torch.dtype:
    return ModelRunner(decoder, replace(CONFIG, **settings)).kv_dtype


@needs_native
def test_auto_rounds_where_maps_round_their_inputs() -> None:
    decoder = native_decoder()
    for quantization in ("int8", "int4", "bfloat16"):
        assert kv_dtype(decoder, quantization=quantization) is torch.bfloat16
        assert kv_dtype(decoder, quantization=quantization, kv_cache_dtype="float32") is torch.float32
    for quantization in ("none", "auto"):
        assert kv_dtype(decoder, quantization=quantization) is torch.float32
    for linear in decoder.layers.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(rounded_weight_reference(linear.weight, "int8"))
    assert kv_dtype(decoder, quantization="auto") is torch.bfloat16
    assert kv_dtype(decoder, quantization="none") is torch.float32


def test_torch_holds_either_and_triton_what_it_computes_in() -> None:
    decoder = native_decoder()
    assert kv_dtype(decoder, backend="torch") is torch.float32
    assert kv_dtype(decoder, backend="torch", kv_cache_dtype="bfloat16") is torch.bfloat16
    assert kv_dtype(native_decoder().bfloat16(), backend="torch") is torch.bfloat16
    for setting in ("auto", "bfloat16"):
        chosen = choose_kv_dtype(setting, "triton", torch.bfloat16, rounds_inputs=False)
        assert chosen is torch.bfloat16
    with pytest.raises(SettingError, match=r"computes in, bfloat16: wanted auto, or dtype float32"):
        choose_kv_dtype("float32", "triton", torch.bfloat16, rounds_inputs=False)


def test_half_the_bytes_hold_twice_the_blocks() -> None:
    config = replace(CONFIG, kv_cache_bytes=BLOCK_BYTES * 20, max_num_seqs=8)
    runners = [ModelRunner(native_decoder(), replace(config, kv_cache_dtype=name)) for name in KV_DTYPES]
    assert [r.num_blocks for r in runners] == [20, 40]
    assert [r.block_bytes for r in runners] == [BLOCK_BYTES, HALF_BLOCK_BYTES]
    assert len({r.state_identity.root(None) for r in runners}) == 2
