"""The native decoder against the torch one over the same paged cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.native_decoder import ATTENTION_SPAN
from scone.kernels.packed_linear import INSTRUCTION_SETS
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk, Sequence

from .conftest import random_prompt
from .instruction_sets import use_instruction_set
from .native_runs import CONFIG, PROMPTS, hidden_states, random_decoder

pytestmark = pytest.mark.skipif(native is None, reason="the native extension was not built")


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 72, "dim": 40, "ffn_dim": 50},
        {"num_heads": 16, "num_kv_heads": 1, "head_dim": 24},
        {"attention_bias": True, "output_bias": True, "mlp_bias": True, "tied_head": False},
        {"qk_norm": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_equals_torch(shape: dict[str, Any]) -> None:
    decoder = random_decoder(**shape)
    native_states = hidden_states(ModelRunner(decoder, CONFIG), PROMPTS, [16, 33])
    torch_states = hidden_states(ModelRunner(decoder, replace(CONFIG, backend="torch")), PROMPTS, [16, 33])
    for ours, oracle in zip(native_states, torch_states, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("quantization", ["none", "bfloat16", "int8", "int4"])
def test_avx512_gives_the_bits_of_avx2(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without its bfloat16 products."""
    decoder = random_decoder(num_heads=6, num_kv_heads=2, head_dim=40, dim=48, ffn_dim=80, qk_norm=True)
    states = []
    for name in INSTRUCTION_SETS[:-1]:
        use_instruction_set(name, monkeypatch)
        config = replace(CONFIG, quantization=quantization, block_size=16, max_num_seqs=16)  # type: ignore[arg-type]
        states.append(torch.cat(hidden_states(ModelRunner(decoder, config), PROMPTS, [16, 33])))
    assert all(torch.equal(states[0], others) for others in states[1:])


