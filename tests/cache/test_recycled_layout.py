"""How a state lies in LMDB: whole pages, entries that are checked, an order of scores."""

from __future__ import annotations

import lmdb
import numpy as np
import pytest

from scone.cache.recycled_layout import (
    CHUNK_BYTES,
    LONGEST_ENTRY_BYTES,
    Entry,
    cut,
    name_in_order_key,
    num_pages,
    order_key,
    score_in_order_key,
)
from tests.cache.recycled_states import worth


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 16, 1900, 1950, 2000, 4080, 4081, 8176, CHUNK_BYTES, CHUNK_BYTES + 1, 50_000, 737_313]
)
def test_chunks_fill_pages(num_bytes: int) -> None:
    pieces = cut(num_bytes)
    ends = [end for _, end in pieces.bounds]
    assert [begin for begin, _ in pieces.bounds] == [0, *ends][:-1]
    assert (ends[-1] if ends else 0) + pieces.tail_bytes == num_bytes
    # All but the last fill whole pages with their header, and the last wastes less than half a page.
    assert all((size + 16) % 4096 == 0 for size in pieces.sizes.tolist()[:-1])
    pages = sum(-(-(size + 16) // 4096) for size in pieces.sizes.tolist())
    assert num_pages(num_bytes) >= pages
    assert pages * 4096 - num_bytes < 2300
    entry = Entry(
        1, 0, num_bytes, 2, worth(), np.arange(len(ends), dtype=np.uint32), bytes(pieces.tail_bytes)
    )
    assert len(entry.to_bytes()) <= LONGEST_ENTRY_BYTES
    assert Entry.from_bytes(entry.to_bytes()).to_bytes() == entry.to_bytes()


@pytest.mark.parametrize("change", [b"", b"short", b"\1" * 60, b"\xff" * 60])
def test_entries_that_contradict_themselves_are_damage(change: bytes) -> None:
    sound = Entry(1, 30, 70_000, 2, worth(), np.array([5, 21], np.uint32), bytes(420)).to_bytes()
    with pytest.raises(lmdb.CorruptedError):
        Entry.from_bytes(change if len(change) < 60 else change + sound[60:])


def test_order_keys_sort_as_scores() -> None:
    scores = [-1e300, -3.5, -1.0, -1e-9, 0.0, 1e-9, 1.0, 497_000.125, 1e300]
    keys = [order_key(score, b"name") for score in scores]
    assert keys == sorted(keys)
    assert [score_in_order_key(key) for key in keys] == scores
    assert name_in_order_key(keys[0]) == b"name"
