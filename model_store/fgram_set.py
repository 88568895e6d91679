"""The f-gram set: which n-grams have a row of their own, ranked by corpus count.

One file, `*.fgrams`, safetensors inside: `tokens` int32 (all f-grams back to back, no padding), `lengths`
uint8, `counts` int64, and one JSON metadata entry. An f-gram's position in the set is its rank, and later its
row id.

Source: arXiv 2502.01637, section 3.1.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from scone.model_store.errors import FGramSetError

MIN_N = 2
"""The shortest f-gram; a single token has the token embedding."""

_METADATA_KEY = "scone.fgrams"
_FORMAT_VERSION = 1
_FIELDS = {
    "max_n": int,
    "tokenizer_hash": str,
    "min_count": int,
    "num_corpus_tokens": int,
    "corpus_hash": str,
}


@dataclass(frozen=True, eq=False)
class FGramSet:
    """F-grams in rank order: falling count, then rising length, then token ids in lexicographic order.

    Because an n-gram never occurs more often than its prefix or suffix, any head of that order holds the
    prefix and the suffix of each of its members.

    Attributes:
        tokens: (num_fgrams, max_n) int32, left-aligned, padded with -1.
        lengths: (num_fgrams,) uint8, 2 to max_n.
        counts: (num_fgrams,) int64, occurrences in the corpus.
        tokenizer_hash: hex digest of the tokenizer that made the ids.
        min_count: n-grams rarer than this were not considered.
        num_corpus_tokens: tokens that were counted.
        corpus_hash: hex SHA-256 of the counted token ids and document borders; empty if unknown.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.uint8]
    counts: NDArray[np.int64]
    tokenizer_hash: str
    min_count: int
    num_corpus_tokens: int
    corpus_hash: str = ""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_n(self) -> int:
        """The longest f-gram the set may hold: K of the paper."""
        return int(self.tokens.shape[1])

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the content; two sets with equal hashes build equal tables."""
        digest = hashlib.sha256(json.dumps(self._metadata(), sort_keys=True).encode())
        for array in (self._flat_tokens(), self.lengths, self.counts):
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
        return digest.hexdigest()

    def check_tokenizer(self, tokenizer_hash: str, path: str | os.PathLike[str]) -> None:
        """Raises FGramSetError if the set, read from `path`, is of another tokenizer."""
        if self.tokenizer_hash != tokenizer_hash:
            raise FGramSetError(
                f"{path} was counted with tokenizer {self.tokenizer_hash[:16]}, "
                f"wanted {tokenizer_hash[:16]}, that of the model: count it again with --tokenizer"
            )

    def head(self, num_fgrams: int) -> FGramSet:
        """The `num_fgrams` first f-grams as a set of their own."""
        return FGramSet(
            self.tokens[:num_fgrams],
            self.lengths[:num_fgrams],
            self.counts[:num_fgrams],
            self.tokenizer_hash,
            self.min_count,
            self.num_corpus_tokens,
            self.corpus_hash,
        )

    def is_closed(self) -> bool:
        """Whether the (n-1)-token prefix and suffix of every f-gram of n > 2 tokens are in the set too."""
        # An n-gram is looked up as (id of its prefix, last token), which fits one int64 at every length.
        keys_by_n: list[NDArray[np.int64]] = []
        for n in range(MIN_N, self.max_n + 1):
            grams = self.tokens[self.lengths == n, :n].astype(np.int64)
            if n > MIN_N and not (
                np.all(_find(grams[:, :-1], keys_by_n) >= 0) and np.all(_find(grams[:, 1:], keys_by_n) >= 0)
            ):
                return False
            keys_by_n.append(np.sort(_keys(grams, keys_by_n)))
        return True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the set to `path`, which appears whole or not at all."""
        out = Path(path)
        partial = out.with_name(out.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"tokens": self._flat_tokens(), "lengths": self.lengths, "counts": self.counts}
        # One metadata entry only: safetensors writes several in an order that changes from run to run.
        content = save(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()},
            metadata={_METADATA_KEY: json.dumps(self._metadata(), sort_keys=True)},
        )
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FGramSet:
        """Reads and checks a set written by `save`; raises FGramSetError."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = (file.metadata() or {}).get(_METADATA_KEY)
                if metadata is None:
                    raise FGramSetError(
                        f"{path} is a safetensors file but no f-gram set: write one with `scone count`"
                    )
                flat, lengths, counts = (file.get_tensor(name) for name in ("tokens", "lengths", "counts"))
        except (OSError, SafetensorError) as error:
            raise FGramSetError(f"cannot read the f-gram set {path}: {error}") from None
        fields = _parse_metadata(metadata, path)
        max_n = fields.pop("max_n")
        tokens = _unflatten(flat, lengths, max_n, path)
        fgrams = cls(tokens, lengths, counts, **fields)
        fgrams._check(path)
        return fgrams

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": _FORMAT_VERSION,
            "max_n": self.max_n,
            "tokenizer_hash": self.tokenizer_hash,
            "min_count": self.min_count,
            "num_corpus_tokens": self.num_corpus_tokens,
            "corpus_hash": self.corpus_hash,
        }

    def _flat_tokens(self) -> NDArray[np.int32]:
        flat: NDArray[np.int32] = self.tokens[np.arange(self.max_n) < self.lengths[:, None]]
        return flat

    def _check(self, path: str | os.PathLike[str]) -> None:
        if self.counts.shape != self.lengths.shape or self.counts.dtype != np.int64:
            raise FGramSetError(
                f"{path} is damaged: counts are {self.counts.dtype}{self.counts.shape},"
                f" wanted int64{self.lengths.shape}"
            )
        if not np.array_equal(rank_order(self.tokens, self.lengths, self.counts), np.arange(len(self))):
            raise FGramSetError(f"{path} is damaged: its f-grams are not in rank order (falling count)")
        if np.any(np.all(self.tokens[1:] == self.tokens[:-1], axis=1)):
            raise FGramSetError(f"{path} is damaged: an f-gram occurs twice")


def rank_order(
    tokens: NDArray[np.int32], lengths: NDArray[np.uint8], counts: NDArray[np.int64]
) -> NDArray[np.intp]:
    """The permutation that sorts f-grams by (-count, n, tokens); arrays as in FGramSet."""
    columns: list[NDArray[Any]] = [tokens[:, i] for i in range(tokens.shape[1] - 1, -1, -1)]
    return np.lexsort([*columns, lengths, -counts])


def _keys(grams: NDArray[np.int64], keys_by_n: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(m, n) token ids -> (m,) int64: (index of the prefix among its sorted keys) << 32 | last token."""
    prefix = grams[:, 0] if grams.shape[1] == MIN_N else _find(grams[:, :-1], keys_by_n)
    key: NDArray[np.int64] = (prefix << 32) | grams[:, -1]
    return key


