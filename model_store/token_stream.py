"""A corpus as one stream of token ids, from which training and evaluation cut their windows.

Documents are closed by a separator that belongs to no f-gram, so no match ever reaches across two of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scone.model_store.errors import CorpusError
from scone.model_store.token_corpus import TokenCorpus
from scone.model_store.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Token ids (num_tokens,) int32 of all documents, each followed by the separator."""

    input_ids: NDArray[np.int32]

    @classmethod
    def from_corpus(cls, corpus: TokenCorpus, tokenizer: Tokenizer) -> TokenStream:
        """The documents of `corpus` with `tokenizer`'s end-of-text token after each."""
        ends = corpus.offsets[1:]
        return cls(np.insert(corpus.tokens, ends, np.int32(separator_of(tokenizer))))

    def sample_windows(self, batch_size: int, seq_len: int, seed: tuple[int, int]) -> NDArray[np.int32]:
        """Random windows (batch_size, seq_len + 1): inputs and, shifted by one, targets."""
        self._check_length(seq_len)
        starts = np.random.default_rng(seed).integers(0, len(self.input_ids) - seq_len, size=batch_size)
        return np.stack([self.input_ids[s : s + seq_len + 1] for s in starts])

    def spread_windows(self, seq_len: int, max_tokens: int) -> NDArray[np.int32]:
        """Evenly spread, non-overlapping windows (num_windows, seq_len + 1), about `max_tokens` in all."""
        self._check_length(seq_len)
        available = (len(self.input_ids) - 1) // seq_len
        wanted = max(1, min(available, max_tokens // seq_len))
        starts = np.linspace(0, available - 1, wanted).round().astype(np.int64) * seq_len
        return np.stack([self.input_ids[s : s + seq_len + 1] for s in starts])

    def _check_length(self, seq_len: int) -> None:
        if len(self.input_ids) <= seq_len:
            raise CorpusError(
                f"the corpus has {len(self.input_ids)} tokens, wanted more than seq_len {seq_len}: "
                "give more text or a smaller seq_len"
            )


def separator_of(tokenizer: Tokenizer) -> int:
    """`<|endoftext|>` where the vocabulary has it, else the first token that ends a generation."""
    found = tokenizer.backend.token_to_id("<|endoftext|>")
    if found is not None:
        return int(found)
    if tokenizer.eos_ids:
        return tokenizer.eos_ids[0]
    raise CorpusError("the tokenizer has no end-of-text token to put between documents")
