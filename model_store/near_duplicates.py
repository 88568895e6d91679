"""Near-duplicate documents: clusters by MinHash, a split that keeps clusters apart, overlap of texts.

Documents are compared as sets of word shingles (runs of 8 words). Candidates come from MinHash bands, and
each is verified by the exact Jaccard index, so a cluster holds no chance hits. Sources: Broder 1997; Lee et
al. 2022 (arXiv 2107.06499) for the use on training text. Every hash is stable across runs and machines.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

SHINGLE_WORDS = 8
"""Words per shingle when clustering."""
OVERLAP_WORDS = 13
"""Words per shingle when held-out text is compared with training text (as GPT-3's contamination check)."""

# 42 bands of 3 values: a pair of Jaccard 0.5 is missed with probability (1 - 0.5**3)**42 = 0.4 %.
_NUM_BANDS, _BAND_VALUES = 42, 3
_WORD = re.compile(r"\w+")

Shingles = NDArray[np.uint64]
"""Sorted distinct 64-bit shingle hashes of one document."""


class ShingleHasher:
    """Turns text into shingle hashes; remembers the hash of each distinct word."""

    def __init__(self) -> None:
        self._word_hashes: dict[str, int] = {}

    def shingles(self, text: str, num_words: int) -> Shingles:
        """Hashes of all runs of `num_words` words (case folded); a shorter text counts as one run."""
        words = _WORD.findall(text.casefold())
        hashes = np.array([self._word_hash(word) for word in words] or [0], np.uint64)
        width = min(num_words, len(hashes))
        runs = np.zeros(len(hashes) - width + 1, np.uint64)
        for offset in range(width):
            runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(runs)]
        return np.unique(_mix(runs))

    def _word_hash(self, word: str) -> int:
        known = self._word_hashes.get(word)
        if known is None:
            known = stable_hash(word)
            self._word_hashes[word] = known
        return known


def stable_hash(text: str) -> int:
    """64-bit hash of `text`, the same on every run and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def cluster(documents: Sequence[Shingles], min_jaccard: float = 0.5) -> NDArray[np.int64]:
    """(num_documents,) cluster of each document: the smallest document number linked to it.

    Two documents are linked when their Jaccard index is at least `min_jaccard`; links are transitive.
    """
    parents = np.arange(len(documents), dtype=np.int64)
    for left, right in _candidate_pairs(documents):
        left_root, right_root = _root(parents, left), _root(parents, right)
        if left_root != right_root and jaccard(documents[left], documents[right]) >= min_jaccard:
            parents[max(left_root, right_root)] = min(left_root, right_root)
    return np.array([_root(parents, i) for i in range(len(documents))], np.int64)


def jaccard(left: Shingles, right: Shingles) -> float:
    """Shared shingles over all shingles of two documents."""
    num_shared = len(np.intersect1d(left, right, assume_unique=True))
    return num_shared / max(len(left) + len(right) - num_shared, 1)


def overlap(documents: Iterable[Shingles], reference: Iterable[Shingles]) -> list[float]:
    """For each document, the share of its shingles that occur anywhere in `reference`."""
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *reference]))
    return [float(np.isin(d, known, assume_unique=True).mean()) for d in documents]


def _candidate_pairs(documents: Sequence[Shingles]) -> list[tuple[int, int]]:
    """Pairs that agree in all values of a MinHash band, each once."""
    signatures = np.stack([_min_hashes(d) for d in tqdm(documents, desc="MinHash", unit="doc", leave=False)])
    pairs: set[tuple[int, int]] = set()
    for band in np.split(signatures, _NUM_BANDS, axis=1):
        keys = _mix(band @ np.array([1, 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03], np.uint64))
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        # Neighbours suffice: links are transitive, and m documents give m - 1 pairs instead of m**2.
        pairs.update(zip(order[same].tolist(), order[same + 1].tolist(), strict=True))
    return sorted(pairs)


def _min_hashes(shingles: Shingles) -> NDArray[np.uint64]:
    """(num_hashes,) smallest value of each of the hash functions over the document's shingles."""
    functions = _mix(np.arange(1, _NUM_BANDS * _BAND_VALUES + 1, dtype=np.uint64))
    smallest = np.full(len(functions), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), 4096):
        values = _mix(shingles[start : start + 4096, None] ^ functions)
        np.minimum(smallest, values.min(axis=0), out=smallest)
    return smallest


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _root(parents: NDArray[np.int64], node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = int(parents[node])
    return node
