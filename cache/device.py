"""What staging needs of an accelerator, and nothing else: host memory, device memory, two streams, events.

Three implementations: `CpuDevice` here (a copy is done when it is asked for), `CudaDevice` (cuda_device.py)
and `SimDevice` (sim_device.py: late, in adversarial order, over poisoned memory), on which the tests prove
that the staging ring leaves out no synchronisation.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any
"""A point in a stream; made by `Device.event`, reused for ever."""


class Stream(Enum):
    """The two orders of work: copies to the device, and the model."""

    COPY = "copy"
    COMPUTE = "compute"


class Device(Protocol):
    """One accelerator. Nothing but `host_tensor`, `device_tensor` and `event` allocates."""

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that the host writes and copies read; pinned where that matters."""

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that copies write and the model reads; its address never changes."""

    def event(self) -> Event:
        """An event that counts as reached until it is recorded."""

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy on the copy stream; `source` is read when it runs, not now."""

    def record(self, event: Event, stream: Stream) -> None:
        """`event` is reached when all that is queued on `stream` by now has run."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Nothing queued on `stream` from now on runs before `event` is reached. Does not block the host."""

    def reached(self, event: Event) -> bool:
        """Whether `event` is reached. Does not block."""

    def synchronize(self, event: Event) -> None:
        """Blocks the host until `event` is reached."""


class CpuDevice:
    """Host and device are one: a copy has run when the call returns, every event is reached."""

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def event(self) -> Event:
        return None

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record(self, event: Event, stream: Stream) -> None:
        pass

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def reached(self, event: Event) -> bool:
        return True

    def synchronize(self, event: Event) -> None:
        pass
