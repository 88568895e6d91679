"""Slots through which rows go from the host to the device while the model computes.

A slot's life: FREE -> `fill` (FILLING: the host writes rows, a copy is queued) -> READY -> `use` (the model
may read them) -> IN_USE -> `release` -> FREE. The invariants, each guarded by one synchronisation and each
shown by a test to be needed:

I1  the host writes a slot's host side only after the copy that reads it has run;
I2  a copy into a slot's device side runs only after the model has done with it;
I3  the model reads it only after the copy has run;
I4  a slot is used only for the row ids it was filled with;
I5  nothing is allocated after construction: addresses are fixed;
I6  a ring never overwrites: without a free slot it refuses, and a slot that the device still needs makes
    the host wait for it, so that the host is never more than `num_slots` steps ahead;
I7  a fill that fails leaves its slot FREE and usable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import Buffer, Device, Event, Stream


class SlotState(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    IN_USE = "in use"


@dataclass(eq=False, slots=True)
class Slot:
    """One slot; everything but the numbers and `state` is allocated once.

    Attributes:
        rows: (max_rows, dim).
        places: (max_rows,) int64: where the model wants the rows.
        row_ids: (max_rows,) int64: what the rows are.
    """

    rows: Buffer
    places: Buffer
    row_ids: NDArray[np.int64]
    copied: Event
    consumed: Event
    num_rows: int = 0
    state: SlotState = SlotState.FREE


class StagingRing:
    """Slots of up to `max_rows` rows each. For one thread: the one that runs the model.

    Args:
        num_slots: 3: one that the model reads, one under way, one being filled.
    """

    def __init__(
        self, device: Device, max_rows: int, dim: int, dtype: torch.dtype, num_slots: int = 3
    ) -> None:
        if num_slots < 3:
            raise ValueError(f"num_slots is {num_slots}, wanted at least 3")
        self._device = device
        self._slots = [
            Slot(
                rows=device.buffer((max_rows, dim), dtype),
                places=device.buffer((max_rows,), torch.int64),
                row_ids=np.full(max_rows, -1, np.int64),
                copied=device.event(),
                consumed=device.event(),
            )
            for _ in range(num_slots)
        ]

    @property
    def num_in_use(self) -> int:
        """Slots that are not FREE, or that the device has not done with."""
        return sum(
            slot.state is not SlotState.FREE or not self._device.reached(slot.consumed)
            for slot in self._slots
        )

    def fill(
        self, row_ids: NDArray[np.int64], places: NDArray[np.int64], read: Callable[[Tensor], object]
    ) -> Slot | None:
        """Reads rows into a free slot and queues their copy; None if no slot is free: come back later.

        Args:
            row_ids: (n,) int64, n <= max_rows.
            places: (n,) int64, copied along.
            read: writes the rows of these ids to a host tensor (n, dim); what it raises is raised.
        """
        slot = next((slot for slot in self._slots if slot.state is SlotState.FREE), None)
        if slot is None:
            return None  # I6
        num_rows = slot.num_rows = len(row_ids)
        slot.row_ids[:] = -1  # I4: until all went well this slot stands for nothing
        self._device.synchronize(slot.copied)  # I1
        slot.state = SlotState.FILLING
        try:
            read(slot.rows.host[:num_rows])
            slot.places.host[:num_rows] = torch.from_numpy(places)
            self._queue_copies(slot)
        except BaseException:
            slot.state = SlotState.FREE  # I7
            raise
        slot.row_ids[:num_rows] = row_ids
        slot.state = SlotState.READY
        self._slots.append(self._slots.pop(self._slots.index(slot)))  # the longest unused is taken next
        return slot

    def use(self, slot: Slot, row_ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The slot's rows (n, dim) and places (n,) on the device, for work launched until `release`.

        Raises:
            ValueError: the slot was not filled with these row ids.
        """
        if slot.state is not SlotState.READY or not np.array_equal(slot.row_ids[: slot.num_rows], row_ids):
            raise ValueError(f"the slot is {slot.state.value} and was not filled with these row ids")  # I4
        self._device.wait(Stream.COMPUTE, slot.copied)  # I3
        slot.state = SlotState.IN_USE
        return slot.rows.device[: slot.num_rows], slot.places.device[: slot.num_rows]

    def release(self, slot: Slot) -> None:
        """Gives the slot back, used or not; work launched so far may still read it."""
        was_in_use, slot.state = slot.state is SlotState.IN_USE, SlotState.FREE
        if was_in_use:
            self._device.record(slot.consumed, Stream.COMPUTE)

    def _queue_copies(self, slot: Slot) -> None:
        self._device.wait(Stream.COPY, slot.consumed)  # I2
        try:
            for buffer in (slot.rows, slot.places):
                self._device.copy_to_device(buffer.device[: slot.num_rows], buffer.host[: slot.num_rows])
        finally:
            self._device.record(slot.copied, Stream.COPY)  # also of what was queued before a failure
