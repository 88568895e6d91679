"""The counted set equals a brute-force count; ties, borders, closure and chunking change nothing."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import ngram_count
from scone.kernels.ngram_count import NGramSource, ngram_keys
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


@pytest.fixture
def zipf_corpus() -> TokenCorpus:
    rng = np.random.default_rng(0)
    return TokenCorpus.from_documents([rng.zipf(1.3, size).clip(0, 999) for size in (0, 7, 4000, 1, 900)])


SETTINGS: dict[str, Any] = {"max_n": 4, "min_count": 2, "top": 900, "tokenizer_hash": "t", "progress": False}


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 60_000])
def test_a_count_on_disk_is_the_count_in_memory(
    zipf_corpus: TokenCorpus, memory_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = count_fgrams(zipf_corpus, **SETTINGS)
    monkeypatch.setattr(count, "CHUNK_TOKENS", 500)
    monkeypatch.setattr(count, "MAX_PARTITIONS", 200)
    work = tmp_path / "work"
    assert count_fgrams(zipf_corpus, memory_bytes=memory_bytes, work=work, **SETTINGS).hash == expected.hash
    assert not work.exists()
    with pytest.raises(ValueError, match="give `work`"):
        count_fgrams(zipf_corpus, memory_bytes=memory_bytes, **SETTINGS)


@pytest.mark.parametrize("kernel", ["ngram_keys", "count_keys", "KeyIndex"])
@pytest.mark.parametrize("num_calls", [1, 10, 25])
def test_an_ended_count_goes_on(
    zipf_corpus: TokenCorpus, kernel: str, num_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in one kernel or another of one scan or another; finished scans are not repeated."""
    monkeypatch.setattr(count, "CHUNK_TOKENS", 500)
    on_disk: dict[str, Any] = {**SETTINGS, "memory_bytes": 20_000, "work": tmp_path / "work"}
    real = getattr(count, kernel)
    calls: list[int] = []

    def ended(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(count, kernel, ended)
        try:
            count_fgrams(zipf_corpus, **on_disk)
        except KeyboardInterrupt:
            finished = len(list((tmp_path / "work").glob("level-*.npz")))
        else:
            assert len(calls) < num_calls  # it never came to that
            return
    expected = count_fgrams(zipf_corpus, **SETTINGS)
    scanned: set[int] = set()

    def recorded(source: NGramSource, *arguments: Any) -> Any:
        scanned.add(source.n)
        return ngram_keys(source, *arguments)

    monkeypatch.setattr(count, "ngram_keys", recorded)
    assert count_fgrams(zipf_corpus, **on_disk).hash == expected.hash
    assert scanned == set(range(2 + finished, 5))


def test_what_another_count_left_is_not_used(zipf_corpus: TokenCorpus, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count, "rank_levels", None)
        with pytest.raises(TypeError):
            count_fgrams(zipf_corpus, memory_bytes=1, work=work, **SETTINGS)
    assert (work / "level-4.npz").exists()
    other = TokenCorpus.from_documents([[1, 2, 1, 2]] * 3)
    fgrams = count_fgrams(other, memory_bytes=1, work=work, **SETTINGS)
    assert fgrams.hash == count_fgrams(other, **SETTINGS).hash


def test_without_the_extension_the_count_is_the_same(
    zipf_corpus: TokenCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = count_fgrams(zipf_corpus, **SETTINGS)
    monkeypatch.setattr(ngram_count, "native", None)
    assert count_fgrams(zipf_corpus, **SETTINGS).hash == expected.hash
