"""Longest matches against an f-gram set that has no table yet: in training, and before a build.

Makes the index that a table of the set would have, in memory, and matches with the server's own matcher.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scone.kernels.fgram_hash import BUCKET_DTYPE
from scone.kernels.match import BucketIndex, Matcher, Matches
from scone.model_store.fgram_index import build_index
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_header import HEADER_BYTES

_FP_BITS = 64


class SetMatcher:
    """Matches token ids against one set; row ids are ranks in it. Raises TableError if no index holds it."""

    def __init__(self, fgrams: FGramSet) -> None:
        with tempfile.TemporaryDirectory(prefix="scone-index-") as folder:
            path = Path(folder) / "index.bin"
            shape = build_index(fgrams, path, table_id="00" * 32, fp_bits=_FP_BITS)
            buckets = np.fromfile(path, BUCKET_DTYPE, offset=HEADER_BYTES)
        self._matcher = Matcher(
            BucketIndex(
                buckets,
                shape.num_home_buckets,
                shape.hash_seed,
                _FP_BITS,
                fgrams.max_n,
                fgrams.is_closed(),
            )
        )

    def match(self, input_ids: NDArray[np.integer]) -> Matches:
        """Row ids (n,) int64, -1 for none, and matched lengths (n,) int8 of one sequence (n,)."""
        return self._matcher.match(input_ids)

    def match_all(self, sequences: NDArray[np.integer]) -> NDArray[np.int64]:
        """Row ids (batch, seq), -1 for none, of sequences (batch, seq) that know nothing of each other."""
        batch, seq_len = sequences.shape
        starts = np.arange(batch + 1, dtype=np.int64) * seq_len
        return self._matcher.match(sequences.reshape(-1), starts)[0].reshape(batch, seq_len)

    def find(self, tokens: NDArray[np.int32], lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Ranks (m,) of f-grams, tokens (m, any) and lengths (m,) as in FGramSet; -1 if not in the set."""
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        present = np.arange(tokens.shape[1]) < lengths[:, None]
        row_ids, matched_len = self._matcher.match(tokens[present], starts)
        last = starts[1:] - 1  # where all of the f-gram matches, or less than it
        return np.where(matched_len[last] == lengths, row_ids[last], -1)
