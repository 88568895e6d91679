"""Blocks of the native decoder's cache: copied elsewhere, or computed anew from what went into the layers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from scone.kernels.extension import native
from scone.server.engine.engine_config import Quantization
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk, Sequence

from .conftest import random_prompt
from .native_runs import CONFIG, random_decoder

pytestmark = pytest.mark.skipif(native is None, reason="the native extension was not built")


def test_a_blocks_bytes_are_all_that_is_known_of_its_tokens() -> None:
    """Copied into another model's cache, elsewhere, they stand in for computing."""
    for backend in ("native", "torch"):
        config = replace(CONFIG, backend=backend)
        first, second = (ModelRunner(random_decoder(), config) for _ in range(2))
        prompt = random_prompt(4, 24, high=200)
        here, there = (Sequence(0, 0, prompt, block_ids=ids) for ids in ([3, 1, 2], [9, 4, 7]))
        with torch.inference_mode():
            everything, rest = Chunk(here, 0, 24), Chunk(here, 16, 8)
            first.forward([everything], first.embed([everything]))
            expected = first.forward([rest], first.embed([rest])).clone()
            for source, target in zip(here.block_ids[:2], there.block_ids[:2], strict=True):
                assert first.block(source).numel() == first.block_bytes == 3 * 2 * 2 * 16 * 4 * 8
                second.block(target).copy_(first.block(source))
            rest = Chunk(there, 16, 8)
            assert torch.equal(second.forward([rest], second.embed([rest])), expected)


MULTI_HEAD = {"num_kv_heads": 4}


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("quantization", ["none", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", [MULTI_HEAD, {"architecture": "qwen3", "qk_norm": True}, {}])
def test_keys_and_values_are_restored_from_what_went_into_the_layers(
    quantization: Quantization, shape: dict[str, Any]
) -> None:
    """Kept in chunks and a batch, restored some blocks at a time elsewhere: the same bits."""
    decoder, config = random_decoder(**shape), replace(CONFIG, quantization=quantization)
    first, second = (ModelRunner(decoder, config) for _ in range(2))
    states = first.new_states(9)
    assert states[0].nbytes == first.state_bytes
    first.keep_states_in(states)
    slots = {0: 5, 1: 0, 2: 8, 4: 3}  # not of block 3
    kept = Sequence(0, 0, random_prompt(7, 44, high=200), block_ids=[3, 1, 2, 9, 8, 7], state_slots=slots)
    other = Sequence(1, 0, random_prompt(8, 44, high=200), block_ids=list(range(10, 16)))
    with torch.inference_mode():
        for begin, end in itertools.pairwise([0, 5, 29, 44]):
            chunks = [Chunk(seq, begin, end - begin) for seq in (other, kept)]
            first.forward(chunks, first.embed(chunks))
        for some in ([0, 4], [2], [1]):
            second.restore_blocks(
                states, [slots[b] for b in some], [20 + b for b in some], [8 * b for b in some]
            )
        for block in slots:
            assert first.block(kept.block_ids[block]).any()
            assert torch.equal(second.block(20 + block), first.block(kept.block_ids[block]))
    assert not states[[1, 2, 4, 6, 7]].any(), "nothing else was kept"


def test_what_cannot_be_restored_is_refused() -> None:
    runner = ModelRunner(random_decoder(), CONFIG)
    states = runner.new_states(2)
    for slots, block_ids, positions, message in (
        ([2], [0], [0], "a slot is out of range"),
        ([1], [1 << 20], [0], "a block id is out of range"),
        ([1], [0], [CONFIG.max_model_len], "past the last position"),
        ([0, 1], [0], [0], "not of one length"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.restore_blocks(states, slots, block_ids, positions)
