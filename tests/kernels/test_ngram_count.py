"""The native counting loops equal their NumPy oracles, and those a dictionary."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from scone.kernels.extension import native
from scone.kernels.ngram_count import (
    TOKEN_BITS,
    KeyIndex,
    NGramSource,
    count_keys,
    count_keys_reference,
    next_ids_reference,
    ngram_keys,
    ngram_keys_reference,
)

pytestmark = pytest.mark.skipif(native is None, reason="the native extension was not built")


def random_source(rng: np.random.Generator, num_tokens: int, n: int, largest: int) -> NGramSource:
    tokens = rng.integers(0, largest, num_tokens, endpoint=True).astype(np.int32)
    ids = tokens
    if n > 2:
        ids = rng.integers(-1, 2**31 - 1, num_tokens, endpoint=True).astype(np.int32)
        ids[rng.random(num_tokens) < 0.3] = -1
    inner = np.sort(rng.integers(0, num_tokens, num_tokens // 5, endpoint=True))  # some documents are empty
    borders = np.concatenate([[0], inner, [num_tokens]]).astype(np.int64)
    return NGramSource(tokens, ids, borders, n)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("num_partitions", [1, 7, 64])
@pytest.mark.parametrize("largest", [2, 2**31 - 1])
def test_keys_equal_the_oracle(n: int, num_partitions: int, largest: int) -> None:
    rng = np.random.default_rng(n * num_partitions)
    source = random_source(rng, 3000, n, largest)
    for start, end in ((0, source.num_starts), (0, 0), (17, 18), (100, 2000), (2000, source.num_starts)):
        keys, bounds = ngram_keys(source, start, end, num_partitions)
        expected, expected_bounds = ngram_keys_reference(source, start, end, num_partitions)
        np.testing.assert_array_equal(bounds, expected_bounds)
        np.testing.assert_array_equal(keys, expected)


def test_keys_equal_the_definition() -> None:
    source = random_source(np.random.default_rng(1), 500, 2, 9)
    borders = set(source.borders.tolist())
    expected = [
        (int(source.tokens[i]) << TOKEN_BITS) | int(source.tokens[i + 1])
        for i in range(499)
        if i + 1 not in borders
    ]
    assert 200 < len(expected) < 499
    assert ngram_keys(source, 0, 499, 1)[0].tolist() == expected


def skewed_keys(num_keys: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return (rng.zipf(1.2, num_keys).clip(0, 2**62) * 2**20 % 2**62).astype(np.int64)


@pytest.mark.parametrize("num_keys", [0, 1, 1000, 300_000])
@pytest.mark.parametrize("min_count", [1, 5])
def test_counts_equal_the_oracle_and_a_dictionary(num_keys: int, min_count: int) -> None:
    keys = skewed_keys(num_keys)
    found, counts = count_keys(keys, min_count)
    expected, expected_counts = count_keys_reference(keys, min_count)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(counts, expected_counts)
    truth = {key: count for key, count in Counter(keys.tolist()).items() if count >= min_count}
    assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == truth


def test_counts_of_a_partition_equal_the_oracle() -> None:
    """Keys that fell into one partition of many share their hash's high bits."""
    keys, bounds = ngram_keys(random_source(np.random.default_rng(2), 400_000, 2, 3000), 0, 399_999, 512)
    for p in (0, 100, 511):
        part = keys[bounds[p] : bounds[p + 1]]
        np.testing.assert_array_equal(count_keys(part, 1), count_keys_reference(part, 1))


@pytest.mark.parametrize("n", [2, 4])
def test_ids_equal_the_oracle(n: int) -> None:
    source = random_source(np.random.default_rng(n), 5000, n, 20)
    known = np.unique(ngram_keys(source, 0, source.num_starts, 1)[0])[::2]
    for keys in (known, known[:1], known[:0]):
        index = KeyIndex(np.ascontiguousarray(keys))
        for start, end in ((0, source.num_starts), (3, 4), (100, 131), (100, 100)):
            ids = index.next_ids(source, start, end)
            np.testing.assert_array_equal(ids, next_ids_reference(keys, source, start, end))
    assert (KeyIndex(np.ascontiguousarray(known)).next_ids(source, 0, source.num_starts) >= 0).any()
