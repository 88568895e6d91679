"""A simulated accelerator that is as late and as disorderly as a real one may be.

Each stream is a queue; which stream runs its next operation, and when, is decided by a seeded generator. A
copy reads its source when it runs. New memory is poisoned with NaN. What a program may rely on is what it
has synchronised, and a program that relies on more fails for some seed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scone.cache.device import Event, Stream


class SimEvent:
    """Points to its latest record; waiting means to wait for the record of that moment, as in CUDA."""

    def __init__(self) -> None:
        self.record = Record(reached=True)


@dataclass
class Record:
    """One place in a stream."""

    reached: bool = False


class SimDevice:
    """Deterministic for a seed; nothing runs unless the host waits, asks, or `step`s."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._queues: dict[Stream, deque[tuple[Callable[[], bool], Callable[[], object]]]] = {
            stream: deque() for stream in Stream
        }

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def device_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def event(self) -> Event:
        return SimEvent()

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        self._push(Stream.COPY, lambda: target.copy_(source))

    def launch(self, kernel: Callable[[], object]) -> None:
        """Queues work of the model on the compute stream."""
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
        for _ in range(self._random.randrange(3)):
            self.step()
        reached: bool = event.record.reached
        return reached

    def synchronize(self, event: Event) -> None:
        while not event.record.reached:
            if not self.step():
                raise AssertionError("deadlock: an event is awaited that nothing can reach")

    def step(self) -> bool:
        """Runs one operation of a stream chosen at random; False if none can run."""
        runnable = [queue for queue in self._queues.values() if queue and queue[0][0]()]
        if not runnable:
            return False
        self._random.choice(runnable).popleft()[1]()
        return True

    def drain(self) -> None:
        """Runs everything that is queued."""
        while self.step():
            pass
        if any(self._queues.values()):
            raise AssertionError("deadlock: operations wait for an event that nothing can reach")

    def _push(self, stream: Stream, run: Callable[[], object]) -> None:
        self._queues[stream].append((lambda: True, run))
