"""The matcher against brute force and against its oracle, on sets with and without closure and collisions."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scone.kernels import fgram_hash
from scone.kernels.errors import DamagedDataError
from scone.kernels.fgram_hash import BUCKET_DTYPE
from scone.kernels.match import MAX_N, BucketIndex, Matcher, match_reference
from scone.kernels.row_target import IdTarget
from scone.model_store.errors import TableError
from scone.model_store.fgram_index import build_index
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_header import HEADER_BYTES, TableHeader

MakeSet = Callable[..., FGramSet]
TABLE_ID = "ab" * 32


def index_of(fgrams: FGramSet, path: Path, fp_bits: int = 64) -> BucketIndex:
    shape = build_index(fgrams, path, TABLE_ID, fp_bits)
    buckets = np.fromfile(path, BUCKET_DTYPE, offset=HEADER_BYTES)
    assert len(buckets) == shape.num_buckets
    return BucketIndex(
        buckets, shape.num_home_buckets, shape.hash_seed, fp_bits, fgrams.max_n, fgrams.is_closed()
    )


def brute_force(fgrams: FGramSet, tokens: list[int]) -> tuple[list[int], list[int]]:
    """The paper's look-up: a dict, longest key first."""
    keys = zip(fgrams.tokens.tolist(), fgrams.lengths.tolist(), strict=True)
    rows = {tuple(g[:n]): row for row, (g, n) in enumerate(keys)}
    found = []
    for i in range(len(tokens)):
        for n in range(min(fgrams.max_n, i + 1), 1, -1):
            row = rows.get(tuple(tokens[i - n + 1 : i + 1]))
            if row is not None:
                found.append((row, n))
                break
        else:
            found.append((-1, 1))
    return [row for row, _ in found], [n for _, n in found]


@pytest.fixture(scope="module")
def zipf_index(zipf_fgrams: FGramSet, tmp_path_factory: pytest.TempPathFactory) -> BucketIndex:
    return index_of(zipf_fgrams, tmp_path_factory.mktemp("index") / "index.bin")


def test_every_position_equals_brute_force(
    zipf_index: BucketIndex, zipf_fgrams: FGramSet, zipf_tokens: NDArray[np.int64]
) -> None:
    assert zipf_index.closed
    tokens = zipf_tokens[:5000]
    rows, lengths = Matcher(zipf_index).match(tokens)
    assert (rows.tolist(), lengths.tolist()) == brute_force(zipf_fgrams, tokens.tolist())
    assert set(lengths.tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_several_sequences_do_not_see_each_other(
    zipf_index: BucketIndex, zipf_tokens: NDArray[np.int64], dtype: type
) -> None:
    matcher = Matcher(zipf_index)
    starts = np.array([0, 0, 1, 3, 700, 700, 2048], np.int64)
    tokens: NDArray[Any] = zipf_tokens[:2048].astype(dtype)
    rows, lengths = matcher.match(tokens, starts)
    for begin, end in pairwise(starts):
        alone = matcher.match(tokens[begin:end])
        np.testing.assert_array_equal(rows[begin:end], alone[0])
        np.testing.assert_array_equal(lengths[begin:end], alone[1])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 17, 127, 1024])
def test_chunks_with_their_last_four_tokens_equal_the_whole(
    zipf_index: BucketIndex, zipf_tokens: NDArray[np.int64], chunk: int
) -> None:
    matcher = Matcher(zipf_index)
    tokens = zipf_tokens[:1024]
    rows, lengths = matcher.match(tokens)
    for begin in range(0, len(tokens), chunk):
        history = min(begin, zipf_index.max_n - 1)
        part = matcher.match(tokens[begin - history : begin + chunk])
        np.testing.assert_array_equal(part[0][history:], rows[begin : begin + chunk])
        np.testing.assert_array_equal(part[1][history:], lengths[begin : begin + chunk])


def test_threads_share_a_matcher_and_its_counts(
    zipf_index: BucketIndex, zipf_tokens: NDArray[np.int64]
) -> None:
    counts = np.zeros(MAX_N + 1, np.int64)
    matchers = [Matcher(zipf_index, counts), Matcher(zipf_index, counts)]
    texts = [zipf_tokens[begin : begin + 3000] for begin in range(0, 24_000, 3000)]
    expected = [Matcher(zipf_index).match(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: matchers[i % 2].match(texts[i % 8]), range(200)))
    for i, (rows, lengths) in enumerate(found):
        np.testing.assert_array_equal(rows, expected[i % 8][0])
        np.testing.assert_array_equal(lengths, expected[i % 8][1])
    total = sum(np.bincount(lengths, minlength=MAX_N + 1) for _, lengths in expected)
    np.testing.assert_array_equal(counts, 25 * np.asarray(total))


