"""The f-gram set file: round trip, rank order, closure, one clear error for each kind of damage."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scone.model_store.errors import FGramSetError
from scone.model_store.fgram_set import FGramSet, rank_order


def make_set(grams: dict[tuple[int, ...], int], max_n: int = 4) -> FGramSet:
    tokens = np.full((len(grams), max_n), -1, np.int32)
    for row, gram in zip(tokens, grams, strict=True):
        row[: len(gram)] = gram
    lengths = np.array([len(g) for g in grams], np.uint8)
    counts = np.array(list(grams.values()), np.int64)
    order = rank_order(tokens, lengths, counts)
    return FGramSet(tokens[order], lengths[order], counts[order], "ab" * 32, 5, 1000)


GRAMS = {(1, 2, 3): 7, (2, 3): 7, (1, 2): 9, (2, 1): 7, (9, 9): 5}


def test_rank_order_is_count_then_length_then_tokens() -> None:
    fgrams = make_set(GRAMS)
    ranked = [tuple(row[row >= 0].tolist()) for row in fgrams.tokens]
    assert ranked == [(1, 2), (2, 1), (2, 3), (1, 2, 3), (9, 9)]


def test_save_and_load_give_the_same_set_and_bytes(tmp_path: Path) -> None:
    fgrams = make_set(GRAMS)
    fgrams.save(tmp_path / "a.fgrams")
    fgrams.save(tmp_path / "b.fgrams")
    loaded = FGramSet.load(tmp_path / "a.fgrams")
    for name in ("tokens", "lengths", "counts"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(fgrams, name))
        assert getattr(loaded, name).dtype == getattr(fgrams, name).dtype
    assert loaded.hash == fgrams.hash
    assert (loaded.tokenizer_hash, loaded.min_count, loaded.num_corpus_tokens) == ("ab" * 32, 5, 1000)
    assert (tmp_path / "a.fgrams").read_bytes() == (tmp_path / "b.fgrams").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.fgrams", "b.fgrams"]


def test_an_empty_set_is_saved_and_loaded(tmp_path: Path) -> None:
    make_set({}).save(tmp_path / "empty.fgrams")
    loaded = FGramSet.load(tmp_path / "empty.fgrams")
    assert len(loaded) == 0
    assert loaded.max_n == 4
    assert loaded.is_closed()


def test_hash_follows_content() -> None:
    base = make_set(GRAMS)
    assert make_set(GRAMS | {(9, 9): 6}).hash != base.hash
    assert make_set(GRAMS, max_n=5).hash != base.hash
    assert base.head(3).hash != base.hash


@pytest.mark.parametrize(
    ("grams", "closed"),
    [
        ({}, True),
        ({(1, 2): 5}, True),
        (GRAMS, True),
        ({(1, 2): 9, (1, 2, 3): 7}, False),  # the suffix (2, 3) is missing
        ({(2, 3): 9, (1, 2, 3): 7}, False),  # the prefix (1, 2) is missing
        ({(1, 1): 9, (1, 1, 1): 8, (1, 1, 1, 1): 7}, True),
        ({(1, 1): 9, (1, 1, 1, 1): 7}, False),
        ({(1, 2): 9, (2, 3): 9, (3, 4): 9, (1, 2, 3): 7, (2, 3, 4): 7, (1, 2, 3, 4): 6}, True),
        ({(1, 2): 9, (2, 3): 9, (3, 4): 9, (1, 2, 3): 7, (1, 2, 3, 4): 6}, False),
        ({(2**31 - 1, 2**31 - 2): 9, (2**31 - 2, 7): 9, (2**31 - 1, 2**31 - 2, 7): 9}, True),
    ],
)
def test_closure(grams: dict[tuple[int, ...], int], closed: bool) -> None:
    assert make_set(grams).is_closed() is closed


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"counts": np.array([5, 9], np.int64)}, "not in rank order"),
        ({"counts": np.array([5], np.int64)}, "counts are"),
        ({"lengths": np.array([2, 1], np.uint8)}, "lengths outside"),
        ({"lengths": np.array([2, 5], np.uint8)}, "lengths outside"),
        ({"tokens": np.array([1, 2, 3], np.int32)}, "do not fit"),
        ({"tokens": np.array([1, 2, 3, -1], np.int32)}, "do not fit"),
        ({"tokens": np.array([1, 2, 3, 4], np.int64)}, "wanted int32"),
        ({"tokens": np.array([1, 2, 1, 2], np.int32), "counts": np.array([9, 9], np.int64)}, "occurs twice"),
    ],
)
def test_damaged_content_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    good: dict[str, np.ndarray] = {
        "tokens": np.array([1, 2, 3, 4], np.int32),
        "lengths": np.array([2, 2], np.uint8),
        "counts": np.array([9, 5], np.int64),
    }
    metadata = (
        '{"format_version": 1, "max_n": 4, "tokenizer_hash": "", "min_count": 5, "num_corpus_tokens": 1,'
        ' "corpus_hash": ""}'
    )
    path = tmp_path / "x.fgrams"
    save_file(good, path, metadata={"scone.fgrams": metadata})
    assert len(FGramSet.load(path)) == 2
    save_file(good | tensors, path, metadata={"scone.fgrams": metadata})
    with pytest.raises(FGramSetError, match=message):
        FGramSet.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no f-gram set"),
        ({"scone.fgrams": "{"}, "metadata"),
        ({"scone.fgrams": "[]"}, "metadata"),
        ({"scone.fgrams": '{"format_version": 1}'}, "metadata"),
        ({"scone.fgrams": '{"format_version": 2}'}, "format version 2"),
    ],
)
def test_foreign_metadata_is_refused(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    make_set(GRAMS).save(tmp_path / "good.fgrams")
    path = tmp_path / "x.fgrams"
    save_file({n: np.zeros(0, np.int32) for n in ("tokens", "lengths", "counts")}, path, metadata=metadata)
    with pytest.raises(FGramSetError, match=message):
        FGramSet.load(path)


def test_missing_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FGramSetError, match=r"missing\.fgrams"):
        FGramSet.load(tmp_path / "missing.fgrams")
    path = tmp_path / "x.fgrams"
    make_set(GRAMS).save(path)
    whole = path.read_bytes()
    for size in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FGramSetError, match="cannot read"):
            FGramSet.load(path)
