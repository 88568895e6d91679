"""The sampler's choice for a whole batch in a few launches, for a device that the host talks to rarely.

Its slow twin is `sampler.choose_each`: the same tokens, up to rounding of probabilities. A row's token
depends on its own logits, parameters and number alone: rows that are sorted and rows that are not are drawn
from apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scone.server.engine.sampler import SamplerState


def choose_together(logits: Tensor, states: Sequence[SamplerState]) -> list[int | None]:
    """A token for each row of `logits` (num_seqs, vocab) float32; None where they are not finite."""
    is_finite = torch.isfinite(logits.amax(dim=-1))
    if not all([state.is_plain for state in states]):
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if not state.is_plain:
                state.adjust(row)
    chosen = logits.argmax(dim=-1)
    for truncates in (False, True):
        rows = [i for i, s in enumerate(states) if not s.is_greedy and _truncates(s) is truncates]
        if rows:
            index = to_device(torch.tensor(rows), logits.device)
            some = logits if len(rows) == len(states) else logits.index_select(0, index)
            chosen.index_copy_(0, index, draw(some, [states[i] for i in rows], sort=truncates))
    token_ids = to_host(torch.where(is_finite, chosen, -1)).tolist()
    return [token_id if token_id >= 0 else None for token_id in token_ids]


def draw(logits: Tensor, states: Sequence[SamplerState], *, sort: bool) -> Tensor:
    """(n,) int64: draws from each row of `logits` (n, vocab); see `sampler._draw`."""
    size = logits.shape[1]
    numbers = [
        (s.params.temperature, s.params.top_k or size, s.params.top_p, s.params.min_p, s.uniform())
        for s in states
    ]
    columns = to_device(torch.tensor(numbers, dtype=torch.float64), logits.device).T.unsqueeze(-1)
    temperature, top_k, top_p, min_p, uniform = columns
    scaled = logits / temperature.float()
    order: Tensor | None = None
    if sort:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(size, device=logits.device)
        scaled = scaled.masked_fill(rank >= top_k, -torch.inf)
        weights = torch.softmax(scaled, dim=-1).double()
        scaled = scaled.masked_fill((weights.cumsum(dim=-1) - weights >= top_p) & (rank > 0), -torch.inf)
    if any(s.params.min_p > 0.0 for s in states):
        highest = scaled.amax(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(scaled < highest + min_p.log().float(), -torch.inf)
    cumulative = torch.softmax(scaled, dim=-1).double().cumsum(dim=-1)
    target = uniform * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, target, right=True).clamp(max=size - 1)
    return (places if order is None else order.gather(1, places)).squeeze(1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A few values of the host; does not wait for what the device does."""
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Waits for values of the device, in pinned memory."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return host


def _truncates(state: SamplerState) -> bool:
    return state.params.top_k > 0 or state.params.top_p < 1.0
