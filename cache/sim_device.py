"""A simulated accelerator that is as late and as disorderly as a real one may be.

Each stream is a queue; which stream runs its next operation, and when, is decided by a seeded generator: for
a while it favours one stream, or holds both back, then changes its mind. A copy reads its source when it
runs. New memory is poisoned. What a program may rely on is what it has synchronised, and a program that
relies on more fails for most seeds.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scone.cache.device import Buffer, DeviceUsage, Event, Stream

_CHANGE_OF_MIND = 0.1
"""Probability, at each operation queued or run, that another stream is favoured from then on."""


class SimEvent:
    """Points to its latest record; waiting means to wait for the record of that moment, as in CUDA."""

    def __init__(self) -> None:
        self.record = Record(reached=True)


@dataclass
class Record:
    """One place in a stream."""

    reached: bool = False


class SimDevice:
    """Deterministic for a seed; runs on the calling thread, whenever it is called."""

    is_host = False

    def __init__(self, seed: int) -> None:
        self.usage = DeviceUsage()
        self._random = random.Random(seed)
        self._queues: dict[Stream, deque[tuple[Callable[[], bool], Callable[[], object]]]] = {
            stream: deque() for stream in Stream
        }
        self._favourite: Stream | None = None
        self._change_favourite()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        host = _poisoned(shape, dtype)
        self.usage.pinned_bytes += host.nbytes
        self.usage.staging_bytes += host.nbytes
        return Buffer(host, _poisoned(shape, dtype))

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = _poisoned(shape, dtype)
        self.usage.table_bytes += memory.nbytes
        return memory

    def event(self) -> Event:
        return SimEvent()

    def upload(self, target: Tensor, source: Tensor) -> None:
        self.usage.copied_bytes += source.nbytes
        target.copy_(source)

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        self.usage.copied_bytes += source.nbytes
        self._push(Stream.COPY, lambda: target.copy_(source))

    def copy_to_host(self, source: Tensor, after: Event) -> Tensor:
        """To be called on the thread of all other calls."""
        self.synchronize(after)
        return source.clone()

    def launch(self, kernel: Callable[[], object]) -> None:
        self._push(Stream.COMPUTE, kernel)

    def record(self, event: Event, stream: Stream) -> None:
        record = event.record = Record()

        def reach() -> None:
            record.reached = True

        self._push(stream, reach)

    def wait(self, stream: Stream, event: Event) -> None:
        record = event.record
        self._queues[stream].append((lambda: record.reached, lambda: None))

    def reached(self, event: Event) -> bool:
        reached: bool = event.record.reached
        return reached

    def synchronize(self, event: Event) -> None:
        while not event.record.reached:
            if not self.step():
                raise AssertionError("deadlock: an event is awaited that nothing can reach")

    def step(self) -> bool:
        """Runs one operation, of the favoured stream if it has one; False if none can run."""
        if self._random.random() < _CHANGE_OF_MIND:
            self._change_favourite()
        runnable = [stream for stream, queue in self._queues.items() if queue and queue[0][0]()]
        if not runnable:
            return False
        chosen = self._favourite if self._favourite in runnable else self._random.choice(runnable)
        assert chosen is not None
        self._queues[chosen].popleft()[1]()
        return True

    def drain(self) -> None:
        """Runs everything that is queued."""
        while self.step():
            pass
        if any(self._queues.values()):
            raise AssertionError("deadlock: operations wait for an event that nothing can reach")

    def _push(self, stream: Stream, run: Callable[[], object]) -> None:
        self._queues[stream].append((lambda: True, run))
        if self._random.random() < _CHANGE_OF_MIND:
            self._change_favourite()
        # A favoured stream is quick: it runs whatever it can, while the other one lags behind.
        favoured = self._queues[self._favourite] if self._favourite else None
        while favoured and favoured[0][0]():
            favoured.popleft()[1]()

    def _change_favourite(self) -> None:
        self._favourite = self._random.choice([Stream.COPY, Stream.COMPUTE, None])


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """All bits set: NaN as a float of any width, -1 as an index."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)
