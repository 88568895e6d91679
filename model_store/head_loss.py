"""Next-token loss over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 128
"""On a CPU: 128 x 49,152 float32 logits are 25 MB, near the last-level cache."""

_GPU_CHUNK_ROWS = 4096
"""Enough that launching kernels costs nothing; 0.8 GB of logits at a vocabulary of 49,152."""


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy, its gradients made chunk by chunk on the way; the head's only if it wants one.

    Matrix products are in autocast's type where it is on, everything else in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        dtype = _product_dtype(hidden)
        weight = head.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden):
            inputs = hidden[chunk].to(dtype)
            logits = (inputs @ weight.T).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            picked = targets[chunk].unsqueeze(1)
            total += (normaliser - logits.gather(1, picked)).sum()
            probabilities = logits.sub_(normaliser).exp_()
            probabilities.scatter_add_(1, picked, torch.full_like(probabilities[:, :1], -1.0))
            errors = probabilities.to(dtype)
            gradient[chunk] = errors @ weight
            if of_head is not None:
                if dtype == of_head.dtype:
                    of_head.addmm_(errors.T, inputs)
                else:
                    of_head += errors.T @ inputs
        ctx.save_for_backward(gradient.div_(len(hidden)))
        ctx.of_head = None if of_head is None else of_head.div_(len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        of_head = None if ctx.of_head is None else ctx.of_head * upstream[0]
        return gradient * upstream[0], of_head, None


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of hidden (n, dim) through head (vocab, dim) against targets (n,)."""
    loss: Tensor = _HeadLoss.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


@torch.inference_mode()
def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (n,) float32, in nats, of each row of hidden (n, dim) against targets (n,)."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for chunk in _chunks(hidden):
        logits = (hidden[chunk] @ head.T).float()
        losses[chunk] = logits.logsumexp(-1) - logits.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
    return losses


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _chunks(hidden: Tensor) -> list[slice]:
    size = CHUNK_ROWS if hidden.device.type == "cpu" else _GPU_CHUNK_ROWS
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
