"""The ring on a device as late as may be, and proof that each of its synchronisations is needed."""

from __future__ import annotations

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

from scone.cache.device import CpuDevice, Device, Event, Stream
from scone.cache.errors import RowReadError
from scone.cache.sim_device import SimDevice
from scone.cache.staging_ring import Slot, SlotState, StagingRing

DIM = 4
NUM_SEEDS = 50


def read_rows(row_ids: NDArray[np.int64], out: Tensor) -> None:
    """Row r is r everywhere."""
    out.copy_(torch.from_numpy(row_ids).float()[:, None].expand(-1, DIM))


class Forgetful(SimDevice):
    """A device on which one kind of synchronisation does nothing, as if its line were deleted."""

    def __init__(self, seed: int, forgotten: str) -> None:
        super().__init__(seed)
        self.forgotten = forgotten

    def synchronize(self, event: Event) -> None:
        if self.forgotten != "host waits for copied":
            super().synchronize(event)

    def wait(self, stream: Stream, event: Event) -> None:
        if self.forgotten != f"{stream.value} stream waits":
            super().wait(stream, event)

    def record(self, event: Event, stream: Stream) -> None:
        if self.forgotten != f"{stream.value} stream is recorded":
            super().record(event, stream)


def copy_of(rows: Tensor, seen: list[Tensor]) -> None:
    """The model: reads the rows when it runs."""
    seen.append(rows.clone())


def run_pipeline(device: SimDevice, num_steps: int = 12, ahead: int = 2) -> bool:
    """Fills two steps ahead of the model; True if the model saw the rows of each step, in each step."""
    ring = StagingRing(device, 5, DIM, torch.float32)
    wanted = [np.arange(step, step + 1 + step % 5) for step in range(num_steps)]
    seen: list[Tensor] = []
    filled: list[Slot] = []
    for step in range(num_steps + ahead):
        if step < num_steps:
            slot = ring.fill(wanted[step], read_rows)
            assert slot is not None
            filled.append(slot)
        if step >= ahead:
            slot = filled[step - ahead]
            rows = ring.use(slot, wanted[step - ahead])
            device.launch(partial(copy_of, rows, seen))
            ring.release(slot)
    device.drain()
    assert ring.num_in_use == 0
    expected = [torch.from_numpy(ids).float()[:, None].expand(-1, DIM) for ids in wanted]
    return all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_the_model_sees_its_rows_whatever_the_device_does() -> None:
    assert all(run_pipeline(SimDevice(seed)) for seed in range(NUM_SEEDS))


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
def test_without_any_one_synchronisation_some_step_sees_wrong_rows(forgotten: str) -> None:
    num_wrong = sum(not run_pipeline(Forgetful(seed, forgotten)) for seed in range(NUM_SEEDS))
    assert num_wrong >= NUM_SEEDS // 10


def test_a_full_ring_refuses_and_a_released_slot_is_given_again() -> None:
    ring = StagingRing(SimDevice(0), 2, DIM, torch.float32)
    slots = [ring.fill(np.array([i]), read_rows) for i in range(3)]
    assert ring.fill(np.array([9]), read_rows) is None
    assert slots[1] is not None
    ring.release(slots[1])  # never used: a cancelled prefetch
    again = ring.fill(np.array([9]), read_rows)
    assert again is slots[1]


def test_a_slot_is_used_only_for_its_row_ids() -> None:
    ring = StagingRing(CpuDevice(), 4, DIM, torch.float32)
    slot = ring.fill(np.array([3, 1]), read_rows)
    assert slot is not None
    for wrong in ([3], [1, 3], [3, 1, -1]):
        with pytest.raises(ValueError, match="not filled with these"):
            ring.use(slot, np.array(wrong))
    assert ring.use(slot, np.array([3, 1]))[:, 0].tolist() == [3.0, 1.0]
    with pytest.raises(ValueError, match="in use"):
        ring.use(slot, np.array([3, 1]))
    ring.release(slot)
    with pytest.raises(ValueError, match="free"):
        ring.use(slot, np.array([3, 1]))


def test_a_failed_fill_leaks_no_slot() -> None:
    device = SimDevice(1)
    ring = StagingRing(device, 2, DIM, torch.float32)

    def fail(row_ids: NDArray[np.int64], out: Tensor) -> None:
        out.fill_(7.0)
        raise RowReadError("the disk reported an I/O error (EIO)")

    for _ in range(10):
        with pytest.raises(RowReadError):
            ring.fill(np.array([1]), fail)
        assert ring.num_in_use == 0
    assert run_pipeline(device)


def test_addresses_never_change() -> None:
    device = SimDevice(2)
    ring = StagingRing(device, 5, DIM, torch.float32)
    before = {(s.host_rows.data_ptr(), s.device_rows.data_ptr()) for s in ring._slots}
    for step in range(20):
        slot = ring.fill(np.array([step]), read_rows)
        assert slot is not None
        assert ring.use(slot, np.array([step])).data_ptr() in {address for _, address in before}
        ring.release(slot)
    assert {(s.host_rows.data_ptr(), s.device_rows.data_ptr()) for s in ring._slots} == before
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
        self.checks: list[tuple[Tensor, list[int]]] = []

    @rule(ids=st.lists(st.integers(0, 99), min_size=1, max_size=4))
    def fill(self, ids: list[int]) -> None:
        slot = self.ring.fill(np.array(ids), read_rows)
        assert (slot is None) == (len(self.ready) + len(self.in_use) == 3)
        if slot is not None:
            self.ready.append((slot, np.array(ids)))

    @rule()
    def fill_that_fails(self) -> None:
        def fail(row_ids: NDArray[np.int64], out: Tensor) -> None:
            raise RowReadError("EIO")

        if len(self.ready) + len(self.in_use) < 3:
            with pytest.raises(RowReadError):
                self.ring.fill(np.array([5]), fail)

    @precondition(lambda self: self.ready)
    @rule()
    def use(self) -> None:
        slot, ids = self.ready.pop(0)
        rows = self.ring.use(slot, ids)
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
        assert self.ring.num_in_use == len(self.ready) + len(self.in_use)

    def teardown(self) -> None:
        self.device.drain()
        for result, ids in self.checks:
            assert result.tolist() == ids
        for slot in [slot for slot, _ in self.ready] + self.in_use:
            self.ring.release(slot)
        assert all(slot.state is SlotState.FREE for slot in self.ring._slots)


RingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestRingMachine: Any = RingMachine.TestCase


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_model_sees_its_rows() -> None:
    from scone.cache.cuda_device import CudaDevice

    device: Device = CudaDevice()
    ring = StagingRing(device, 4096, DIM, torch.float32)
    results = []
    for step in range(200):
        ids = np.arange(step, step + 4096)
        slot = ring.fill(ids, read_rows)
        assert slot is not None
        torch.cuda._sleep(100_000)  # type: ignore[no-untyped-call]
        rows = ring.use(slot, ids)
        results.append((rows[:, 0].clone(), step))
        ring.release(slot)
    for result, step in results:
        assert torch.equal(result.cpu(), torch.arange(step, step + 4096).float())
