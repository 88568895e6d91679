"""The draw for a whole batch in a few launches, for a device that the host talks to rarely.

Its slow twin is `token_draw.draw_reference`: the same tokens, up to rounding of probabilities. A row's token
depends on its own logits and `Draw` alone: rows that are sorted and rows that are not are drawn from apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scone.kernels.token_draw import Draw


def draw_together(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each row of `logits` (num_seqs, vocab) float32, (num_seqs,) int64 on their device; -1 where
    they are not finite. Does not wait for the device.
    """
    is_finite = torch.isfinite(logits.amax(dim=-1))
    chosen = logits.argmax(dim=-1)
    for truncates in (False, True):
        rows = [i for i, d in enumerate(draws) if d.temperature > 0.0 and _truncates(d) is truncates]
        if rows:
            index = to_device(torch.tensor(rows), logits.device)
            some = logits if len(rows) == len(draws) else logits.index_select(0, index)
            chosen.index_copy_(0, index, _draw(some, [draws[i] for i in rows], sort=truncates))
    return torch.where(is_finite, chosen, -1)


def _draw(logits: Tensor, draws: Sequence[Draw], *, sort: bool) -> Tensor:
    """(n,) int64: draws from each row of `logits` (n, vocab)."""
    size = logits.shape[1]
    numbers = [(d.temperature, d.top_k or size, d.top_p, d.min_p, d.number) for d in draws]
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
    if any(d.min_p > 0.0 for d in draws):
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
    """Where values of the device will be, in pinned memory, once it has done what is queued by now."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _truncates(draw: Draw) -> bool:
    return draw.top_k > 0 or draw.top_p < 1.0
