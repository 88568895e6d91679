"""The counted set equals a brute-force count; ties, borders, closure and chunking change nothing."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.model_store import count
from scone.model_store.count import count_fgrams
from scone.model_store.fgram_set import FGramSet
from scone.model_store.token_corpus import TokenCorpus

Grams = list[tuple[tuple[int, ...], int]]


def brute_force(documents: Sequence[Sequence[int]], max_n: int, min_count: int, top: int) -> Grams:
    counts: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        for n in range(2, max_n + 1):
            counts.update(tuple(document[i : i + n]) for i in range(len(document) - n + 1))
    kept = [(gram, c) for gram, c in counts.items() if c >= min_count]
    return sorted(kept, key=lambda item: (-item[1], len(item[0]), item[0]))[:top]


def listed(fgrams: FGramSet) -> Grams:
    return [
        (tuple(row[:n]), c)
        for row, n, c in zip(
            fgrams.tokens.tolist(), fgrams.lengths.tolist(), fgrams.counts.tolist(), strict=True
        )
    ]


def counted(documents: Sequence[Sequence[int]], max_n: int, min_count: int, top: int) -> FGramSet:
    corpus = TokenCorpus.from_documents(documents)
    return count_fgrams(corpus, max_n=max_n, min_count=min_count, top=top, tokenizer_hash="t", progress=False)


@settings(max_examples=150, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=8),
    max_n=st.integers(2, 6),
    min_count=st.integers(1, 4),
    top=st.integers(1, 200),
    chunk=st.sampled_from([1, 2, 3, 7, 64, 1 << 20]),
)
def test_equals_brute_force_at_every_chunking(
    documents: list[list[int]], max_n: int, min_count: int, top: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count, "CHUNK_TOKENS", chunk)
        fgrams = counted(documents, max_n, min_count, top)
    assert listed(fgrams) == brute_force(documents, max_n, min_count, top)
    assert fgrams.is_closed()


@pytest.mark.parametrize("top", [50, 1000, 10**9])
def test_equals_brute_force_on_skewed_ids(top: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.zipf(1.3, size).clip(0, 2**31 - 1).tolist() for size in rng.integers(0, 3000, 20)]
    assert max(map(max, filter(None, documents))) > 2**17
    fgrams = counted(documents, 5, 2, top)
    assert listed(fgrams) == brute_force(documents, 5, 2, top)
    assert fgrams.is_closed()


def test_equals_brute_force_on_real_text() -> None:
    sources = [json.__file__, json.decoder.__file__, os.__file__]
    documents = [list(Path(source).read_bytes()) for source in sources]
    for top in (300, 5000):
        fgrams = counted(documents, 5, 5, top)
        assert listed(fgrams) == brute_force(documents, 5, 5, top)
        assert fgrams.is_closed()


def test_every_head_of_the_ranking_is_closed() -> None:
    fgrams = counted([[1, 2, 1, 2, 1, 2, 3], [1, 2, 3, 1, 2, 3]], 4, 2, 100)
    assert len(fgrams) > 6
    assert all(fgrams.head(size).is_closed() for size in range(len(fgrams) + 1))


def test_documents_are_never_joined() -> None:
    assert listed(counted([[1, 2], [3, 4]] * 5, 3, 1, 100)) == [((1, 2), 5), ((3, 4), 5)]
    assert len(counted([[1]] * 9, 5, 1, 100)) == 0


def test_the_record_says_what_was_counted() -> None:
    corpus = TokenCorpus.from_documents([[1, 2, 1, 2], [], [1, 2]])
    fgrams = count_fgrams(corpus, max_n=5, min_count=2, top=9, tokenizer_hash="abc", progress=False)
    assert (fgrams.tokenizer_hash, fgrams.min_count, fgrams.num_corpus_tokens, fgrams.max_n) == (
        "abc",
        2,
        6,
        5,
    )
    assert fgrams.corpus_hash == corpus.hash
    assert TokenCorpus.from_documents([[1, 2, 1, 2, 1, 2]]).hash != corpus.hash


@pytest.mark.parametrize(("max_n", "min_count", "top"), [(1, 5, 9), (5, 0, 9), (5, 5, 0)])
def test_impossible_settings_are_refused(max_n: int, min_count: int, top: int) -> None:
    with pytest.raises(ValueError, match="wanted"):
        counted([[1, 2]], max_n, min_count, top)
