"""Counts the f-gram set of a corpus: all n-grams of 2 to K tokens, one ranking by count, the top S.

Source: arXiv 2502.01637, section 3.1 and 4.2: one scan per n, n-grams rarer than a minimum dropped, and an
n-gram counted only if its (n-1)-token prefix and suffix passed. Documents are never joined.

An n-gram is counted under the key `id of its prefix << 32 | last token`, where the id is the prefix's place
in the sorted keys of length n-1: it fits int64 at every length, and sorted keys are n-grams in lexicographic
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scone.model_store.fgram_set import MIN_N, FGramSet
from scone.model_store.token_corpus import TokenCorpus

# Positions looked at together: the temporaries of one chunk take about 50 bytes a position.
CHUNK_TOKENS = 1 << 22

_TOKEN_BITS = 32
_TOKEN_MASK = (1 << _TOKEN_BITS) - 1


@dataclass(frozen=True, slots=True)
class _Level:
    """The n-grams of one length that passed, in lexicographic order."""

    keys: NDArray[np.int64]  # (num_grams,) sorted
    counts: NDArray[np.int64]  # (num_grams,)

    def ids(self, keys: NDArray[np.int64]) -> NDArray[np.int32]:
        """The place of each key, -1 where it did not pass."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int32)
        found = np.searchsorted(self.keys, keys)
        np.minimum(found, len(self.keys) - 1, out=found)
        return np.where(self.keys[found] == keys, found, -1).astype(np.int32)


def count_fgrams(
    corpus: TokenCorpus,
    *,
    max_n: int,
    min_count: int,
    top: int,
    tokenizer_hash: str,
    progress: bool = True,
) -> FGramSet:
    """The `top` most frequent n-grams of 2 to `max_n` tokens that occur at least `min_count` times.

    Ties go to the shorter n-gram, then to the lexicographically smaller one, which keeps the set closed under
    prefix and suffix. The result depends on nothing but the corpus and the three numbers.
    """
    if max_n < MIN_N or min_count < 1 or top < 1:
        raise ValueError(f"max_n is {max_n}, min_count {min_count}, top {top}; wanted >= {MIN_N}, >= 1, >= 1")
    levels: list[_Level] = []
    # (num_tokens,) the id of the passed n-gram that begins at each position, -1: none; a token is its own id
    gram_ids = corpus.tokens
    threshold = min_count
    with tqdm(
        total=corpus.num_tokens * (max_n - 1), unit="token", unit_scale=True, disable=not progress
    ) as bar:
        for n in range(MIN_N, max_n + 1):
            bar.set_description(f"count {n}-grams")
            found = [_count_keys(keys) for _, keys in _scan(corpus, gram_ids, n, bar)]
            level = _passed(_merge(found), threshold)
            levels.append(level)
            # Longer n-grams only push further down what is already beyond the cutoff.
            threshold = max(threshold, _cutoff(levels, top))
            if n < max_n:
                gram_ids = _positions(corpus, gram_ids, n, level)
    return _ranked(levels, max_n, top, corpus, tokenizer_hash, min_count)


def _scan(
    corpus: TokenCorpus, gram_ids: NDArray[np.int32], n: int, bar: tqdm[Any] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(positions, keys) of every n-gram whose prefix and suffix passed and that crosses no border."""
    last_start = corpus.num_tokens - n + 1
    for start in range(0, max(last_start, 0), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, last_start)
        prefixes = gram_ids[start:end]
        candidates = (prefixes >= 0) & (gram_ids[start + 1 : end + 1] >= 0)
        candidates &= ~_crossing(corpus.offsets, start, end, n)
        offsets = np.flatnonzero(candidates)
        keys = (prefixes[offsets].astype(np.int64) << _TOKEN_BITS) | corpus.tokens[start + n - 1 :][offsets]
        yield offsets + start, keys
        if bar is not None:
            bar.update(end - start)


def _crossing(borders: NDArray[np.int64], start: int, end: int, n: int) -> NDArray[np.bool_]:
    """(end - start,) whether the n-gram at start + i crosses a document border."""
    inside = borders[
        np.searchsorted(borders, start, "right") : np.searchsorted(borders, end + n - 2, "right")
    ]
    crossing = np.zeros(end - start, np.bool_)
    for reach in range(1, n):
        places = inside - reach - start
        crossing[places[(places >= 0) & (places < end - start)]] = True
    return crossing


def _count_keys(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted distinct keys and how often each occurs; sorts `keys` in place."""
    keys.sort()
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    return keys[starts], np.diff(starts, append=len(keys))


def _merge(
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Adds up the counts of sorted parts."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    while len(parts) > 1:
        merged = [_add(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = merged + parts[len(merged) * 2 :]
    return parts[0]


def _add(
    left: tuple[NDArray[np.int64], NDArray[np.int64]], right: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    keys = np.concatenate([left[0], right[0]])
    order = np.argsort(keys, kind="stable")  # two sorted runs: a merge
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    return keys[starts], np.add.reduceat(np.concatenate([left[1], right[1]])[order], starts)


def _passed(counted: tuple[NDArray[np.int64], NDArray[np.int64]], threshold: int) -> _Level:
    keys, counts = counted
    passed = counts >= threshold
    return _Level(keys[passed], counts[passed])


def _cutoff(levels: list[_Level], top: int) -> int:
    """The count of the n-gram at rank `top` so far; 0 if there are fewer."""
    counts = np.concatenate([level.counts for level in levels])
    return 0 if len(counts) < top else int(np.partition(counts, len(counts) - top)[len(counts) - top])


def _positions(corpus: TokenCorpus, gram_ids: NDArray[np.int32], n: int, level: _Level) -> NDArray[np.int32]:
    """(num_tokens,) the id of the passed n-gram that begins at each position, -1: none."""
    ids = np.full(corpus.num_tokens, -1, np.int32)
    for positions, keys in _scan(corpus, gram_ids, n):
        ids[positions] = level.ids(keys)
    return ids


def _ranked(
    levels: list[_Level], max_n: int, top: int, corpus: TokenCorpus, tokenizer_hash: str, min_count: int
) -> FGramSet:
    """Ranks all levels together; each is in lexicographic order, so a stable sort by count settles ties."""
    counts = np.concatenate([level.counts for level in levels])
    order = np.argsort(-counts, kind="stable")[:top]
    firsts = np.cumsum([0, *(len(level.keys) for level in levels)])
    tokens = np.full((len(order), max_n), -1, np.int32)
    lengths = np.zeros(len(order), np.uint8)
    for i, first in enumerate(firsts[:-1]):
        n = MIN_N + i
        rows = np.flatnonzero((order >= first) & (order < firsts[i + 1]))
        lengths[rows] = n
        ids = order[rows] - first
        for depth in range(i, -1, -1):
            keys = levels[depth].keys[ids]
            tokens[rows, MIN_N + depth - 1] = keys & _TOKEN_MASK
            ids = keys >> _TOKEN_BITS
        tokens[rows, 0] = ids
    return FGramSet(
        tokens,
        lengths,
        counts[order],
        tokenizer_hash=tokenizer_hash,
        min_count=min_count,
        num_corpus_tokens=corpus.num_tokens,
        corpus_hash=corpus.hash,
    )
