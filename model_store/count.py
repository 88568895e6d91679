"""Counts the f-gram set of a corpus: all n-grams of 2 to K tokens, one ranking by count, the top S.

Source: arXiv 2502.01637, sections 3.1 and 4.2: one scan per n, n-grams rarer than a minimum dropped, and an
n-gram counted only if its (n-1)-token prefix and suffix passed. Documents are never joined.

An n-gram is counted under the key `id of its prefix << 32 | last token`, where the id is the prefix's place
in the sorted keys of length n-1: it fits int64 at every length, and sorted keys are n-grams in lexicographic
order. A scan deals the keys into partitions by hash and counts one partition at a time, so that memory stays
bounded however large the corpus: beyond the limit, partitions and ids lie on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scone.kernels.ngram_count import TOKEN_BITS, KeyIndex, NGramSource, count_keys, ngram_keys
from scone.model_store.count_workspace import CountWorkspace, KeyPartitions, Level
from scone.model_store.fgram_set import MIN_N, FGramSet
from scone.model_store.token_corpus import TokenCorpus

CHUNK_TOKENS = 1 << 20
"""Positions that one thread works on at a time."""

MAX_PARTITIONS = 4096
"""More would turn the keys of a chunk into very small files and writes."""

# In memory a token costs its key (8 bytes, twice while its partition is counted), and its id now and before.
_BYTES_PER_TOKEN = 24
_PARTITIONS_PER_THREAD = 4  # so that threads finish together
_MAX_TASKS = len(os.sched_getaffinity(0)) + 1

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def count_fgrams(
    corpus: TokenCorpus,
    *,
    max_n: int,
    min_count: int,
    top: int,
    tokenizer_hash: str,
    memory_bytes: int | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> FGramSet:
    """The `top` most frequent n-grams of 2 to `max_n` tokens that occur at least `min_count` times.

    Ties go to the shorter n-gram, then to the lexicographically smaller one, which keeps the set closed under
    prefix and suffix. The result depends on nothing but the corpus and the three numbers.

    Args:
        memory_bytes: a corpus that needs more is counted in the folder `work`, which must be given then; a
            count that was ended goes on from there. The n-grams that passed stay in memory at any size.
    """
    if max_n < MIN_N or min_count < 1 or top < 1:
        raise ValueError(f"max_n is {max_n}, min_count {min_count}, top {top}; wanted >= {MIN_N}, >= 1, >= 1")
    num_threads = len(os.sched_getaffinity(0))
    num_partitions = num_threads * _PARTITIONS_PER_THREAD
    folder = None
    if memory_bytes is not None and corpus.num_tokens * _BYTES_PER_TOKEN > memory_bytes:
        if work is None:
            raise ValueError(f"{corpus.num_tokens} tokens need more than {memory_bytes} bytes: give `work`")
        folder = work
        wanted = num_threads * corpus.num_tokens * _BYTES_PER_TOKEN // max(memory_bytes, 1) + 1
        num_partitions = min(max(num_partitions, wanted), MAX_PARTITIONS)
    identity = {"corpus": corpus.hash, "max_n": max_n, "min_count": min_count, "top": top}
    with CountWorkspace(folder, identity) as workspace, ThreadPoolExecutor(num_threads) as pool:
        scans = _Scans(corpus, workspace, pool, num_partitions, max_n, progress)
        levels: list[Level] = []
        threshold = min_count
        for n in range(MIN_N, max_n + 1):
            levels.append(scans.scan(n, threshold))
            # Longer n-grams only push further down what is already beyond the cutoff.
            threshold = max(threshold, cutoff(levels, top))
        scans.close()
        return rank_levels(levels, max_n, top, corpus, tokenizer_hash, min_count)


class _Scans:
    """The scans of one corpus, for n = 2, 3, ... in this order."""

    def __init__(
        self,
        corpus: TokenCorpus,
        workspace: CountWorkspace,
        pool: ThreadPoolExecutor,
        num_partitions: int,
        max_n: int,
        progress: bool,
    ) -> None:
        self._corpus, self._workspace, self._pool = corpus, workspace, pool
        self._num_partitions, self._max_n = num_partitions, max_n
        self._gram_ids = corpus.tokens  # a token is its own id
        total = corpus.num_tokens * (max_n - MIN_N + 1)
        self._bar = tqdm(total=total, unit="token", unit_scale=True, disable=not progress)

    def close(self) -> None:
        self._bar.close()

    def scan(self, n: int, threshold: int) -> Level:
        """The n-grams that occur `threshold` times or more, from an earlier run if it finished this scan."""
        self._bar.set_description(f"count {n}-grams")
        size = self._corpus.num_tokens
        if (kept := self._workspace.kept(n, size)) is not None:
            level, self._gram_ids = kept
        else:
            source = NGramSource(self._corpus.tokens, self._gram_ids, self._corpus.offsets, n)
            level = self._count(self._deal(source), threshold)
            if n < self._max_n:
                self._gram_ids = self._ids(source, level)
            self._workspace.keep(n, level)
        self._bar.update(size * (n - MIN_N + 1) - self._bar.n)
        return level

    def _deal(self, source: NGramSource) -> KeyPartitions:
        partitions = self._workspace.partitions(self._num_partitions)

        def deal_chunk(chunk: tuple[int, int]) -> int:
            partitions.add(*ngram_keys(source, *chunk, len(partitions)))
            return chunk[1] - chunk[0]

        for num_tokens in _parallel(self._pool, deal_chunk, _chunks(source)):
            self._bar.update(num_tokens)
        return partitions

    def _count(self, partitions: KeyPartitions, threshold: int) -> Level:
        def count_partition(p: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            return count_keys(partitions.take(p), threshold)

        counted = list(_parallel(self._pool, count_partition, range(len(partitions))))
        keys = np.concatenate([keys for keys, _ in counted])
        order = np.argsort(keys)
        return Level(keys[order], np.concatenate([counts for _, counts in counted])[order])

    def _ids(self, source: NGramSource, level: Level) -> NDArray[np.int32]:
        """(num_tokens,) the id of the passed n-gram that begins at each position, -1: none."""
        ids = self._workspace.new_ids(source.n, len(source.tokens))
        ids[source.num_starts :] = -1
        index = KeyIndex(level.keys)

        def find_chunk(chunk: tuple[int, int]) -> None:
            ids[slice(*chunk)] = index.next_ids(source, *chunk)

        for _ in _parallel(self._pool, find_chunk, _chunks(source)):
            pass
        return ids


def _chunks(source: NGramSource) -> Iterator[tuple[int, int]]:
    for start in range(0, source.num_starts, CHUNK_TOKENS):
        yield start, min(start + CHUNK_TOKENS, source.num_starts)


def _parallel(
    pool: ThreadPoolExecutor, function: Callable[[_Task], _Result], tasks: Iterable[_Task]
) -> Iterator[_Result]:
    """Results as they come, with only a few tasks under way, which bounds what they hold in memory."""
    under_way: set[Future[_Result]] = set()
    for task in tasks:
        if len(under_way) == _MAX_TASKS:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
        under_way.add(pool.submit(function, task))
    yield from (future.result() for future in under_way)


def cutoff(levels: list[Level], top: int) -> int:
    """The count of the n-gram at rank `top` so far; 0 if there are fewer."""
    counts = np.concatenate([level.counts for level in levels])
    return 0 if len(counts) < top else int(np.partition(counts, len(counts) - top)[len(counts) - top])


def rank_levels(
    levels: list[Level], max_n: int, top: int, corpus: TokenCorpus, tokenizer_hash: str, min_count: int
) -> FGramSet:
    """The set of all levels; each is in lexicographic order, so a stable sort by count settles ties."""
    counts = np.concatenate([level.counts for level in levels])
    order = np.argsort(-counts, kind="stable")[:top]
    firsts = np.cumsum([0, *(len(level.keys) for level in levels)])
    tokens = np.full((len(order), max_n), -1, np.int32)
    lengths = np.zeros(len(order), np.uint8)
    for i, first in enumerate(firsts[:-1]):
        rows = np.flatnonzero((order >= first) & (order < firsts[i + 1]))
        lengths[rows] = MIN_N + i
        ids = order[rows] - first
        for depth in range(i, -1, -1):
            keys = levels[depth].keys[ids]
            tokens[rows, MIN_N + depth - 1] = keys & ((1 << TOKEN_BITS) - 1)
            ids = keys >> TOKEN_BITS
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
