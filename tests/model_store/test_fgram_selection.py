"""United and pruned sets against plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scone.model_store.count import count_fgrams
from scone.model_store.errors import FGramSetError
from scone.model_store.fgram_selection import find_fgrams, keep_most_used, unite
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus

Documents = list[list[int]]
documents = st.lists(st.lists(st.integers(0, 4), max_size=40), min_size=1, max_size=3)


def counted(texts: Documents, max_n: int = 4, min_count: int = 1) -> FGramSet:
    corpus = TokenCorpus.from_documents(texts)
    return count_fgrams(
        corpus, max_n=max_n, min_count=min_count, top=10_000, tokenizer_hash="74" * 32, progress=False
    )


def as_dict(fgrams: FGramSet) -> dict[tuple[int, ...], int]:
    rows = zip(fgrams.tokens.tolist(), fgrams.lengths.tolist(), fgrams.counts.tolist(), strict=True)
    return {tuple(tokens[:n]): count for tokens, n, count in rows}


@settings(deadline=None, max_examples=60)
@given(documents, documents)
def test_found_positions_equal_a_dictionary(first: Documents, second: Documents) -> None:
    known, wanted = counted(first), counted(second)
    positions = {fgram: i for i, fgram in enumerate(as_dict(known))}
    expected = [positions.get(fgram, -1) for fgram in as_dict(wanted)]
    assert find_fgrams(known.tokens, wanted.tokens).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(documents, documents)
def test_the_union_of_counts_is_the_count_of_the_union(first: Documents, second: Documents) -> None:
    united, whole = unite(counted(first), counted(second)), counted(first + second)
    np.testing.assert_array_equal(united.tokens, whole.tokens)
    np.testing.assert_array_equal(united.lengths, whole.lengths)
    np.testing.assert_array_equal(united.counts, whole.counts)
    assert united.num_corpus_tokens == whole.num_corpus_tokens
    assert united.is_closed()


def test_sets_of_other_lengths_unite_but_not_of_other_tokenizers() -> None:
    longer, shorter = counted([[1, 2, 3, 4, 5, 1, 2]], max_n=5), counted([[1, 2, 3, 9]], max_n=3)
    united = unite(shorter, longer)
    assert united.max_n == 5
    assert as_dict(united)[1, 2] == 3
    other = FGramSet(longer.tokens, longer.lengths, longer.counts, "00" * 32, 1, 7)
    with pytest.raises(FGramSetError, match="different tokenizers"):
        unite(shorter, other)


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(0, 2**32), st.floats(0, 1))
def test_what_is_used_most_is_kept_and_stays_closed(texts: Documents, seed: int, share: float) -> None:
    fgrams = counted(texts)
    num_uses = np.random.default_rng(seed).zipf(1.5, len(fgrams)) - 1
    num_kept = round(share * len(fgrams))
    kept = keep_most_used(fgrams, num_uses, num_kept)
    assert len(kept) == num_kept
    assert kept.is_closed()
    counts = as_dict(fgrams)
    assert all(counts[fgram] == count for fgram, count in as_dict(kept).items())
    # No dropped f-gram was used more often than every kept one is needed by.
    needed = most_needed(fgrams, num_uses)
    dropped = counts.keys() - as_dict(kept).keys()
    if dropped and num_kept:
        assert max(needed[f] for f in dropped) <= min(needed[f] for f in as_dict(kept))


def most_needed(fgrams: FGramSet, num_uses: NDArray[np.int64]) -> dict[tuple[int, ...], int]:
    """Of each f-gram, the most uses of any f-gram that contains it; by trying all pairs."""
    uses = dict(zip(as_dict(fgrams), num_uses.tolist(), strict=True))

    def contains(longer: tuple[int, ...], part: tuple[int, ...]) -> bool:
        return any(longer[i : i + len(part)] == part for i in range(len(longer) - len(part) + 1))

    return {part: max(n for f, n in uses.items() if contains(f, part)) for part in uses}


def test_equal_uses_are_kept_by_rank(zipf_fgrams: FGramSet) -> None:
    kept = keep_most_used(zipf_fgrams, np.zeros(len(zipf_fgrams), np.int64), 100)
    np.testing.assert_array_equal(kept.tokens, zipf_fgrams.head(100).tokens)


def test_uses_decide_over_counts(fgram_set: Callable[..., FGramSet]) -> None:
    fgrams = fgram_set({(1, 2): 9, (3, 4): 8, (5, 6): 7, (5, 6, 7): 2, (6, 7): 3})
    uses = {(5, 6, 7): 4, (1, 2): 1}
    num_uses = np.array([uses.get(fgram, 0) for fgram in as_dict(fgrams)])
    assert set(as_dict(keep_most_used(fgrams, num_uses, 3))) == {(5, 6), (6, 7), (5, 6, 7)}
