"""Slots through which rows go from the host to the device while the model computes.

A row is any run of `dim` values that an id names: an f-gram's row, or the state of a block of tokens.

A slot's life: FREE -> `reserve` (FILLING: the host writes rows, on whatever thread) -> `commit` (a copy is
queued) -> READY -> `use` (the model may read them) -> IN_USE -> `release` -> FREE. `fill` is all of the first
two, `hand_over` both of the next, for a slot that is written and used at once. The invariants, each guarded
by one synchronisation and each shown by a test to be needed:

I1  the host writes a slot's host side only after the copy that reads it has run;
I2  a copy into a slot's device side runs only after the model has done with it;
I3  the model reads it only after the copy has run;
I4  a slot is used only for the row ids it was filled with;
I5  nothing is allocated after construction: addresses are fixed;
I6  a ring never overwrites: without a free slot it refuses, and a slot that the device still needs makes
    the host wait for it, so that the host is never more than `num_slots` steps ahead;
I7  a fill that fails leaves its slot FREE and usable; so does a reserved slot that is released.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import Device, Event, Stream
from scone.kernels.row_target import RowTarget

_ALIGNMENT = 256
"""Where rows may begin: what wide loads of any device want."""


class SlotState(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    IN_USE = "in use"


class _Views(NamedTuple):
    """The parts of a slot that n rows take."""

    host_rows: Tensor
    device_rows: Tensor
    device_indices: Tensor
    first_indices: Tensor
    host_bytes: Tensor
    device_bytes: Tensor


class Slot:
    """One slot. Its memory is one block, so that one copy moves it: indices, then rows.

    Attributes:
        row_ids: (max_rows,) int64: what the rows are.
        indices: (2 * max_rows,) int64, the host's: whatever the model needs to find their places.
    """

    def __init__(self, device: Device, max_rows: int, dim: int, dtype: torch.dtype) -> None:
        self._dim, self._dtype = dim, dtype
        self._rows_at = -(-2 * max_rows * 8 // _ALIGNMENT) * _ALIGNMENT
        self._memory = device.buffer((self._rows_at + max_rows * dim * dtype.itemsize,), torch.uint8)
        self._views: dict[int, _Views] = {}
        self._target: RowTarget | None = None
        self.row_ids = np.full(max_rows, -1, np.int64)
        self.indices = self._memory.host[: 2 * max_rows * 8].view(torch.int64).numpy()
        self.copied: Event = device.event()
        self.consumed: Event = device.event()
        self.num_rows = 0
        self.state = SlotState.FREE

    @property
    def num_bytes(self) -> int:
        return self._memory.host.nbytes

    @property
    def host_rows(self) -> Tensor:
        """(num_rows, dim), the host's."""
        return self.views().host_rows

    @property
    def target(self) -> RowTarget:
        """The slot as kernels write a decode step's rows to it, for `StagingRing.hand_over`; made once."""
        if self._target is None:
            rows = self._memory.host[self._rows_at :].view(self._dtype).view(-1, self._dim)
            self._target = RowTarget(rows, self.row_ids, self.indices)
        return self._target

    def views(self) -> _Views:
        """Those of `num_rows` rows; made once for each number."""
        if self.num_rows not in self._views:
            end = self._rows_at + self.num_rows * self._dim * self._dtype.itemsize
            host, device = self._memory.host[:end], self._memory.device[:end]
            indices = device[: self._rows_at].view(torch.int64)
            self._views[self.num_rows] = _Views(
                host_rows=host[self._rows_at :].view(self._dtype).view(self.num_rows, self._dim),
                device_rows=device[self._rows_at :].view(self._dtype).view(self.num_rows, self._dim),
                device_indices=indices,
                first_indices=indices[: self.num_rows],
                host_bytes=host,
                device_bytes=device,
            )
        return self._views[self.num_rows]


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
        self._slots = [Slot(device, max_rows, dim, dtype) for _ in range(num_slots)]

    @property
    def num_bytes(self) -> int:
        """Host memory of all slots."""
        return sum(slot.num_bytes for slot in self._slots)

    @property
    def num_in_use(self) -> int:
        """Slots that are not FREE, or that the device has not done with."""
        return sum(
            slot.state is not SlotState.FREE or not self._device.reached(slot.consumed)
            for slot in self._slots
        )

    def fill(
        self, row_ids: NDArray[np.int64], indices: NDArray[np.int64], read: Callable[[Tensor], object]
    ) -> Slot | None:
        """Reads rows into a free slot and queues their copy; None if no slot is free: come back later.

        Args:
            row_ids: (n,) int64, n <= max_rows.
            indices: (m,) int64, m <= 2 * max_rows, copied along.
            read: writes the rows of these ids to a host tensor (n, dim); what it raises is raised.
        """
        slot = self.reserve(len(row_ids))
        if slot is None:
            return None
        try:
            read(slot.host_rows)
            self.commit(slot, row_ids, indices)
        except BaseException:
            self.release(slot)  # I7
            raise
        return slot

    def reserve(self, num_rows: int, *, wait: bool = True) -> Slot | None:
        """A free slot whose `host_rows` may be written, by any one thread, until `commit` or `release`.

        None if no slot is free, or none without waiting for its last copy where `wait` is false: come back
        later.
        """
        for slot in self._slots:
            if slot.state is SlotState.FREE and (wait or self._device.reached(slot.copied)):
                break
        else:
            return None  # I6
        self._device.synchronize(slot.copied)  # I1
        slot.num_rows = num_rows
        slot.state = SlotState.FILLING
        self._slots.remove(slot)
        self._slots.append(slot)  # the longest unused is taken next
        return slot

    def commit(self, slot: Slot, row_ids: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Queues the copy of a reserved slot, now that its first rows are `row_ids`; as `fill`.

        Args:
            row_ids: (n,) int64, at most as many as were reserved.
        """
        assert slot.state is SlotState.FILLING
        assert len(row_ids) <= slot.num_rows
        slot.num_rows = len(row_ids)
        slot.indices[: len(indices)] = indices
        self._queue_copy(slot, slot.views())
        slot.row_ids[: slot.num_rows] = row_ids  # I4: only now the slot stands for them
        slot.state = SlotState.READY

    def use(self, slot: Slot, row_ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The slot's rows (n, dim) and indices on the device, for work launched until `release`.

        Indices are as filled; beyond those they are undefined.

        Raises:
            ValueError: the slot was not filled with these row ids.
        """
        filled_with = slot.row_ids[: slot.num_rows]
        if slot.state is not SlotState.READY or filled_with.tobytes() != row_ids.tobytes():
            raise ValueError(f"the slot is {slot.state.value} and was not filled with these row ids")  # I4
        self._device.wait(Stream.COMPUTE, slot.copied)  # I3
        slot.state = SlotState.IN_USE
        views = slot.views()
        return views.device_rows, views.device_indices

    def hand_over(self, slot: Slot, num_rows: int) -> tuple[Tensor, Tensor]:
        """`commit` and `use` in one, of a reserved slot that is written at once, as far as `num_rows` rows.

        The host has written rows, their ids and the index of each to `slot.target` together, so that the slot
        can stand for no others (I4).

        Returns:
            The rows (num_rows, dim) and their indices (num_rows,) on the device, as `use`.
        """
        assert slot.state is SlotState.FILLING
        assert num_rows <= slot.num_rows
        slot.num_rows = num_rows
        views = slot.views()
        self._queue_copy(slot, views)
        self._device.wait(Stream.COMPUTE, slot.copied)  # I3
        slot.state = SlotState.IN_USE
        return views.device_rows, views.first_indices

    def release(self, slot: Slot) -> None:
        """Gives the slot back, used or not; work launched so far may still read it."""
        was_in_use, slot.state = slot.state is SlotState.IN_USE, SlotState.FREE
        if was_in_use:
            self._device.record(slot.consumed, Stream.COMPUTE)

    def _queue_copy(self, slot: Slot, views: _Views) -> None:
        self._device.wait(Stream.COPY, slot.consumed)  # I2
        self._device.copy_to_device(views.device_bytes, views.host_bytes)
        self._device.record(slot.copied, Stream.COPY)
