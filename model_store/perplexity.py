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
"""Embeddings (seq, dim), where the decoder is, of input ids (seq,)."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-likelihood (nats per token) over `num_tokens` predictions."""

    loss: float
    num_tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.loss)


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
    for window in tqdm(windows, desc="evaluating", unit="window", leave=False):
        targets = torch.from_numpy(window[1:].astype(np.int64)).to(decoder.device)
        for i, embed in enumerate(embeds):
            hidden = decoder(embed(window[:-1]).unsqueeze(0), positions.unsqueeze(0), CausalAttention())
            totals[i] += float(
                token_losses(hidden[0], decoder.lm_head.weight, targets).sum(dtype=torch.float64)
            )
    num_tokens = len(windows) * seq_len
    return [Perplexity(total / num_tokens, num_tokens) for total in totals]