@pytest.mark.parametrize(
    "shape",
    [
        {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64},
        {"num_heads": 7, "num_kv_heads": 1, "head_dim": 40},  # no whole number of tokens in a tile
        {"num_heads": 16, "num_kv_heads": 1, "head_dim": 24},  # a token has more queries than a tile
        {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8},
    ],
)
def test_same_bits_with_blocks_of_any_size(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tokens are taken by the widest vectors, of 8 by narrower ones, the rest one by one."""
    decoder = random_decoder(**shape)
    for name in INSTRUCTION_SETS:
        use_instruction_set(name, monkeypatch)
        of_sizes = []
        for size in (8, 12, 16, 20, 24, 32):
            config = replace(CONFIG, block_size=size, max_num_seqs=16)
            of_sizes.append(torch.cat(hidden_states(ModelRunner(decoder, config), PROMPTS, [16, 33])))
        assert all(torch.equal(of_sizes[0], states) for states in of_sizes[1:])
        monkeypatch.undo()


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("quantization", ["none", "bfloat16", "int8", "int4"])
def test_same_bits_in_any_batch_and_chunking(quantization: str) -> None:
    config = replace(CONFIG, quantization=quantization)  # type: ignore[arg-type]
    decoder = random_decoder()
    together = hidden_states(ModelRunner(decoder, config), PROMPTS, [7, 8, 30])
    for prompt, states in zip(PROMPTS, together, strict=True):
        alone = hidden_states(ModelRunner(decoder, config), [prompt], [])
        assert torch.equal(alone[0], states)
        threaded = hidden_states(ModelRunner(decoder, replace(config, num_threads=3)), [prompt], [1, 2, 3])
        assert torch.equal(threaded[0], states)


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("shape", [{}, {"num_heads": 16, "num_kv_heads": 1, "head_dim": 24}])
def test_same_bits_where_threads_share_a_context(shape: dict[str, Any]) -> None:
    """Three spans: one after the other, each by some thread, and in a batch that occupies all threads."""
    decoder = random_decoder(**shape)
    prompt = random_prompt(6, 600, high=200)
    config = EngineConfig(max_model_len=640, max_num_seqs=8, max_num_batched_tokens=4096)

    def states(
        num_threads: int, cuts: list[int], num_seqs: int = 1, wants_all: bool = True, **settings: Any
    ) -> Tensor:
        runner = ModelRunner(decoder, replace(config, num_threads=num_threads, **settings))
        seqs = [
            Sequence(i, 0, prompt, block_ids=list(range(i * 40, i * 40 + 40)), wants_all_states=wants_all)
            for i in range(num_seqs)
        ]
        parts = []
        with torch.inference_mode():
            for start, end in itertools.pairwise([0, *cuts, 600]):
                chunks = [Chunk(seq, start, end - start) for seq in seqs]
                parts.append(runner.forward(chunks, runner.embed(chunks)).clone()[: end - start])
        return torch.cat(parts)

    alone = states(1, [])
    torch.testing.assert_close(alone, states(1, [], backend="torch"), rtol=2e-4, atol=2e-4)
    assert len(prompt) > 2 * ATTENTION_SPAN
    for num_threads, cuts, num_seqs in (
        (1, [256, 599], 1),
        (3, [599], 1),
        (5, [255, 257, 513, 598], 1),
        (3, [599], 6),
    ):
        assert torch.equal(states(num_threads, cuts, num_seqs), alone)
        assert torch.equal(states(num_threads, cuts, num_seqs, wants_all=False)[-1], alone[-1])


@pytest.mark.parametrize("settings", [{"backend": "torch"}, {}, {"quantization": "int8"}])
@pytest.mark.parametrize("middle", [0, 1, 2])
def test_upper_layers_over_known_states_give_the_same_bits(settings: dict[str, Any], middle: int) -> None:
    """All layers at once, and the upper ones over what the lower ones gave, in other chunks and blocks."""
    config, decoder = replace(CONFIG, **settings), random_decoder()
    prompt = random_prompt(3, 60, high=200)
    whole = ModelRunner(decoder, config)
    lower, upper = ModelRunner(decoder, config), ModelRunner(decoder, config)
    seq = Sequence(0, 0, prompt, block_ids=list(range(8)))
    with torch.inference_mode():
        everything = Chunk(seq, 0, 60)
        expected = whole.forward([everything], whole.embed([everything])).clone()
        states = lower.forward([everything], lower.embed([everything]), LayerRange(0, middle)).clone()
        cuts = [0, 60] if config.backend == "torch" else [0, 13, 48, 60]
        chunks = [Chunk(seq, a, b - a) for a, b in itertools.pairwise(cuts)]
        parts = [
            upper.forward([c], states[c.start : c.start + c.num_tokens].clone(), LayerRange(middle))
            for c in chunks
        ]
    assert torch.equal(torch.cat(parts), expected)


def test_layers_that_end_before_they_begin_are_refused() -> None:
    runner = ModelRunner(random_decoder(), CONFIG)
    chunk = Chunk(Sequence(0, 0, [5], block_ids=[0]), 0, 1)
    with torch.inference_mode(), pytest.raises(ValueError, match="first_layer is more than num_layers"):
        runner.forward([chunk], runner.embed([chunk]), LayerRange(2, 1))


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("num_layers", [None, 1])
def test_wanted_states_are_the_bits_of_a_pass_that_computes_all(num_layers: int | None) -> None:
    """Chunks of which all, some or no states are wanted; keys and values are stored of all tokens."""
    prompts = [random_prompt(seed, 50, high=200) for seed in range(4)]
    results = []
    for wants_all in ((True, True, True, True), (False, True, False, False)):
        runner = ModelRunner(random_decoder(), CONFIG)
        seqs = [
            Sequence(i, 0, prompt[:size], block_ids=list(range(15 - i, 60, 4)), wants_all_states=wants)
            for i, (prompt, size, wants) in enumerate(zip(prompts, (50, 7, 11, 1), wants_all, strict=True))
        ]
        with torch.inference_mode():
            chunks = [Chunk(s, 0, min(11, len(s.token_ids))) for s in seqs]
            first = runner.forward(chunks, runner.embed(chunks), LayerRange(0, num_layers)).clone()
            for seq in seqs:
                seq.token_ids.append(5)
            chunks = [Chunk(seqs[0], 11, 40), *(Chunk(s, len(s.token_ids) - 1, 1) for s in seqs[1:])]
            assert [c.num_wanted for c in chunks] == ([40, 1, 1, 1] if wants_all[0] else [1, 1, 1, 1])
            second = runner.forward(chunks, runner.embed(chunks), LayerRange(0, num_layers)).clone()
        results.append((first, second, runner._kv_cache.clone()))
    (first, second, cache), (some_first, some_second, its_cache) = results
    wanted = [*range(11, 18), 28, 29]  # none of the first sequence, all of the second, the others' last
    assert torch.equal(some_first[wanted], first[wanted])
    assert not torch.equal(some_first, first)
    assert torch.equal(some_second[39:], second[39:])
    assert torch.equal(its_cache, cache)


def test_more_wanted_states_than_tokens_are_refused() -> None:
    runner = ModelRunner(random_decoder(), CONFIG)
    chunk = Chunk(Sequence(0, 0, [1, 2], block_ids=[0]), 0, 2)
    batch = replace(runner._paged_batch([chunk]), num_wanted=torch.tensor([3], dtype=torch.int32))
    with torch.inference_mode(), pytest.raises(ValueError, match="num_wanted"):
        runner._forward.forward(
            runner.embed([chunk]),
            torch.arange(2, dtype=torch.int32),
            batch,
            runner._kv_cache[0],
            runner._kv_cache[1],
        )
