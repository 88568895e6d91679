"""What tests of the native decoder share: small models, and their hidden states computed chunk by chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scone.model_store.decoder import Decoder
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk, Sequence
from tests.conftest import TINY

from .conftest import random_prompt

CONFIG = EngineConfig(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128, block_size=8)

PROMPTS = [random_prompt(seed, length, high=200) for seed, length in enumerate((1, 9, 40, 77))]


def random_decoder(**shape: Any) -> Decoder:
    torch.manual_seed(5)
    decoder = Decoder(replace(TINY, **shape))
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    return decoder.requires_grad_(False).eval()


def hidden_states(runner: ModelRunner, prompts: list[list[int]], cuts: list[int]) -> list[Tensor]:
    """Hidden states of the prompts, computed together in chunks that end at `cuts`."""
    seqs = []
    for i, prompt in enumerate(prompts):
        seqs.append(Sequence(i, 0, prompt, block_ids=list(range(15 - i, 60, 4))))
    parts: list[list[Tensor]] = [[] for _ in prompts]
    start = 0
    with torch.inference_mode():
        for end in [*cuts, 128]:
            chunks = [
                Chunk(s, start, min(end, len(s.token_ids)) - start) for s in seqs if len(s.token_ids) > start
            ]
            if chunks:
                hidden = runner.forward(chunks, runner.embed(chunks)).clone()
                for chunk, part in zip(
                    chunks, torch.split(hidden, [c.num_tokens for c in chunks]), strict=True
                ):
                    parts[chunk.seq.arrival].append(part)
            start = end
    return [torch.cat(p) for p in parts]
