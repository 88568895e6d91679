"""The ring on a device as late as may be, and proof that each of its synchronisations is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import CpuDevice
from scone.cache.errors import RowReadError
from scone.cache.sim_device import SimDevice
from scone.cache.staging_ring import Slot, SlotState, StagingRing
from tests.conftest import Forgetful

DIM = 4
NUM_SEEDS = 60


def read_rows(row_ids: NDArray[np.int64], out: Tensor) -> None:
    """Row r is r everywhere."""
    out.copy_(torch.from_numpy(row_ids).float()[:, None].expand(-1, DIM))


def fill(ring: StagingRing, row_ids: Sequence[int] | NDArray[np.int64]) -> Slot | None:
    ids = np.asarray(row_ids, np.int64)
    return ring.fill(ids, ids * 10, partial(read_rows, ids))


def fill_apart(ring: StagingRing, row_ids: Sequence[int] | NDArray[np.int64]) -> Slot | None:
    """As `fill`, in the steps of a restore: the slot is taken, then written elsewhere, then committed."""
    ids = np.asarray(row_ids, np.int64)
    slot = ring.reserve(len(ids))
    if slot is not None:
        read_rows(ids, slot.host_rows)
        ring.commit(slot, ids, ids * 10)
    return slot


def fail(out: Tensor) -> None:
    out.fill_(7.0)
    raise RowReadError("the disk reported an I/O error (EIO)")


def look_at(rows: Tensor, places: Tensor, seen: list[Tensor]) -> None:
    """The model: reads the rows when it runs; a row and its place belong together."""
    seen.append(torch.where(places[: len(rows), None] == 10 * rows, rows, torch.nan))


def run_at_once(device: SimDevice, num_steps: int = 24) -> bool:
    """Hands over what was written before the model's work of the same step; as `run_pipeline`."""
    ring = StagingRing(device, 5, DIM, torch.float32)
    wanted = [np.arange(step, step + 1 + step % 5) for step in range(num_steps)]
    seen: list[Tensor] = []
    for ids in wanted:
        slot = ring.reserve(5)
        assert slot is not None
        target, num_rows = slot.target, len(ids)
        target.row_ids[:num_rows], target.places[:num_rows] = ids, ids * 10
        read_rows(ids, target.rows[:num_rows])
        device.launch(partial(look_at, *ring.hand_over(slot, num_rows), seen))
        ring.release(slot)
    device.drain()
    assert ring.num_in_use == 0
    expected = [torch.from_numpy(ids).float()[:, None].expand(-1, DIM) for ids in wanted]
    return all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


Fill = Callable[[StagingRing, NDArray[np.int64]], Slot | None]


def run_pipeline(device: SimDevice, num_steps: int = 24, ahead: int = 2, fill: Fill = fill) -> bool:
    """Fills two steps ahead of the model; True if the model saw the rows of each step, in each step."""
    ring = StagingRing(device, 5, DIM, torch.float32)
    wanted = [np.arange(step, step + 1 + step % 5) for step in range(num_steps)]
    seen: list[Tensor] = []
    filled: list[Slot] = []
    for step in range(num_steps + ahead):
        if step < num_steps:
            slot = fill(ring, wanted[step])
            assert slot is not None
            filled.append(slot)
        if step >= ahead:
            slot = filled[step - ahead]
            rows, places = ring.use(slot, wanted[step - ahead])
            device.launch(partial(look_at, rows, places, seen))
            ring.release(slot)
    device.drain()
    assert ring.num_in_use == 0
    expected = [torch.from_numpy(ids).float()[:, None].expand(-1, DIM) for ids in wanted]
    return all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("fill", [fill, fill_apart])
def test_the_model_sees_its_rows_whatever_the_device_does(fill: Fill) -> None:
    assert all(run_pipeline(SimDevice(seed), fill=fill) for seed in range(NUM_SEEDS))


@pytest.mark.parametrize("fill", [fill, fill_apart])
@pytest.mark.parametrize(
    "forgotten",
    [
        "host waits for copied",  # I1
        "copy stream waits",  # I2
        "compute stream waits",  # I3
        "copy stream is recorded",
        "compute stream is recorded",
    ],
)
def test_without_any_one_synchronisation_some_step_sees_wrong_rows(forgotten: str, fill: Fill) -> None:
    num_wrong = sum(not run_pipeline(Forgetful(seed, forgotten), fill=fill) for seed in range(NUM_SEEDS))
    assert num_wrong > 0.9 * NUM_SEEDS