def _find(grams: NDArray[np.int64], keys_by_n: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(m, n) token ids -> (m,) int64 index among the sorted keys of length n, -1 where absent."""
    known = keys_by_n[grams.shape[1] - MIN_N]
    if not len(known):
        return np.full(len(grams), -1, np.int64)
    keys = _keys(grams, keys_by_n)
    found = np.searchsorted(known, keys)
    return np.where(known[np.minimum(found, len(known) - 1)] == keys, found, -1)


def _parse_metadata(metadata: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        fields = json.loads(metadata)
        version = fields.pop("format_version")
        damaged = fields.keys() != _FIELDS.keys() or any(type(fields[k]) is not t for k, t in _FIELDS.items())
    except (ValueError, KeyError, AttributeError, TypeError):
        damaged, version = True, _FORMAT_VERSION
    if version != _FORMAT_VERSION:
        raise FGramSetError(
            f"{path} has f-gram set format version {version}, wanted {_FORMAT_VERSION}: count again"
        )
    if damaged:
        raise FGramSetError(f"{path} is damaged: its metadata lacks a field of {', '.join(_FIELDS)}")
    assert isinstance(fields, dict)
    return fields


def _unflatten(
    flat: NDArray[Any], lengths: NDArray[Any], max_n: int, path: str | os.PathLike[str]
) -> NDArray[np.int32]:
    """Back-to-back token ids -> (num_fgrams, max_n) padded with -1."""
    if flat.dtype != np.int32 or flat.ndim != 1 or lengths.dtype != np.uint8 or lengths.ndim != 1:
        raise FGramSetError(
            f"{path} is damaged: tokens are {flat.dtype}, lengths {lengths.dtype}, wanted int32 and uint8"
        )
    if not 2 <= max_n <= 255 or (len(lengths) and (lengths.min() < MIN_N or lengths.max() > max_n)):
        raise FGramSetError(f"{path} is damaged: f-gram lengths outside {MIN_N} to {max_n}")
    if int(lengths.sum(dtype=np.int64)) != len(flat) or np.any(flat < 0):
        raise FGramSetError(f"{path} is damaged: {len(flat)} token ids do not fit the lengths")
    tokens = np.full((len(lengths), max_n), -1, np.int32)
    tokens[np.arange(max_n) < lengths[:, None]] = flat
    return tokens
