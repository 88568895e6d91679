"""What a table does to a model's perplexity; of two tables, what the change does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache import FGramTable
from scone.model_store.checkpoint import Checkpoint
from scone.model_store.corpus import read_documents
from scone.model_store.decoder import Decoder
from scone.model_store.perplexity import SEQ_LEN, describe_change, measure_perplexity
from scone.model_store.token_stream import TokenStream
from scone.model_store.tokenize_corpus import tokenize


class TableInputs:
    """Embeddings whose matched positions come from a table, counting matches by length."""

    def __init__(self, decoder: Decoder, table: FGramTable) -> None:
        self._decoder, self._table = decoder, table
        self.positions_by_n = np.zeros(table.max_n + 1, dtype=np.int64)

    def __call__(self, windows: NDArray[np.int32]) -> Tensor:
        """Of windows (num_windows, seq): (num_windows, seq, dim)."""
        return torch.stack([self._embed(window) for window in windows])

    def _embed(self, input_ids: NDArray[np.int32]) -> Tensor:
        row_ids, matched_len = self._table.match(input_ids)
        self.positions_by_n += np.bincount(matched_len, minlength=len(self.positions_by_n))
        token_ids = torch.from_numpy(input_ids.astype(np.int64)).to(self._decoder.device)
        embeddings = self._decoder.embed(token_ids).cpu().clone()
        self._table.read_into(row_ids, embeddings)
        return embeddings.to(self._decoder.device)


def open_table_of(checkpoint: Checkpoint, path: str | Path) -> FGramTable:
    """A table that belongs to the checkpoint's model; raises TableError."""
    table = FGramTable.open(path)
    table.check_model(checkpoint.model_hash, checkpoint.tokenizer().hash)
    return table


def describe_table_change(
    checkpoint: Checkpoint, before: Path, after: Path, corpus: Sequence[str], max_tokens: int
) -> str:
    """One line: held-out perplexity with the table `before` and with the table `after`."""
    tokenizer, decoder = checkpoint.tokenizer(), checkpoint.decoder()
    stream = TokenStream.from_corpus(tokenize(read_documents(corpus), tokenizer), tokenizer)
    with open_table_of(checkpoint, before) as old, open_table_of(checkpoint, after) as new:
        embeds = [TableInputs(decoder, old), TableInputs(decoder, new)]
        was, is_now = measure_perplexity(decoder, stream, embeds, SEQ_LEN, max_tokens)
    return describe_change(was, is_now)
