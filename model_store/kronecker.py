"""Kronecker token embeddings: each token's bytes at their positions, through one projection.

For a token of bytes b_1 ... b_L, at most P of them, and D = 256 P:

    kappa = sum_p onehot(b_p P + p - 1) / sqrt(L)
    e = W (kappa - mean(kappa)) / (std(kappa) + 1e-6)

with the unbiased std over D values and W (dim, D), which is all that is trained; e = 0 for L = 0. Since kappa
has L equal values and zeros, mean and std follow from L alone, and e is a sum of L rows of W^T less a
constant vector: no D x dim product is ever made.

Source: Shravan, Kronecker Embeddings, arXiv 2605.29459; the package kronecker-embeddings 0.1.1, with whose
vectors tests compare. One difference, on purpose: bytes are those of the vocabulary's own piece, not of its
decoded text, in which every token that is a part of a character is the same U+FFFD.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from scone.model_store.errors import TokenizerError
from scone.model_store.tokenizer import Tokenizer

NUM_BYTES = 256
EPSILON = 1e-6

_logger = logging.getLogger(__name__)


class KroneckerEmbedding(nn.Module):
    """Takes the place of `nn.Embedding` in a decoder; `read_tokens` comes before the first use.

    Parameters: `projection.weight` (dim, 256 * num_positions). The tokens' bytes are not among them.
    """

    def __init__(self, vocab_size: int, dim: int, num_positions: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.projection = nn.Linear(NUM_BYTES * num_positions, dim, bias=False, dtype=torch.float32)
        self._bytes: Tensor
        self._lengths: Tensor
        with torch.device("cpu"):  # real also while the weights are still on "meta"
            self.register_buffer(
                "_bytes", torch.zeros(vocab_size, num_positions, dtype=torch.uint8), persistent=False
            )
            self.register_buffer("_lengths", torch.zeros(vocab_size, dtype=torch.int16), persistent=False)
        self._rows: tuple[Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        """The paper's start: normal values of deviation 1 / sqrt(D)."""
        nn.init.normal_(self.projection.weight, std=self.num_code_values**-0.5)

    @property
    def num_code_values(self) -> int:
        """D, the length of a token's code."""
        return NUM_BYTES * self.num_positions

    def read_tokens(self, token_bytes: Sequence[bytes]) -> TokenAudit:
        """Takes each token's bytes, in order of ids; longer ones are cut at a character's border."""
        values, lengths = pack_bytes(token_bytes, len(self._lengths), self.num_positions)
        self._bytes = torch.from_numpy(values).to(self._bytes.device)
        self._lengths = torch.from_numpy(lengths).to(self._lengths.device)
        return audit_tokens(token_bytes, self.num_positions)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (..., dim) of input_ids (...,), in the projection's dtype."""
        flat = input_ids.reshape(-1)
        rows, mean_row = self._projection_rows()
        lengths = self._lengths[flat].float()
        places = torch.arange(self.num_positions, device=flat.device)
        codes = self._bytes[flat].long() * self.num_positions + places
        used = places < lengths.unsqueeze(1)
        # the row past the last is zeros: a sum over equally many places needs no offsets
        codes = torch.where(used, codes, self.num_code_values)
        sums = functional.embedding_bag(codes, rows, mode="sum", padding_idx=self.num_code_values)
        num_values = self.num_code_values
        deviation = ((1 - lengths / num_values) / (num_values - 1)).sqrt() + EPSILON
        root = lengths.sqrt()
        embeddings = sums / (root.clamp(min=1) * deviation).unsqueeze(1)
        embeddings = embeddings - (root / (num_values * deviation)).unsqueeze(1) * mean_row
        return embeddings.to(self.projection.weight.dtype).view(*input_ids.shape, -1)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The same as an ordinary table (vocab_size, dim): the embeddings of all tokens, bit for bit."""
        ids = torch.arange(len(self._lengths), device=self._lengths.device)
        return torch.cat([self(part) for part in torch.split(ids, 4096)])

    def train(self, mode: bool = True) -> KroneckerEmbedding:
        self._rows = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> KroneckerEmbedding:
        self._rows = None  # they follow to another device when they are made again
        moved: KroneckerEmbedding = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _projection_rows(self) -> tuple[Tensor, Tensor]:
        """W^T in float32 with a row of zeros at its end (D + 1, dim), and the sum of its rows (dim,)."""
        if self._rows is not None:
            return self._rows
        weight = self.projection.weight.float()
        made = torch.cat((weight.T, weight.new_zeros(1, len(weight)))), weight.sum(1)
        if not self.training:  # weights stand still
            self._rows = made
        return made


@dataclass(frozen=True, slots=True)
class TokenAudit:
    """What a vocabulary loses in codes of so many positions.

    Attributes:
        num_cut: tokens longer than the code.
        num_collided: tokens whose code another token has too, so that they are one token to the model.
        num_empty: tokens without bytes, whose embedding is zero.
        saving: share of a dense table's numbers that the projection does without; negative if it has more.
    """

    num_tokens: int
    num_positions: int
    num_cut: int
    num_collided: int
    num_empty: int
    saving: float

    def __str__(self) -> str:
        return (
            f"Kronecker embeddings of {self.num_positions} bytes: {self.num_tokens:,} tokens,"
            f" {self.num_cut:,} cut, {self.num_collided:,} share a code with another,"
            f" {self.num_empty:,} without bytes; {self.saving:.1%} fewer numbers than a dense table"
        )


def audit_tokens(token_bytes: Sequence[bytes], num_positions: int) -> TokenAudit:
    """Counts what the codes lose of these tokens."""
    codes = [cut_bytes(piece, num_positions) for piece in token_bytes if piece]
    seen: dict[bytes, int] = {}
    for code in codes:
        seen[code] = seen.get(code, 0) + 1
    return TokenAudit(
        num_tokens=len(token_bytes),
        num_positions=num_positions,
        num_cut=sum(len(piece) > num_positions for piece in token_bytes),
        num_collided=sum(count for count in seen.values() if count > 1),
        num_empty=len(token_bytes) - len(codes),
        saving=1 - NUM_BYTES * num_positions / len(token_bytes),
    )


def bytes_of_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Each id's bytes; none where the vocabulary has a gap, or the model more ids than the tokenizer."""

    def piece(token_id: int) -> bytes:
        try:
            return tokenizer.token_bytes(token_id)
        except TokenizerError:
            return b""

    return [piece(token_id) for token_id in range(vocab_size)]


def pack_bytes(
    token_bytes: Sequence[bytes], vocab_size: int, num_positions: int
) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """(vocab_size, num_positions) padded bytes and (vocab_size,) lengths."""
    values = np.zeros((vocab_size, num_positions), np.uint8)
    lengths = np.zeros(vocab_size, np.int16)
    for token_id, piece in enumerate(token_bytes):
        cut = cut_bytes(piece, num_positions)
        values[token_id, : len(cut)] = np.frombuffer(cut, np.uint8)
        lengths[token_id] = len(cut)
    return values, lengths


def cut_bytes(piece: bytes, num_positions: int) -> bytes:
    """The first `num_positions` bytes, or up to three fewer where those would end inside a character."""
    if len(piece) <= num_positions:
        return piece
    end = num_positions
    while end > max(0, num_positions - 3) and piece[end] & 0xC0 == 0x80:  # a byte that goes on
        end -= 1
    return piece[:end]


def log_audit(audit: TokenAudit) -> None:
    """Says it in the log, as a warning where tokens have become one."""
    _logger.log(logging.WARNING if audit.num_collided else logging.INFO, "%s", audit)
