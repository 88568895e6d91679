"""What storing rows in a codec costs in quality, on a sample of text and before a table is built.

A row depends on its f-gram alone, so the rows that the sample meets are computed, coded and decoded here with
the bits that the table would have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.row_codec import RowCodec
from scone.model_store.build_table import check_embeddable, embed
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.decoder import Decoder
from scone.model_store.divergence import Divergence, measure_divergence
from scone.model_store.errors import CheckpointError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.perplexity import SEQ_LEN, Embed, Perplexity
from scone.model_store.set_matcher import SetMatcher
from scone.model_store.token_stream import TokenStream


@dataclass(frozen=True, slots=True)
class CodecCost:
    """Held-out figures of raw rows, and of coded rows beside them."""

    raw: Perplexity
    coded: Divergence


class SampleRows:
    """The rows that a text's windows meet, and inputs made of them.

    Attributes:
        row_ids: (n,) int64, distinct and rising.
    """

    def __init__(self, decoder: Decoder, matcher: SetMatcher, stream: TokenStream, max_tokens: int) -> None:
        self._decoder, self._matcher = decoder, matcher
        windows = stream.spread_windows(SEQ_LEN, max_tokens)[:, :-1]
        found = np.unique(matcher.match_all(windows))
        self.row_ids: NDArray[np.int64] = found[found >= 0]

    def inputs(self, rows: Tensor) -> Embed:
        """Embeddings whose matched positions come from `rows` (n, dim), those of `row_ids`."""

        def embed_windows(input_ids: NDArray[np.int32]) -> Tensor:
            row_ids = self._matcher.match_all(input_ids)
            embeddings = self._decoder.embed(torch.from_numpy(input_ids.astype(np.int64))).clone()
            matched = row_ids >= 0
            places = np.searchsorted(self.row_ids, row_ids[matched])
            embeddings[torch.from_numpy(matched)] = rows[torch.from_numpy(places)].to(embeddings.dtype)
            return embeddings

        return embed_windows


def measure_codec_cost(
    checkpoint: Checkpoint, fgrams: FGramSet, codec: RowCodec, heldout: TokenStream, max_tokens: int
) -> CodecCost:
    """Compares rows in `codec` with raw rows of the same dtype.

    Raises:
        CheckpointError: the checkpoint has no f-gram model.
        FGramSetError: the set is empty, or holds f-grams that the model cannot embed.
    """
    decoder = checkpoint.decoder()
    model = checkpoint.fgram_model(decoder)
    if model is None:
        raise CheckpointError(f"{checkpoint.path} has no f-gram model")
    check_embeddable(fgrams, model, checkpoint.config.vocab_size)
    sample = SampleRows(decoder, SetMatcher(fgrams), heldout, max_tokens)
    computed = embed(model, fgrams, sample.row_ids)
    raw, coded = (
        sample.inputs(each.decode_reference(each.encode(computed)))
        for each in (RowCodec("raw", codec.dtype, codec.dim), codec)
    )
    base, (cost,) = measure_divergence(decoder, heldout, raw, [coded], SEQ_LEN, max_tokens)
    return CodecCost(base, cost)