def test_rows_that_are_handed_over_at_once_need_the_same_synchronisations() -> None:
    assert all(run_at_once(SimDevice(seed)) for seed in range(NUM_SEEDS))
    for forgotten in ("host waits for copied", "copy stream waits", "compute stream waits"):
        num_wrong = sum(not run_at_once(Forgetful(seed, forgotten)) for seed in range(NUM_SEEDS))
        assert num_wrong > 0.9 * NUM_SEEDS, forgotten


def test_a_full_ring_refuses_and_a_released_slot_is_given_again() -> None:
    ring = StagingRing(SimDevice(0), 2, DIM, torch.float32)
    slots = [fill(ring, [i]) for i in range(3)]
    assert fill(ring, [9]) is None
    assert slots[1] is not None
    ring.release(slots[1])  # never used: a cancelled prefetch
    again = fill(ring, [9])
    assert again is slots[1]


def test_who_must_not_wait_gets_no_slot_that_is_still_copied() -> None:
    for seed in range(NUM_SEEDS):
        device = SimDevice(seed)
        ring = StagingRing(device, 2, DIM, torch.float32)
        for step in range(3):
            slot = fill(ring, [step])
            assert slot is not None
            ring.release(slot)
        while (slot := ring.reserve(1, wait=False)) is None:
            assert device.step()
        assert device.reached(slot.copied)
        ring.release(slot)


def test_a_slot_is_used_only_for_its_row_ids() -> None:
    ring = StagingRing(CpuDevice(), 4, DIM, torch.float32)
    slot = fill(ring, [3, 1])
    assert slot is not None
    for wrong in ([3], [1, 3], [3, 1, -1]):
        with pytest.raises(ValueError, match="not filled with these"):
            ring.use(slot, np.array(wrong))
    rows, places = ring.use(slot, np.array([3, 1]))
    assert rows[:, 0].tolist() == [3.0, 1.0]
    assert places[:2].tolist() == [30, 10]
    with pytest.raises(ValueError, match="in use"):
        ring.use(slot, np.array([3, 1]))
    ring.release(slot)
    with pytest.raises(ValueError, match="free"):
        ring.use(slot, np.array([3, 1]))


def test_a_failed_fill_leaks_no_slot() -> None:
    device = SimDevice(1)
    ring = StagingRing(device, 2, DIM, torch.float32)

    ids = np.array([1])
    for _ in range(10):
        with pytest.raises(RowReadError):
            ring.fill(ids, ids, fail)
        assert ring.num_in_use == 0
    assert run_pipeline(device)


def test_a_device_that_fails_leaks_no_slot() -> None:
    class Failing(SimDevice):
        is_broken = False

        def copy_to_device(self, target: Tensor, source: Tensor) -> None:
            if self.is_broken:
                raise RuntimeError("the device does not answer")
            super().copy_to_device(target, source)

    for seed in range(NUM_SEEDS):
        device = Failing(seed)
        ring = StagingRing(device, 2, DIM, torch.float32)
        for step in range(9):
            device.is_broken = step % 3 == 1
            if device.is_broken:
                with pytest.raises(RuntimeError, match="does not answer"):
                    fill(ring, [step])
                continue
            slot = fill(ring, [step])
            assert slot is not None
            seen: list[Tensor] = []
            device.launch(partial(look_at, *ring.use(slot, np.array([step])), seen))
            ring.release(slot)
            device.drain()
            assert seen[0].tolist() == [[step] * DIM]
        assert ring.num_in_use == 0


def addresses(ring: StagingRing) -> set[int]:
    return {side.data_ptr() for slot in ring._slots for side in slot._memory}


def test_on_a_cpu_the_model_reads_what_the_host_wrote() -> None:
    ring = StagingRing(CpuDevice(), 4, DIM, torch.float32)
    written: list[int] = []
    ids = np.array([1, 2])
    slot = ring.fill(ids, ids, lambda out: written.append(out.data_ptr()))
    assert slot is not None
    assert ring.use(slot, ids)[0].data_ptr() == written[0]