@pytest.mark.parametrize("width", [1, 4, 5, 9])
def test_last_of_each_window_equals_the_whole(
    zipf_index: BucketIndex, zipf_tokens: NDArray[np.int64], width: int
) -> None:
    matcher = Matcher(zipf_index)
    tokens = zipf_tokens[:301].astype(np.int32)
    padded = np.concatenate((np.full(width - 1, -1, np.int32), tokens))
    # sliding windows overlap in memory: strides other than the width
    rows, lengths = matcher.match_last(np.lib.stride_tricks.sliding_window_view(padded, width))
    expected = matcher.match(tokens)
    wanted, places = np.empty((2, len(tokens)), np.int64)
    histories = [tokens[: i + 1].tolist() for i in range(len(tokens))]
    row_ids: list[list[int]] = [[] for _ in histories]
    where = np.flatnonzero(expected[0] >= 0)
    assert matcher.match_newest(histories, row_ids, IdTarget(wanted, places)) == len(where)
    assert row_ids == [[row_id] for row_id in expected[0].tolist()]
    np.testing.assert_array_equal(places[: len(where)], where)
    np.testing.assert_array_equal(wanted[: len(where)], expected[0][where])
    if width >= zipf_index.max_n:
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(lengths, expected[1])
    else:
        assert (lengths <= np.minimum(expected[1], width)).all()


def test_padding_and_impossible_ids_end_a_match(fgram_set: MakeSet, tmp_path: Path) -> None:
    fgrams = fgram_set({(7, 0): 9, (0, 7): 8, (7, 0, 7): 7, (2**31 - 1, 0): 6})
    index = index_of(fgrams, tmp_path / "index.bin")
    tokens = np.array([7, 0, 7, -1, 7, 0, 2**31 - 1, 0, 2**31, 0, 2**32 + 7, 0], np.int64)
    rows, lengths = Matcher(index).match(tokens)
    assert rows.tolist() == [-1, 0, 2, -1, -1, 0, -1, 3, -1, -1, -1, -1]
    assert lengths.tolist() == [1, 2, 3, 1, 1, 2, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("odd", [-1, 0, 1, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40])
def test_newest_tokens_of_any_size_are_read_from_lists(fgram_set: MakeSet, tmp_path: Path, odd: int) -> None:
    """Integers of one digit are read another way than others."""
    stored = {fgram: 5 for fgram in ((1, 2), (0, 1), (1, 2, 0), ((1 << 31) - 1, 2), ((1 << 30) - 1, 2))}
    index = index_of(fgram_set(stored), tmp_path / "index.bin")
    sequences = [[odd, 2], [2, odd], [1, 2, odd], [odd]]
    row_ids: list[list[int]] = [[] for _ in sequences]
    Matcher(index).match_newest(sequences, row_ids, IdTarget(*np.empty((2, 4), np.int64)))
    ends = [match_reference(index, np.array(s), np.array([0, len(s)]))[0][-1] for s in sequences]
    assert row_ids == [[row_id] for row_id in ends]


small_fgrams = st.sets(
    st.lists(st.integers(0, 3), min_size=2, max_size=5).map(tuple), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=small_fgrams, tokens=st.lists(st.integers(-1, 4), max_size=60))
def test_any_set_equals_brute_force(
    fgram_set: MakeSet, tmp_path: Path, members: set[tuple[int, ...]], tokens: list[int]
) -> None:
    fgrams = fgram_set({fgram: 5 for fgram in members})
    index = index_of(fgrams, tmp_path / "index.bin")
    rows, lengths = Matcher(index).match(np.array(tokens, np.int64))
    assert (rows.tolist(), lengths.tolist()) == brute_force(fgrams, tokens)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=small_fgrams, tokens=st.lists(st.integers(0, 4), max_size=60))
def test_with_narrow_fingerprints_stored_fgrams_are_still_found_and_backends_agree(
    fgram_set: MakeSet, tmp_path: Path, members: set[tuple[int, ...]], tokens: list[int]
) -> None:
    fgrams = fgram_set({fgram: 5 for fgram in members})
    index = index_of(fgrams, tmp_path / "index.bin", fp_bits=8)
    matcher = Matcher(index)
    for row, (fgram, n) in enumerate(zip(fgrams.tokens, fgrams.lengths, strict=True)):
        rows, lengths = matcher.match_last(fgram[None, :n])
        assert (rows[0], lengths[0]) == (row, n)
    array = np.array(tokens, np.int64)
    expected = match_reference(index, array, np.array([0, len(array)]))
    found = matcher.match(array)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_narrow_fingerprints_meet_collisions_and_are_reseeded(fgram_set: MakeSet, tmp_path: Path) -> None:
    """With 64 bits the first seed always serves; with 8 bits some sets of 40 need another."""
    seeds = set()
    for first in range(20):
        fgrams = fgram_set({(first, i): 5 for i in range(40)})
        assert build_index(fgrams, tmp_path / "wide.bin", TABLE_ID).hash_seed == 0
        seeds.add(build_index(fgrams, tmp_path / "narrow.bin", TABLE_ID, fp_bits=8).hash_seed)
    assert len(seeds) > 1


