"""F-gram sets made of other sets: united, or cut to the f-grams that are used most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scone.model_store.errors import FGramSetError
from scone.model_store.fgram_set import MIN_N, FGramSet, rank_order


def find_fgrams(known: NDArray[np.int32], wanted: NDArray[np.int32]) -> NDArray[np.int64]:
    """(m,) int64 position of each f-gram of `wanted` among those of `known`, -1 where it is absent.

    Args:
        known: (n, k) int32 token ids, left-aligned, padded with -1; each f-gram once.
        wanted: (m, k) likewise.
    """
    both = np.concatenate([known, wanted])
    # The last key is the most significant: equal f-grams come together, the known one before the wanted.
    order = np.lexsort([np.arange(len(both)) >= len(known), *both.T])
    repeats = np.all(both[order[1:]] == both[order[:-1]], axis=1)
    # The known one, if there is one, begins its group of equal f-grams.
    starts = np.maximum.accumulate(np.where(np.concatenate([[True], ~repeats]), np.arange(len(both)), 0))
    first = order[starts]
    positions = np.empty(len(both), np.int64)
    positions[order] = np.where(first < len(known), first, -1)
    return positions[len(known) :]


def unite(base: FGramSet, added: FGramSet) -> FGramSet:
    """The f-grams of both sets, newly ranked; counts of an f-gram that both hold are added up.

    Two closed sets give a closed one: an n-gram's parts are in every set that counted it, no more rarely.

    Raises:
        FGramSetError: the sets were counted with different tokenizers.
    """
    if base.tokenizer_hash != added.tokenizer_hash:
        raise FGramSetError(
            f"the sets were counted with different tokenizers ({base.tokenizer_hash[:12]} and"
            f" {added.tokenizer_hash[:12]}): count both with the model's"
        )
    max_n = max(base.max_n, added.max_n)
    known, more = _widened(base.tokens, max_n), _widened(added.tokens, max_n)
    positions = find_fgrams(known, more)
    is_new = positions < 0
    counts = base.counts.copy()
    counts[positions[~is_new]] += added.counts[~is_new]
    return _ranked(
        np.concatenate([known, more[is_new]]),
        np.concatenate([base.lengths, added.lengths[is_new]]),
        np.concatenate([counts, added.counts[is_new]]),
        base,
        min_count=min(base.min_count, added.min_count),
        num_corpus_tokens=base.num_corpus_tokens + added.num_corpus_tokens,
    )


def keep_most_used(fgrams: FGramSet, num_uses: NDArray[np.int64], num_fgrams: int) -> FGramSet:
    """The `num_fgrams` f-grams that were used most; a closed set stays closed.

    An f-gram's prefix and suffix count as used as often as itself, so they are never dropped before it.

    Args:
        num_uses: (len(fgrams),) how often each was the longest match in some sample; equal ones are kept
            by rank.
    """
    value = num_uses.copy()
    for n in range(fgrams.max_n, MIN_N, -1):
        longer = np.flatnonzero(fgrams.lengths == n)
        tokens = fgrams.tokens[longer]
        prefix, suffix = tokens.copy(), np.full_like(tokens, -1)
        prefix[:, n - 1] = -1
        suffix[:, : n - 1] = tokens[:, 1:n]
        for part in (prefix, suffix):
            positions = find_fgrams(fgrams.tokens, part)
            present = positions >= 0
            np.maximum.at(value, positions[present], value[longer[present]])
    kept = np.sort(np.lexsort([np.arange(len(value)), -value])[:num_fgrams])
    return FGramSet(
        fgrams.tokens[kept],
        fgrams.lengths[kept],
        fgrams.counts[kept],
        fgrams.tokenizer_hash,
        fgrams.min_count,
        fgrams.num_corpus_tokens,
    )


def _widened(tokens: NDArray[np.int32], max_n: int) -> NDArray[np.int32]:
    return np.pad(tokens, ((0, 0), (0, max_n - tokens.shape[1])), constant_values=-1)


def _ranked(
    tokens: NDArray[np.int32],
    lengths: NDArray[np.uint8],
    counts: NDArray[np.int64],
    like: FGramSet,
    *,
    min_count: int,
    num_corpus_tokens: int,
) -> FGramSet:
    order = rank_order(tokens, lengths, counts)
    return FGramSet(
        tokens[order], lengths[order], counts[order], like.tokenizer_hash, min_count, num_corpus_tokens
    )
