"""Next-token loss over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 128  # 128 x 49,152 float32 logits are 25 MB: near the last-level cache


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy, its gradients made chunk by chunk on the way; the head's only if it wants one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        gradient = torch.empty_like(hidden)
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            logits = hidden[chunk] @ head.T
            normaliser = logits.logsumexp(-1, keepdim=True)
            picked = targets[chunk].unsqueeze(1)
            total += (normaliser - logits.gather(1, picked)).sum()
            probabilities = logits.sub_(normaliser).exp_()
            probabilities.scatter_add_(1, picked, torch.full_like(probabilities[:, :1], -1.0))
            torch.mm(probabilities, head, out=gradient[chunk])
            if of_head is not None:
                of_head.addmm_(probabilities.T, hidden[chunk])
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
    losses = torch.empty(len(hidden))
    for start in range(0, len(hidden), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        logits = (hidden[chunk] @ head.T).float()
        losses[chunk] = logits.logsumexp(-1) - logits.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
    return losses
