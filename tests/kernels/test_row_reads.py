"""The plan of a direct read: native against its oracle, and the oracle against a loop over bytes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from scone.kernels.disk_read import PAGE_BYTES
from scone.kernels.extension import native
from scone.kernels.row_reads import RowReads, plan_row_reads, plan_row_reads_numpy

SIZES = (1, 33, 1152, 1366, 4095, 4096, 4097, 8192, 10_000)


def some_ids(seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    near = generator.integers(0, 200, 60)  # neighbours and repetitions
    far = generator.integers(0, 100_000, 60)
    return generator.permutation(np.concatenate((near, far, np.arange(300, 480), np.full(9, -1))))


def arrays_of(plan: RowReads) -> tuple[NDArray[np.int64], ...]:
    return (plan.pages, *plan.spans, plan.row_offsets, plan.targets)


def check(plan: RowReads, row_ids: NDArray[np.int64], begin: int, end: int, row_bytes: int) -> None:
    """Reads, without a file, the page numbers that each row's bytes ought to come from."""
    buffer = np.full(len(plan.pages) * PAGE_BYTES, -1)
    for offset, size, place in zip(*(part.tolist() for part in plan.spans), strict=True):
        assert size <= 32 * PAGE_BYTES
        buffer[place : place + size] = np.arange(offset, offset + size)
    wanted = [i for i, row_id in enumerate(row_ids.tolist()) if begin <= row_id < end]
    assert sorted(plan.targets.tolist()) == wanted
    assert np.all(np.diff(plan.row_offsets) >= 0)
    assert np.all(np.diff(plan.pages) > 0)
    for at, target in zip(plan.row_offsets.tolist(), plan.targets.tolist(), strict=True):
        begins = int(row_ids[target]) * row_bytes
        assert np.array_equal(buffer[at : at + row_bytes], np.arange(begins, begins + row_bytes))
    used = {byte // PAGE_BYTES for i in wanted for byte in _ends(int(row_ids[i]), row_bytes)}
    assert used == set(plan.pages.tolist())


def _ends(row_id: int, row_bytes: int) -> range:
    """A byte of each page of the row."""
    first, last = row_id * row_bytes // PAGE_BYTES, ((row_id + 1) * row_bytes - 1) // PAGE_BYTES
    return range(first * PAGE_BYTES, last * PAGE_BYTES + 1, PAGE_BYTES)


@pytest.mark.parametrize("row_bytes", SIZES)
def test_each_row_lies_where_the_plan_says(row_bytes: int) -> None:
    for seed in range(3):
        row_ids = some_ids(seed)
        check(plan_row_reads_numpy(row_ids, 0, 1 << 40, row_bytes), row_ids, 0, 1 << 40, row_bytes)
        check(plan_row_reads_numpy(row_ids, 100, 400, row_bytes), row_ids, 100, 400, row_bytes)


@pytest.mark.parametrize("row_bytes", SIZES)
def test_native_plans_are_those_of_the_oracle(row_bytes: int) -> None:
    if native is None:
        pytest.skip("the native kernels are not built")
    for seed in range(20):
        row_ids = some_ids(seed)
        begin, end = sorted(np.random.default_rng(seed).integers(0, 1000, 2).tolist())
        for first, after in ((0, 1 << 40), (begin, end), (5, 5)):
            found = arrays_of(plan_row_reads(row_ids, first, after, row_bytes))
            wanted = arrays_of(plan_row_reads_numpy(row_ids, first, after, row_bytes))
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_nothing_is_planned_for_nothing() -> None:
    plan = plan_row_reads(np.empty(0, np.int64), 0, 10, 64)
    assert [len(part) for part in arrays_of(plan)] == [0] * 6


def test_native_refuses_too_little_room() -> None:
    if native is None:
        pytest.skip("the native kernels are not built")
    room = np.empty(3, np.int64)
    with pytest.raises(ValueError, match="no room for the pages"):
        native.plan_row_reads(np.arange(4), 0, 10, 4096, 4096, 32, room, room, room, room, room, room)
