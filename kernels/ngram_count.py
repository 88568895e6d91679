"""The inner loops of counting n-grams: their keys, how often each occurs, and the ids of those that passed.

Each runs natively (native/ngram_count.cpp, without the GIL) or, without the extension, on its NumPy oracle;
the results are equal. Knows neither files nor what the counts are for.

An n-gram is built from known (n-1)-grams: `gram_ids[i]` is the id of the one that begins at token i, -1 if
none does. For n = 2 a token is its own id. The key is `gram_ids[i] << 32 | tokens[i + n - 1]`, if both
(n-1)-grams in it are known and no document begins within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.kernels.extension import native

TOKEN_BITS = 32
"""A key's low bits hold the last token, the rest the prefix's id."""


@dataclass(frozen=True, slots=True, eq=False)
class NGramSource:
    """What n-grams of one length are read from; arrays may be maps of files.

    Attributes:
        tokens: (num_tokens,) int32, all documents back to back.
        gram_ids: (num_tokens,) int32, the known (n-1)-gram that begins at each token.
        borders: (num_documents + 1,) int64, where documents begin, and the end.
        n: length of the n-grams.
    """

    tokens: NDArray[np.int32]
    gram_ids: NDArray[np.int32]
    borders: NDArray[np.int64]
    n: int

    @property
    def num_starts(self) -> int:
        """Positions at which an n-gram could begin."""
        return max(len(self.tokens) - self.n + 1, 0)


def ngram_keys(
    source: NGramSource, start: int, end: int, num_partitions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The keys of the n-grams that begin in [start, end), dealt into partitions by hash.

    Returns the keys, and (num_partitions + 1,) bounds: partition p is keys[bounds[p] : bounds[p + 1]].
    """
    assert 0 <= start <= end <= source.num_starts
    if native is None:
        return ngram_keys_reference(source, start, end, num_partitions)
    keys, bounds = np.empty(end - start, np.int64), np.empty(num_partitions + 1, np.int64)
    num_keys = native.ngram_keys(
        source.tokens, source.gram_ids, source.borders, source.n, start, end, keys, bounds
    )
    return keys[:num_keys], bounds


def ngram_keys_reference(
    source: NGramSource, start: int, end: int, num_partitions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The oracle of `ngram_keys`."""
    keys = _keys_at(source, start, end)
    keys = keys[keys >= 0]
    partitions = _partition_of(keys, num_partitions)
    order = np.argsort(partitions, kind="stable")
    return keys[order], np.searchsorted(partitions[order], np.arange(num_partitions + 1))


def count_keys(keys: NDArray[np.int64], min_count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct keys that occur `min_count` times or more, sorted, and their counts."""
    if native is None:
        return count_keys_reference(keys, min_count)
    counted: tuple[NDArray[np.int64], NDArray[np.int64]] = native.count_keys(keys, min_count)
    return counted


def count_keys_reference(
    keys: NDArray[np.int64], min_count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The oracle of `count_keys`."""
    distinct, counts = np.unique(keys, return_counts=True)
    return distinct[counts >= min_count], counts[counts >= min_count].astype(np.int64)


class KeyIndex:
    """Finds the id of an n-gram: the place of its key among sorted keys. Thread-safe."""

    def __init__(self, keys: NDArray[np.int64]) -> None:
        self._keys = keys
        self._native: Any = None if native is None else native.KeyIndex(keys)

    def next_ids(self, source: NGramSource, start: int, end: int) -> NDArray[np.int32]:
        """(end - start,) the id of the n-gram that begins at each position, -1 where none is known."""
        assert 0 <= start <= end <= source.num_starts
        if self._native is None:
            return next_ids_reference(self._keys, source, start, end)
        ids = np.empty(end - start, np.int32)
        self._native.next_ids(source.tokens, source.gram_ids, source.borders, source.n, start, end, ids)
        return ids


def next_ids_reference(
    sorted_keys: NDArray[np.int64], source: NGramSource, start: int, end: int
) -> NDArray[np.int32]:
    """The oracle of `KeyIndex.next_ids`."""
    keys = _keys_at(source, start, end)
    if not len(sorted_keys):
        return np.full(len(keys), -1, np.int32)
    found = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[found] == keys, found, -1).astype(np.int32)


def _keys_at(source: NGramSource, start: int, end: int) -> NDArray[np.int64]:
    """(end - start,) the key of the n-gram that begins at each position, -1 where there is none."""
    prefixes, suffixes = source.gram_ids[start:end], source.gram_ids[start + 1 : end + 1]
    last_tokens = source.tokens[start + source.n - 1 : end + source.n - 1]
    keys = (prefixes.astype(np.int64) << TOKEN_BITS) | last_tokens
    keys[(prefixes < 0) | (suffixes < 0)] = -1
    # A longer n-gram over a border has a part that crosses it and has no id.
    borders = source.borders[slice(*np.searchsorted(source.borders, [start + 1, end + 1]))]
    keys[borders - 1 - start] = -1
    return keys


def _partition_of(keys: NDArray[np.int64], num_partitions: int) -> NDArray[np.uint64]:
    """splitmix64's finalizer, scaled to [0, num_partitions)."""
    x = keys.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    # the high half of a 128-bit product; the low half of a 64 x 32-bit one cannot carry into it
    low = (x & np.uint64(0xFFFFFFFF)) * np.uint64(num_partitions)
    return ((x >> np.uint64(32)) * np.uint64(num_partitions) + (low >> np.uint64(32))) >> np.uint64(32)
