"""The head's part of a step: log-probabilities of prompt tokens, and the tokens that come next.

Logits are computed only where they are asked for, and only so many rows of them are held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from scone.server.engine.batch_draw import to_device, to_host
from scone.server.engine.generation import RequestRun
from scone.server.engine.model_runner import Runner
from scone.server.engine.sampler import (
    PendingTokens,
    SampledToken,
    SamplerState,
    sample,
    token_logprobs,
)
from scone.server.engine.scheduler import Chunk

PROMPT_LOGITS_ROWS = 64
"""Prompt positions whose logits are held at once: 64 x 49152 x 4 bytes are 12 MiB."""


def score_prompt(runner: Runner, run: RequestRun, chunk: Chunk, hidden: Tensor) -> None:
    """Fills in the log-probabilities of prompt tokens that follow the chunk's positions (num_tokens, dim)."""
    assert run.prompt_logprobs is not None
    num_top = run.request.sampling.prompt_logprobs or 0
    targets = run.request.input_ids[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
    for begin in range(0, len(targets), PROMPT_LOGITS_ROWS):
        ids = targets[begin : begin + PROMPT_LOGITS_ROWS]
        logits = runner.logits(hidden[begin : begin + len(ids)])
        first = chunk.start + 1 + begin
        run.prompt_logprobs[first : first + len(ids)] = token_logprobs(
            logits, ids, [num_top] * len(ids), runner.workspace
        )


def sample_tokens(
    runner: Runner, hidden: Tensor, wanted: Sequence[tuple[SamplerState, int]]
) -> PendingTokens:
    """The next token of each sequence, from its last hidden state: a row of `hidden` (num_tokens, dim)."""
    if not wanted:
        return list
    places = [row for _, row in wanted]
    if places != list(range(len(hidden))):
        hidden = hidden.index_select(0, to_device(torch.tensor(places), hidden.device))
    if all([sampler.takes_the_best for sampler, _ in wanted]):
        token_ids, logits = runner.best_tokens(hidden)
        return partial(_read_best, to_host(token_ids), to_host(logits))
    restricted = [sampler.params.allowed_token_ids for sampler, _ in wanted]
    if not any(restricted):
        logits = runner.logits(hidden)
    else:
        rows = [i for i, ids in enumerate(restricted) if ids is None]
        logits = torch.empty(len(wanted), runner.vocab_size, device=runner.device)
        if rows:
            logits[rows] = runner.logits(hidden[rows])
        for i, ids in enumerate(restricted):
            if ids is not None:
                logits[i] = runner.logits_of(hidden[i : i + 1], ids)[0]
    return sample(logits, [sampler for sampler, _ in wanted], runner.workspace)


def _read_best(token_ids: Tensor, logits: Tensor) -> list[SampledToken]:
    # Not by torch, whose operations hand Python's lock to whoever waits for it: the device stands idle here.
    rows = zip(token_ids.tolist(), logits.tolist(), strict=True)
    return [SampledToken(t if isfinite(logit) else None, None) for t, logit in rows]