def test_a_slot_being_filled_is_in_use() -> None:
    ring = StagingRing(CpuDevice(), 4, DIM, torch.float32)
    seen: list[int] = []
    ids = np.array([1])
    ring.fill(ids, ids, lambda out: seen.append(ring.num_in_use))
    assert seen == [1]


def test_addresses_never_change() -> None:
    device = SimDevice(2)
    ring = StagingRing(device, 5, DIM, torch.float32)
    before = addresses(ring)
    for step in range(20):
        slot = fill(ring, [step])
        assert slot is not None
        assert ring.use(slot, np.array([step]))[1].data_ptr() in before
        ring.release(slot)
    assert addresses(ring) == before
    with pytest.raises(ValueError, match="at least 3"):
        StagingRing(device, 5, DIM, torch.float32, num_slots=2)


class RingMachine(RuleBasedStateMachine):
    """Any order of fills, failures, uses, cancels and device steps."""

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.device = SimDevice(seed)
        self.ring = StagingRing(self.device, 4, DIM, torch.float32)
        self.ready: list[tuple[Slot, NDArray[np.int64]]] = []
        self.in_use: list[Slot] = []
        self.reserved: list[Slot] = []
        self.checks: list[tuple[Tensor, list[int]]] = []

    @rule(ids=st.lists(st.integers(0, 99), min_size=1, max_size=4))
    def fill(self, ids: list[int]) -> None:
        slot = fill(self.ring, ids)
        assert (slot is None) == (self.num_held == 3)
        if slot is not None:
            self.ready.append((slot, np.array(ids)))

    @property
    def num_held(self) -> int:
        return len(self.ready) + len(self.in_use) + len(self.reserved)

    @rule(num_rows=st.integers(1, 4), wait=st.booleans())
    def reserve(self, num_rows: int, wait: bool) -> None:
        slot = self.ring.reserve(num_rows, wait=wait)
        assert slot is not None or not wait or self.num_held == 3
        if slot is not None:
            slot.host_rows.fill_(torch.nan)
            self.reserved.append(slot)

    @precondition(lambda self: self.reserved)
    @rule(first=st.integers(0, 99), num_fewer=st.integers(0, 3))
    def commit(self, first: int, num_fewer: int) -> None:
        """Of the rows reserved, only the first may be wanted."""
        slot = self.reserved.pop()
        ids = np.arange(first, first + max(1, slot.num_rows - num_fewer))
        read_rows(ids, slot.host_rows[: len(ids)])
        self.ring.commit(slot, ids, ids * 10)
        self.ready.append((slot, ids))

    @precondition(lambda self: self.reserved)
    @rule()
    def give_up(self) -> None:
        self.ring.release(self.reserved.pop(0))

    @rule()
    def fill_that_fails(self) -> None:
        if self.num_held < 3:
            with pytest.raises(RowReadError):
                self.ring.fill(np.array([5]), np.array([5]), fail)

    @precondition(lambda self: self.ready)
    @rule()
    def use(self) -> None:
        slot, ids = self.ready.pop(0)
        rows, _ = self.ring.use(slot, ids)
        result = torch.full((len(ids),), -1.0)
        self.checks.append((result, ids.tolist()))
        self.device.launch(lambda: result.copy_(rows[:, 0]))
        self.in_use.append(slot)

    @precondition(lambda self: self.ready)
    @rule()
    def cancel(self) -> None:
        self.ring.release(self.ready.pop()[0])

    @precondition(lambda self: self.in_use)
    @rule()
    def release(self) -> None:
        self.ring.release(self.in_use.pop(0))

    @rule(num_steps=st.integers(1, 5))
    def step_device(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.device.step()

    @invariant()
    def slots_are_accounted_for(self) -> None:
        held = self.num_held
        assert held <= self.ring.num_in_use <= 3
        assert held == sum(slot.state is not SlotState.FREE for slot in self.ring._slots)

    def teardown(self) -> None:
        self.device.drain()
        for result, ids in self.checks:
            assert result.tolist() == ids
        for slot in [slot for slot, _ in self.ready] + self.in_use + self.reserved:
            self.ring.release(slot)
        self.device.drain()
        assert self.ring.num_in_use == 0


RingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestRingMachine: Any = RingMachine.TestCase
