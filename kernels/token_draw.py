"""The next token of each row of logits, and log-probabilities: all rows of a step in one call.

Native (native/token_draw.hpp). Weights of tokens, and so every sum of them, are integers: a row's token
depends on its own logits and number alone, whatever else is in the step, and is the same with every
instruction set and in the oracle. Weights below 2^-45 of the greatest are zero.

The `*_reference` functions are the oracle, which is used where the extension was not built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scone.kernels.extension import native
from scone.kernels.packed_linear import Workspace

WEIGHT_BITS = 44
"""The greatest token of a row weighs 2^44, so that 2^18 tokens of that weight still make an int64."""


class Draw(NamedTuple):
    """How one row's token is chosen; see `SamplingParams`.

    Attributes:
        temperature: 0 is the first greatest logit.
        top_k: that many tokens with the greatest logits, equal ones by token id; 0 is all.
        top_p: of these, by falling logit, the fewest that make up this share of their probability; 1 is all.
        min_p: of these, those with at least this share of the greatest one's probability; 0 is all.
        number: in [0, 1), a multiple of 2^-53, where the distribution function of what is left is inverted:
            by falling logit with top_k or top_p, else by token id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.0


def draw_tokens(workspace: Workspace | None, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """A token for each row of `logits` (n, vocab) float32 on the CPU; of -inf alone, +inf or NaN: None.

    Without a workspace the oracle chooses.
    """
    if workspace is None:
        return [draw_reference(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert native is not None
    columns = torch.tensor(
        [(d.temperature, d.top_k, d.top_p, _log(d.min_p), d.number) for d in draws], dtype=torch.float64
    )
    tokens = torch.empty(len(draws), dtype=torch.int64)
    native.draw_tokens(workspace.native, logits.contiguous(), columns, tokens)
    return [token if token >= 0 else None for token in tokens.tolist()]


def log_probabilities(
    workspace: Workspace | None, logits: Tensor, token_ids: Sequence[int], num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (n,) of one token per row of `logits` (n, vocab) float32 on the CPU; and the greatest
    ones (n, num_top) by falling value, equal ones by token id, with their int64 token ids.

    NaN for a row that is not finite; -inf past the last possible token. No second (n, vocab) array is formed.
    """
    if workspace is None:
        return log_probabilities_reference(logits, token_ids, num_top)
    assert native is not None
    num_top = min(num_top, logits.shape[1])
    logprobs, top_logprobs = torch.empty(len(logits)), torch.empty(len(logits), num_top)
    top_ids = torch.empty(len(logits), num_top, dtype=torch.int64)
    native.log_probabilities(
        workspace.native, logits.contiguous(), torch.tensor(token_ids), logprobs, top_logprobs, top_ids
    )
    return logprobs, top_logprobs, top_ids


def draw_reference(logits: Tensor, draw: Draw) -> int | None:
    """One row (vocab,), by definition: everything is sorted."""
    highest = logits.max()
    values = logits / (draw.temperature or 1.0)
    if not (highest.isfinite() and values.max().isfinite()):
        return None
    if draw.temperature == 0.0:
        return int((logits == highest).nonzero()[0])
    weights = weights_reference(values)
    token_ids = torch.arange(len(logits))
    floor = values.max() + _log(draw.min_p)
    if 0 < draw.top_k < len(logits) or draw.top_p < 1.0:
        token_ids = values.argsort(descending=True, stable=True)[: draw.top_k or None]
        before = weights[token_ids].cumsum(0) - weights[token_ids]
        limit = max(1, math.ceil(draw.top_p * int(weights[token_ids].sum())))
        token_ids = token_ids[before < limit]
    token_ids = token_ids[values[token_ids] >= floor]
    reached = weights[token_ids].cumsum(0)
    target = int(draw.number * 2**53) * int(reached[-1]) >> 53
    return int(token_ids[int(torch.searchsorted(reached, target, right=True))])


def log_probabilities_reference(
    logits: Tensor, token_ids: Sequence[int], num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `log_probabilities`."""
    highest = logits.max(dim=-1, keepdim=True).values
    # The standard library's logarithm is that of the kernel, to the last bit; torch's is not.
    logs = [_log(int(weights_reference(row).sum()) / 2.0**WEIGHT_BITS) for row in logits]
    totals = highest.double() + torch.tensor(logs, dtype=torch.float64).unsqueeze(1)
    totals = torch.where(highest.isfinite(), totals, torch.nan)
    chosen = logits.gather(1, torch.tensor(token_ids).unsqueeze(1)) - totals
    top, top_ids = logits.sort(dim=-1, descending=True, stable=True)
    top_logprobs = torch.where(highest.isfinite(), top[:, :num_top] - totals, -torch.inf)
    return chosen.squeeze(1).float(), top_logprobs.float(), top_ids[:, :num_top]


def weights_reference(values: Tensor) -> Tensor:
    """(vocab,) int64: e^(value - greatest value) in units of 2^-44, by the steps that the kernel takes."""
    x = values - values.max()
    bounded = x.clamp(-87.3, 88.3)
    n = (bounded * 1.44269504088896341 + 12582912.0) - 12582912.0
    r = (n * -0.693359375) + bounded
    r = n * 2.12194440e-4 + r
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = p * (r * r) + (r + 1.0)
    power = torch.ldexp(p, n).double()
    return (torch.where(x < -87.3, 0.0, power) * 2.0**WEIGHT_BITS).round().long()


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
