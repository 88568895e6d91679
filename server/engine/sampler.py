"""From logits to tokens: penalties, masks, truncation, drawing, log-probabilities.

Each sequence draws from its own generator and each row is treated by itself, so a sequence's tokens
depend only on its own logits, parameters and seed, alone or in any batch.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scone.server.engine.batch_draw import choose_together
from scone.server.sequence import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy; dividing by them would overflow float32."""

NUM_NUCLEUS_CANDIDATES = 256
"""Tokens sorted at first for top_p; only a flatter distribution needs the whole vocabulary sorted."""


class SamplerState:
    """What one sequence's sampling remembers: its generator and the tokens seen so far."""

    def __init__(
        self, params: SamplingParams, index: int, prompt_ids: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        self.params = params
        seed = secrets.randbits(63) if params.seed is None else params.seed + index
        self._generator = np.random.Generator(np.random.Philox(seed % 2**64))
        self._counts: Counter[int] = Counter()
        self._prompt_ids = frozenset(prompt_ids) if params.repetition_penalty != 1.0 else frozenset()
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._num_generated = 0
        self._final_ids = sorted({*(() if params.ignore_eos else eos_ids), *params.stop_token_ids})
        self.is_greedy = params.temperature < GREEDY_BELOW
        self._has_penalty = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """Whether the logits are used as they are."""
        return not (
            self._has_penalty
            or self.params.logit_bias
            or (self._final_ids and self._num_generated < self.params.min_tokens)
        )

    @property
    def takes_the_best(self) -> bool:
        """Whether the next token is that of the highest logit, and nothing else is asked of the logits."""
        params = self.params
        return (
            self.is_greedy and params.logprobs is None and params.allowed_token_ids is None and self.is_plain
        )

    def append(self, token_id: int) -> None:
        """Counts a token that was generated."""
        self._num_generated += 1
        if self._has_penalty:
            self._counts[token_id] += 1

    def uniform(self) -> float:
        """The sequence's next number in [0, 1)."""
        return self._generator.random()

    def adjust(self, logits: Tensor) -> None:
        """Applies bias, minimum length and penalties to one row (vocab,) in place."""
        params = self.params
        if params.logit_bias:
            logits[self._bias_ids] += self._biases.to(logits.device)
        if self._final_ids and self._num_generated < params.min_tokens:
            logits[self._final_ids] = -torch.inf
        if not self._has_penalty:
            return
        if params.repetition_penalty != 1.0:
            ids = torch.tensor(sorted(self._prompt_ids | self._counts.keys()), dtype=torch.int64)
            seen = logits[ids]
            logits[ids] = torch.where(
                seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty
            )
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self._counts), dtype=torch.int64)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[ids] -= (params.presence_penalty + params.frequency_penalty * counts).to(logits.device)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`token_id` is None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken]:
    """One token per row of `logits` (num_seqs, vocab) float32; rows of -inf parts are allowed.

    Log-probabilities are those of the model itself, before bias, penalties and temperature.
    """
    token_ids = choose_together(logits, states) if logits.is_cuda else choose_each(logits, states)
    logprobs: list[TokenLogprob | None] = [None] * len(states)
    rows = [r for r, s in enumerate(states) if s.params.logprobs is not None and token_ids[r] is not None]
    if rows:
        chosen = [t for r in rows if (t := token_ids[r]) is not None]
        num_top = [states[r].params.logprobs or 0 for r in rows]
        for row, logprob in zip(rows, token_logprobs(logits[rows], chosen, num_top), strict=True):
            logprobs[row] = logprob
    return [SampledToken(t, p) for t, p in zip(token_ids, logprobs, strict=True)]


def choose_each(logits: Tensor, states: Sequence[SamplerState]) -> list[int | None]:
    """A token for each row, row by row; None where they are not finite."""
    highest, greedy_ids = logits.max(dim=-1)
    finite = torch.isfinite(highest).tolist()
    token_ids: list[int | None] = greedy_ids.tolist()
    for row, state in enumerate(states):
        if not finite[row]:
            token_ids[row] = None
            continue
        if state.is_plain and state.is_greedy:
            continue
        adjusted = logits[row]
        if not state.is_plain:
            adjusted = adjusted.clone()
            state.adjust(adjusted)
        token_ids[row] = int(adjusted.argmax()) if state.is_greedy else _draw(adjusted, state)
    return token_ids


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of one token per row of `logits` (n, vocab), with the row's `num_top` likeliest.

    Only logits reduced over the vocabulary are formed, never a second (n, vocab) array.
    """
    if logits.is_cuda:
        total = torch.logsumexp(logits, dim=1, keepdim=True)
    else:  # row by row: torch may sum a row in another order when it comes with others
        total = torch.stack([torch.logsumexp(row, dim=0) for row in logits]).unsqueeze(1)
    targets = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen = (logits.gather(1, targets) - total).squeeze(1).tolist()
    width = min(max(num_top), logits.shape[1])
    if not width:
        return [TokenLogprob(t, p) for t, p in zip(token_ids, chosen, strict=True)]
    values, ids = logits.topk(width, dim=-1)
    tops = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return [
        TokenLogprob(
            token, logprob, tuple(pair for pair in zip(i[:k], v[:k], strict=True) if pair[1] > -torch.inf)
        )
        for token, logprob, k, (i, v) in zip(token_ids, chosen, num_top, tops, strict=True)
    ]


def _draw(logits: Tensor, state: SamplerState) -> int:
    """Draws from one row (vocab,) by inverting the distribution function at the sequence's next number."""
    params = state.params
    scaled = logits / params.temperature
    ids: Tensor | None = None
    if 0 < params.top_k < len(scaled):
        scaled, ids = scaled.topk(params.top_k)
    if params.top_p < 1.0:
        scaled, order = _nucleus(scaled, params.top_p)
        ids = order if ids is None else ids[order]
    if params.min_p > 0.0:
        scaled = scaled.masked_fill(scaled < scaled.max() + np.log(params.min_p), -torch.inf)
    # Double: summed over a large vocabulary, float32 would lose the rare tokens.
    cumulative = torch.softmax(scaled, dim=-1).double().cumsum(dim=-1)
    target = state.uniform() * cumulative[-1]
    chosen = int(torch.searchsorted(cumulative, target, right=True).clamp(max=len(scaled) - 1))
    return chosen if ids is None else int(ids[chosen])


def _nucleus(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest logits whose probabilities reach `top_p`, and where they stood."""
    total = torch.logsumexp(scaled, dim=-1)
    values, order = scaled.topk(min(NUM_NUCLEUS_CANDIDATES, len(scaled)))
    before = torch.exp(values - total).double().cumsum(dim=-1) - torch.exp(values - total).double()
    if before[-1] < top_p and len(values) < len(scaled):
        values, order = scaled.sort(descending=True, stable=True)
        before = torch.exp(values - total).double().cumsum(dim=-1) - torch.exp(values - total).double()
    num_kept = max(1, int((before < top_p).sum()))
    return values[:num_kept], order[:num_kept]
