"""Staging to a CUDA device: pinned host memory, one side stream for copies, one for copies back to the host,
the caller's stream for the model.

Copies from pinned memory run on the side stream while the model computes; nothing is allocated after
start-up, so addresses are fixed and the consuming step may be captured in a CUDA graph.

The ring's logic is proved on SimDevice; `make test-cuda` shows on a GPU that it holds there, and that each
synchronisation is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from scone.cache.device import Buffer, DeviceUsage, Event, Stream
from scone.cache.errors import CacheError

_logger = logging.getLogger(__name__)


class CudaDevice:
    """Use it from the thread that runs the model: its compute stream is that thread's current one."""

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self.usage = DeviceUsage()
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._save_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        memory = torch.empty(shape, dtype=dtype, device=self._device)
        self.usage.staging_bytes += memory.nbytes
        return Buffer(self._host_tensor(shape, dtype), memory)

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            memory = torch.empty(shape, dtype=dtype, device=self._device)
        except torch.OutOfMemoryError:
            num_bytes, (free, _) = math.prod(shape) * dtype.itemsize, torch.cuda.mem_get_info(self._device)
            raise CacheError(
                f"{num_bytes} bytes of rows do not fit on {self._device}, where {free} are free: lower"
                " device_bytes"
            ) from None
        self.usage.table_bytes += memory.nbytes
        return memory

    def event(self) -> Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def upload(self, target: Tensor, source: Tensor) -> None:
        self.usage.copied_bytes += source.nbytes
        target.copy_(source)

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        self.usage.copied_bytes += source.nbytes
        with torch.cuda.stream(self._copy_stream):
            target.copy_(source, non_blocking=True)

    def copy_to_host(self, source: Tensor, after: Event) -> Tensor:
        with torch.cuda.stream(self._save_stream):  # beside the model and the copies that it waits for
            self._save_stream.wait_event(after)
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source.contiguous(), non_blocking=True)
            self._save_stream.synchronize()
        return host

    def launch(self, kernel: Callable[[], object]) -> None:
        kernel()  # torch queues it on the current stream

    def record(self, event: Event, stream: Stream) -> None:
        event.record(self._stream(stream))

    def wait(self, stream: Stream, event: Event) -> None:
        self._stream(stream).wait_event(event)

    def reached(self, event: Event) -> bool:
        return bool(event.query())

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def _host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            memory = torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            # for instance RLIMIT_MEMLOCK; copies are then slower and no longer run beside the model
            _logger.warning("host memory cannot be pinned (%s): copies to the device will be slower", error)
            return torch.empty(shape, dtype=dtype)
        self.usage.pinned_bytes += memory.nbytes
        return memory

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        return self._copy_stream if stream is Stream.COPY else torch.cuda.current_stream(self._device)
