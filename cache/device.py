"""What staging needs of an accelerator, and nothing else: memory on both sides, two streams, events.

Three implementations: `CpuDevice` here (one memory, no copies), `CudaDevice` (cuda_device.py) and
`SimDevice` (sim_device.py: late, in adversarial order, over poisoned memory), on which the tests prove that
the staging ring leaves out no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Event = Any
"""A point in a stream; made by `Device.event`, reused for ever."""


class Stream(Enum):
    """The two orders of work: copies to the device, and the model."""

    COPY = "copy"
    COMPUTE = "compute"


class Buffer(NamedTuple):
    """What the host writes and what the model reads: one and the same tensor where they share memory."""

    host: Tensor
    device: Tensor


@dataclass(slots=True)
class DeviceUsage:
    """What a device was asked for so far.

    Attributes:
        pinned_bytes: host memory that the kernel cannot take back.
        staging_bytes: device memory of buffers.
        table_bytes: device memory of `device_tensor`.
        copied_bytes: bytes of all copies to the device, a counter.
    """

    pinned_bytes: int = 0
    staging_bytes: int = 0
    table_bytes: int = 0
    copied_bytes: int = 0


class Device(Protocol):
    """One accelerator. Nothing but `buffer`, `device_tensor` and `event` allocates."""

    @property
    def usage(self) -> DeviceUsage: ...

    @property
    def is_host(self) -> bool:
        """Whether the model computes on the host, in its memory: rows may be written where it reads them."""

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """Memory for copies to the device, pinned where that matters; its addresses never change."""

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that copies write and the model reads; its address never changes."""

    def event(self) -> Event:
        """An event that counts as reached until it is recorded."""

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copies to memory that nothing uses yet, and waits for it; for start-up."""

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy on the copy stream; `source`, of a buffer's host side, is read when it runs."""

    def copy_to_host(self, source: Tensor, after: Event) -> Tensor:
        """New host memory with what `source` holds once `after` is reached; blocks, may be on any thread."""

    def launch(self, kernel: Callable[[], object]) -> None:
        """Queues work of the model on the compute stream."""

    def record(self, event: Event, stream: Stream) -> None:
        """`event` is reached when all that is queued on `stream` by now has run."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Nothing queued on `stream` from now on runs before `event` is reached. Does not block the host."""

    def reached(self, event: Event) -> bool:
        """Whether `event` is reached. Does not block."""

    def synchronize(self, event: Event) -> None:
        """Blocks the host until `event` is reached."""


class CpuDevice:
    """Host and device are one: nothing is copied, work has run when the call returns, events are reached."""

    is_host = True

    def __init__(self) -> None:
        self.usage = DeviceUsage()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        memory = torch.empty(shape, dtype=dtype)
        return Buffer(memory, memory)

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def event(self) -> Event:
        return None

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        pass

    def copy_to_host(self, source: Tensor, after: Event) -> Tensor:
        # NumPy's: torch would start threads beside those of the model.
        return torch.from_numpy(source.view(torch.uint8).numpy().copy()).view(source.dtype)

    def launch(self, kernel: Callable[[], object]) -> None:
        kernel()

    def record(self, event: Event, stream: Stream) -> None:
        pass

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def reached(self, event: Event) -> bool:
        return True

    def synchronize(self, event: Event) -> None:
        pass
