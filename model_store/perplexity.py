"""Perplexity of a decoder over a tokenised corpus, whatever its input layer looks up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.head_loss import token_losses
from scone.model_store.token_stream import TokenStream

SEQ_LEN = 192
"""Tokens per window wherever no other length is asked for, so that figures compare."""

Embed = Callable[[NDArray[np.int32]], Tensor]
"""Embeddings (num_windows, seq, dim), where the decoder is, of input ids (num_windows, seq).

Windows know nothing of each other.
"""

_GROUP_WINDOWS = 8
"""Windows that go through the model together."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-likelihood (nats per token) over `num_tokens` predictions."""

    loss: float
    num_tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.loss)


def describe_change(was: Perplexity, is_now: Perplexity) -> str:
    """One line."""
    return (
        f"perplexity {was.value:.3f} before, {is_now.value:.3f} after"
        f" ({is_now.value - was.value:+.4f}) over {was.num_tokens:,} tokens"
    )


def token_embeddings(decoder: Decoder) -> Embed:
    """The decoder's own token embeddings: no table."""

    def embed(input_ids: NDArray[np.int32]) -> Tensor:
        return decoder.embed(torch.from_numpy(input_ids.astype(np.int64)).to(decoder.device))

    return embed


@torch.inference_mode()
def measure_perplexity(
    decoder: Decoder, corpus: TokenStream, embeds: Sequence[Embed], seq_len: int, max_tokens: int
) -> list[Perplexity]:
    """Perplexity over non-overlapping windows of `seq_len`, once for each way of embedding.

    Each window starts without context, so figures compare only at equal `seq_len`.
    """
    windows = corpus.spread_windows(seq_len, max_tokens)
    positions = torch.arange(seq_len, device=decoder.device)
    totals = [0.0] * len(embeds)
    for start in tqdm(range(0, len(windows), _GROUP_WINDOWS), desc="evaluating", leave=False):
        group = windows[start : start + _GROUP_WINDOWS]
        targets = torch.from_numpy(group[:, 1:].astype(np.int64)).to(decoder.device).flatten()
        for i, embed in enumerate(embeds):
            hidden = decoder(embed(group[:, :-1]), positions.expand(len(group), seq_len), CausalAttention())
            losses = token_losses(hidden.flatten(0, 1), decoder.lm_head.weight, targets)
            totals[i] += float(losses.sum(dtype=torch.float64))
    num_tokens = len(windows) * seq_len
    return [Perplexity(total / num_tokens, num_tokens) for total in totals]
