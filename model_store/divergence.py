"""How far a model's predictions move when its inputs are changed a little: perplexity and KL divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.head_loss import CHUNK_ROWS
from scone.model_store.perplexity import Embed, Perplexity
from scone.model_store.token_stream import TokenStream


@dataclass(frozen=True, slots=True)
class Divergence:
    """Predictions beside those of a reference.

    Attributes:
        kl: mean of KL(reference || these) over all positions, nats per token.
        delta: perplexity less the reference's.
    """

    perplexity: Perplexity
    kl: float
    delta: float


@torch.inference_mode()
def measure_divergence(
    decoder: Decoder,
    corpus: TokenStream,
    reference: Embed,
    others: Sequence[Embed],
    seq_len: int,
    max_tokens: int,
) -> tuple[Perplexity, list[Divergence]]:
    """The reference's perplexity, and each other way of embedding beside it, over the same windows.

    Windows are those of `measure_perplexity`: each starts without context.
    """
    windows = corpus.spread_windows(seq_len, max_tokens)
    positions = torch.arange(seq_len).unsqueeze(0)
    losses, kls = np.zeros(1 + len(others)), np.zeros(len(others))
    for window in tqdm(windows, desc="comparing", unit="window", leave=False):
        targets = torch.from_numpy(window[1:].astype(np.int64))
        hidden = [
            decoder(embed(window[None, :-1]), positions, CausalAttention())[0]
            for embed in (reference, *others)
        ]
        for start in range(0, seq_len, CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            wanted = _log_probabilities(decoder, hidden[0][chunk])
            losses[0] += _loss(wanted, targets[chunk])
            for i, other in enumerate(hidden[1:]):
                found = _log_probabilities(decoder, other[chunk])
                losses[1 + i] += _loss(found, targets[chunk])
                kls[i] += float((wanted.exp() * (wanted - found)).sum(dtype=torch.float64))
    num_tokens = len(windows) * seq_len
    base, *rest = (Perplexity(float(loss) / num_tokens, num_tokens) for loss in losses)
    return base, [
        Divergence(perplexity, float(kl) / num_tokens, perplexity.value - base.value)
        for perplexity, kl in zip(rest, kls, strict=True)
    ]


def _log_probabilities(decoder: Decoder, hidden: Tensor) -> Tensor:
    return decoder.logits(hidden).float().log_softmax(-1)


def _loss(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64))