def test_hopeless_fingerprints_are_refused(fgram_set: MakeSet, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="fingerprint of 1 bits"):
        build_index(fgram_set({(0, i): 5 for i in range(200)}), tmp_path / "index.bin", TABLE_ID, fp_bits=1)


def test_built_stretch_by_stretch_is_the_same_file(
    zipf_fgrams: FGramSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded memory does not change a byte: keys overflow across the borders of stretches too."""
    build_index(zipf_fgrams, tmp_path / "whole.bin", TABLE_ID)
    monkeypatch.setattr("scone.model_store.fgram_index._KEYS_PER_STRETCH", 37)
    monkeypatch.setattr("scone.model_store.fgram_index._KEYS_PER_SCAN", 1000)
    build_index(zipf_fgrams, tmp_path / "stretches.bin", TABLE_ID)
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "stretches.bin").read_bytes()


def test_oracle_equals_native(zipf_index: BucketIndex, zipf_tokens: NDArray[np.int64]) -> None:
    starts = np.array([0, 100, 4000], np.int64)
    found = Matcher(zipf_index).match(zipf_tokens[:4000], starts)
    expected = match_reference(zipf_index, zipf_tokens[:4000], starts)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_any_flipped_bit_of_a_bucket_is_noticed(zipf_index: BucketIndex) -> None:
    bucket = zipf_index.buckets[:1]
    assert fgram_hash.bucket_checks(bucket)[0] == bucket["meta"][0] >> 8
    for bit in range(8 * BUCKET_DTYPE.itemsize):
        flipped = bucket.copy()
        flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        assert fgram_hash.bucket_checks(flipped)[0] != flipped["meta"][0] >> 8, f"bit {bit}"


def test_a_damaged_bucket_is_an_error_and_no_answer(
    zipf_index: BucketIndex, zipf_tokens: NDArray[np.int64]
) -> None:
    buckets = zipf_index.buckets.copy()
    buckets["fingerprint"][:, 0] ^= np.uint64(1)
    index = BucketIndex(buckets, zipf_index.num_home_buckets, 0, 64, 5, True)
    with pytest.raises(DamagedDataError, match="bucket"):
        Matcher(index).match(zipf_tokens[:50])
    with pytest.raises(DamagedDataError, match="bucket"):
        match_reference(index, zipf_tokens[:50], np.array([0, 50]))


def test_an_index_is_built_stretch_by_stretch_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the keys in four times the stretches: the same bytes, and no more memory than for one."""

    def peak_bytes(num_keys: int) -> int:
        tokens = np.full((num_keys, 2), -1, np.int32)
        tokens[:, 0], tokens[:, 1] = np.arange(num_keys) // 1000, np.arange(num_keys) % 1000
        lengths, counts = np.full(num_keys, 2, np.uint8), np.full(num_keys, 5, np.int64)
        fgrams = FGramSet(tokens, lengths, counts, "74" * 32, 5, num_keys)
        tracemalloc.start()
        build_index(fgrams, tmp_path / f"{num_keys}.bin", TABLE_ID)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    whole = peak_bytes(400_000)
    digest = (tmp_path / "400000.bin").read_bytes()
    monkeypatch.setattr("scone.model_store.fgram_index._KEYS_PER_STRETCH", 50_000)
    monkeypatch.setattr("scone.model_store.fgram_index._KEYS_PER_SCAN", 10_000)
    part, four_parts = peak_bytes(100_000), peak_bytes(400_000)
    assert (tmp_path / "400000.bin").read_bytes() == digest
    assert four_parts < 1.3 * part
    assert whole > 3 * four_parts  # tracemalloc sees the arrays


def test_header_names_the_shape(zipf_fgrams: FGramSet, tmp_path: Path) -> None:
    shape = build_index(zipf_fgrams, tmp_path / "index.bin", TABLE_ID)
    header = TableHeader.from_bytes((tmp_path / "index.bin").read_bytes(), "index.bin")
    assert header.table_id == TABLE_ID
    assert header.numbers == (shape.num_home_buckets, shape.num_buckets, 0, 64, len(zipf_fgrams))
