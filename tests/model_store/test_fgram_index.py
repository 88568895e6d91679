"""The flags of the bucket index: which buckets a search passes through, and for which keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from scone.kernels import fgram_hash
from scone.kernels.errors import DamagedDataError
from scone.kernels.fgram_hash import BUCKET_DTYPE, EMPTY_ROW, FLAG_PASSED
from scone.kernels.match import BucketIndex, Matcher, match_reference
from scone.model_store.fgram_index import build_index
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_header import HEADER_BYTES


@pytest.fixture(scope="module")
def index(zipf_fgrams: FGramSet, tmp_path_factory: pytest.TempPathFactory) -> BucketIndex:
    path = tmp_path_factory.mktemp("index") / "index.bin"
    shape = build_index(zipf_fgrams, path, "ab" * 32)
    buckets = np.fromfile(path, BUCKET_DTYPE, offset=HEADER_BYTES)
    return BucketIndex(
        buckets, shape.num_home_buckets, shape.hash_seed, 64, zipf_fgrams.max_n, zipf_fgrams.is_closed()
    )


@pytest.fixture(scope="module")
def older_index(index: BucketIndex) -> BucketIndex:
    """As it was written before flags told whose keys pass."""
    buckets = index.buckets.copy()
    buckets["meta"] &= FLAG_PASSED
    buckets["meta"] |= fgram_hash.bucket_checks(buckets) << 8
    return replace(index, buckets=buckets)


def test_flags_are_those_of_the_keys_that_pass(index: BucketIndex, zipf_fgrams: FGramSet) -> None:
    lane_a, lane_b = fgram_hash.hash_fgrams(zipf_fgrams.tokens, zipf_fgrams.lengths, index.seed)
    home = fgram_hash.home_buckets(lane_a, index.num_home_buckets)
    expected = np.zeros(len(index.buckets), np.uint32)
    for place, bucket in enumerate(index.buckets):
        for row in bucket["row"][bucket["row"] != EMPTY_ROW].tolist():
            flag = 2 << min(int(lane_b[row]) % 8, 6)
            expected[home[row] : place] |= flag | FLAG_PASSED
    assert np.any(expected > FLAG_PASSED)
    np.testing.assert_array_equal(index.buckets["meta"] & 0xFF, expected)


def test_an_older_index_leads_to_the_same_rows(
    index: BucketIndex, older_index: BucketIndex, zipf_tokens: NDArray[np.int64]
) -> None:
    starts = np.array([0, len(zipf_tokens)], np.int64)
    expected = Matcher(index).match(zipf_tokens)
    for found in (Matcher(older_index).match(zipf_tokens), match_reference(older_index, zipf_tokens, starts)):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_the_search_for_an_absent_key_is_short(index: BucketIndex, older_index: BucketIndex) -> None:
    assert _mean_buckets(index) < 1.5
    assert _mean_buckets(older_index) > 2.0


def test_a_search_beyond_the_last_bucket_is_damage(index: BucketIndex) -> None:
    """Which no builder writes: its check bits are right."""
    buckets = index.buckets.copy()
    buckets["fingerprint"] = 1
    buckets["meta"] = FLAG_PASSED
    buckets["meta"] |= fgram_hash.bucket_checks(buckets) << 8
    broken = replace(index, buckets=buckets)
    tokens = np.arange(8, dtype=np.int64)
    with pytest.raises(DamagedDataError, match=f"bucket {len(buckets)} of the index is damaged"):
        Matcher(broken).match(tokens)
    with pytest.raises(DamagedDataError, match=f"bucket {len(buckets)} of the index is damaged"):
        match_reference(broken, tokens, np.array([0, 8]))


def _mean_buckets(index: BucketIndex) -> float:
    """Looked in by searches for random keys."""
    generator = np.random.default_rng(0)
    at = generator.integers(0, index.num_home_buckets, 20_000)
    fingerprints = generator.integers(0, 1 << 64, len(at), dtype=np.uint64)
    num_looked_in = 0
    while len(at):
        num_looked_in += len(at)
        further = fgram_hash.passes(index.buckets[at], fingerprints)
        at, fingerprints = at[further] + 1, fingerprints[further]
    return num_looked_in / 20_000
