"""From logits to tokens: what a request changes of its logits, the draw, log-probabilities.

Each sequence draws from its own generator and each row is treated by itself, so a sequence's tokens
depend only on its own logits, parameters and seed, alone or in any batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scone.kernels.packed_linear import Workspace
from scone.kernels.token_draw import Draw, draw_tokens, log_probabilities
from scone.server.engine.batch_draw import draw_together, to_device, to_host
from scone.server.engine.logit_edits import EditedLogits, LogitEdits
from scone.server.sequence import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy; dividing by them would overflow float32."""


class SamplerState:
    """What one sequence's sampling remembers: its generator and the tokens seen so far.

    Attributes:
        edits: what it changes of its logits.
    """

    def __init__(
        self, params: SamplingParams, index: int, prompt_ids: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        self.params = params
        seed = secrets.randbits(63) if params.seed is None else params.seed + index
        self._generator = np.random.Generator(np.random.Philox(seed % 2**64))
        self.edits = LogitEdits(params, prompt_ids, sorted(params.final_ids(eos_ids)))
        self.is_greedy = params.temperature < GREEDY_BELOW
        self._asks_for_the_best = (
            self.is_greedy and params.logprobs is None and params.allowed_token_ids is None
        )

    @property
    def takes_the_best(self) -> bool:
        """Whether the next token is that of the highest logit, and nothing else is asked of the logits."""
        return self._asks_for_the_best and not self.edits

    def append(self, token_id: int) -> None:
        """Counts a token that was generated."""
        self.edits.append(token_id)

    def next_draw(self) -> Draw:
        """How the next token is chosen, with the sequence's next number unless that is greedy."""
        if self.is_greedy:
            return Draw()
        params = self.params
        number = self._generator.random()
        return Draw(params.temperature, params.top_k, params.top_p, params.min_p, number)


class SampledToken(NamedTuple):
    """`token_id` is None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None


PendingTokens = Callable[[], list[SampledToken]]
"""Reads tokens that were chosen; to be called once the device has done what was queued for them."""


def sample(
    logits: Tensor, states: Sequence[SamplerState], workspace: Workspace | None = None
) -> PendingTokens:
    """One token per row of `logits` (num_seqs, vocab) float32; rows of -inf parts are allowed.

    Log-probabilities are those of the model itself, before bias, penalties and temperature. On a CPU, native
    kernels run on the threads of `workspace`, or without one their oracle.
    """
    if logits.is_cuda:
        return sample_on_device(logits, states)
    edited = EditedLogits(logits, [state.edits for state in states])
    token_ids = draw_tokens(workspace, logits, [state.next_draw() for state in states])
    edited.restore()
    logprobs: list[TokenLogprob | None] = [None] * len(states)
    rows = [r for r, s in enumerate(states) if s.params.logprobs is not None and token_ids[r] is not None]
    if rows:
        chosen = [t for r in rows if (t := token_ids[r]) is not None]
        num_top = [states[r].params.logprobs or 0 for r in rows]
        wanted = logits if len(rows) == len(states) else logits[rows]
        for row, logprob in zip(rows, token_logprobs(wanted, chosen, num_top, workspace), strict=True):
            logprobs[row] = logprob
    tokens = [SampledToken(t, p) for t, p in zip(token_ids, logprobs, strict=True)]
    return lambda: tokens


def sample_on_device(logits: Tensor, states: Sequence[SamplerState]) -> PendingTokens:
    """`sample` without a wait for the device: everything is queued."""
    edited = EditedLogits(logits, [state.edits for state in states])
    token_ids = draw_together(logits, [state.next_draw() for state in states])
    edited.restore()
    rows = [r for r, state in enumerate(states) if state.params.logprobs is not None]
    num_top = [states[r].params.logprobs or 0 for r in rows]
    scores: list[Tensor] = []
    if rows:
        places = to_device(torch.tensor(rows), logits.device)
        chosen = token_ids.index_select(0, places).clamp(min=0)  # of one that is not finite nothing is read
        scores = [
            to_host(x) for x in _log_probabilities(logits.index_select(0, places), chosen, max(num_top))
        ]
    drawn = to_host(token_ids)

    def read() -> list[SampledToken]:
        tokens = [token if token >= 0 else None for token in drawn.tolist()]
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        if rows:
            ids = [tokens[r] or 0 for r in rows]
            for row, logprob in zip(rows, _as_logprobs(ids, num_top, *scores), strict=True):
                logprobs[row] = logprob if tokens[row] is not None else None
        return [SampledToken(t, p) for t, p in zip(tokens, logprobs, strict=True)]

    return read


def token_logprobs(
    logits: Tensor,
    token_ids: Sequence[int],
    num_top: Sequence[int],
    workspace: Workspace | None = None,
) -> list[TokenLogprob]:
    """Log-probability of one token per row of `logits` (n, vocab), with the row's `num_top` likeliest.

    Only logits reduced over the vocabulary are formed, never a second (n, vocab) array.
    """
    if logits.is_cuda:
        targets = to_device(torch.tensor(token_ids), logits.device)
        scores = _log_probabilities(logits, targets, max(num_top))
    else:
        scores = log_probabilities(workspace, logits, token_ids, min(max(num_top), logits.shape[1]))
    return _as_logprobs(token_ids, num_top, *scores)


def _log_probabilities(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_draw.log_probabilities`, on the device of logits (n, vocab) and token ids (n,)."""
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    chosen = (logits.gather(1, token_ids.unsqueeze(1)) - total).squeeze(1)
    values, top_ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    return chosen, values - total, top_ids


def _as_logprobs(
    token_ids: Sequence[int], num_top: Sequence[int], chosen: Tensor, top: Tensor, top_ids: Tensor
) -> list[TokenLogprob]:
    """Of each row its token's log-probability, with so many of the likeliest."""
    rows = zip(token_ids, chosen.tolist(), num_top, top_ids.tolist(), top.tolist(), strict=True)
    return [
        TokenLogprob(
            token, logprob, tuple(pair for pair in zip(i[:k], v[:k], strict=True) if pair[1] > -torch.inf)
        )
        for token, logprob, k, i, v in rows
    ]
