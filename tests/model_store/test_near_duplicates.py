"""Near-duplicates are found, different documents stay apart, and the split leaks nothing."""

import random

import numpy as np
import pytest

from scone.model_store.debian_docs import (
    MAX_HELD_OUT_OVERLAP,
    Document,
    capped,
    is_prose,
    split,
    without_near_duplicates,
)
from scone.model_store.near_duplicates import (
    OVERLAP_WORDS,
    SHINGLE_WORDS,
    ShingleHasher,
    cluster,
    jaccard,
    overlap,
)


def made_up_words(num_words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(num_words)]


def edited(words: list[str], num_edits: int, seed: int) -> list[str]:
    """`words` with `num_edits` single words replaced."""
    rng = random.Random(seed)
    copy = list(words)
    for place in rng.sample(range(len(words)), num_edits):
        copy[place] = f"edit{rng.random()}"
    return copy


def test_shingles_are_word_runs_whatever_the_case_and_spacing() -> None:
    hasher = ShingleHasher()
    text = "The quick  brown\nfox, jumps over the LAZY dog today"
    same = hasher.shingles("the quick brown fox jumps over the lazy dog today", 8)
    np.testing.assert_array_equal(hasher.shingles(text, 8), same)
    assert len(same) == 3
    assert len(hasher.shingles("only three words", 8)) == 1
    assert len(hasher.shingles("", 8)) == 1


def test_shingle_hashes_do_not_change_between_releases() -> None:
    # a changed hash would silently move documents between training and held-out text
    assert ShingleHasher().shingles("a b c d e f g h i", 8).tolist() == [
        3279820842709795718,
        8955587127378081982,
    ]


def test_jaccard_equals_the_set_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = (np.unique(rng.integers(0, 50, 30).astype(np.uint64)) for _ in range(2))
        a, b = set(left.tolist()), set(right.tolist())
        assert jaccard(left, right) == len(a & b) / len(a | b)


def test_clusters_are_those_of_brute_force() -> None:
    hasher = ShingleHasher()
    originals = [made_up_words(400, seed) for seed in range(30)]
    texts = [edited(words, edits, edits) for words in originals for edits in (0, 3, 8, 14, 60)]
    random.Random(1).shuffle(texts)
    documents = [hasher.shingles(" ".join(text), SHINGLE_WORDS) for text in texts]
    expected = list(range(len(documents)))
    for right in range(len(documents)):
        for left in range(right):
            if jaccard(documents[left], documents[right]) >= 0.5:
                old, new = sorted((expected[left], expected[right]), reverse=True)
                expected = [new if c == old else c for c in expected]
    assert len(set(expected)) < len(expected) - 30
    assert cluster(documents).tolist() == expected


def test_overlap_is_the_share_of_known_shingles() -> None:
    arrays = [np.array(values, np.uint64) for values in ([1, 2, 3, 4], [5, 6], [3])]
    assert overlap(arrays, [np.array([3, 4], np.uint64), np.array([9], np.uint64)]) == [0.5, 0.0, 1.0]
    assert overlap(arrays, []) == [0.0, 0.0, 0.0]


def test_the_longest_of_near_duplicates_stays() -> None:
    words = made_up_words(300, 1)
    documents = [
        Document(" ".join(words), "p/b"),
        Document(" ".join([*words, "and", "more"]), "p/a"),
        Document(" ".join(words), "p/c"),
        Document(" ".join(made_up_words(300, 2)), "p/d"),
    ]
    assert [d.source for d in without_near_duplicates(documents)] == ["p/a", "p/d"]


def test_split_is_stable_disjoint_and_free_of_leaks() -> None:
    documents = [Document(" ".join(made_up_words(120, seed)), f"p/{seed}") for seed in range(300)]
    # a document that quotes others: no near-duplicate of any, but mostly seen text
    quoting = [
        Document(
            " ".join(d.text for d in documents[i : i + 6]),
            f"p/q{i}",
        )
        for i in range(0, 90, 6)
    ]
    pages = without_near_duplicates(documents + quoting)
    assert len(pages) == 315
    train, held_out, dropped = split(pages, held_out_share=0.3)
    assert {d.source for d in train + held_out + dropped} == {d.source for d in pages}
    assert any(d in dropped for d in quoting)
    assert 50 < len(held_out) < 130
    hasher = ShingleHasher()
    reference = [hasher.shingles(d.text, OVERLAP_WORDS) for d in train]
    assert (
        max(overlap([hasher.shingles(d.text, OVERLAP_WORDS) for d in held_out], reference))
        <= MAX_HELD_OUT_OVERLAP
    )
    # whatever else the corpus holds, a document keeps its side
    assert [d for d in split(pages[::-1], held_out_share=0.3)[0] if d in pages[:100]] == [
        d for d in split(pages[:100], held_out_share=0.3)[0]
    ]


@pytest.mark.parametrize("max_share", [0.5, 0.25])
def test_no_package_exceeds_its_share(max_share: float) -> None:
    documents = [Document("x" * 100, f"large/{i}") for i in range(500)]
    documents += [Document("x" * 100, f"{name}/{i}") for name in "abcd" for i in range(40)]
    kept = capped(documents, max_share)
    large = sum(d.package == "large" for d in kept)
    assert len(kept) - large == 160
    assert 0.98 * max_share <= large / len(kept) <= max_share
    assert len(capped(documents[480:])) == 180


def test_short_and_generated_pages_are_no_prose() -> None:
    assert not is_prose(Document("Too short.", "p/a"))
    assert not is_prose(Document("\n".join(f"register {i}: reserved" for i in range(500)), "p/a"))
    assert is_prose(Document(" ".join(made_up_words(300, 1)), "p/a"))
