"""Where the engine's thread spends the time of its steps.

Of each phase the time that passed and the processor time that the thread used itself are counted: in a phase
that computes on this thread, the difference is what it waited for a processor or for Python's lock.
"""

from __future__ import annotations

import time
from typing import Literal, get_args

Phase = Literal["schedule", "rows", "inputs", "forward", "sample", "device", "accept", "deliver"]
"""What to compute; the wait for rows from a disk; token ids, embeddings and rows; the layers and the choice
of tokens, which on a device are only queued; the wait for the device; what the next step needs to know of the
tokens; what the clients get of them."""

PHASES: tuple[Phase, ...] = get_args(Phase)


class StepClock:
    """Counters for the engine's thread to move; any thread may read them.

    Attributes:
        seconds, cpu_seconds: by phase, so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.cpu_seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase | None = None
        self._since = self._cpu_since = 0.0

    def enter(self, phase: Phase) -> None:
        """The phase before it ends."""
        now, cpu_now = time.perf_counter(), time.thread_time()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
            self.cpu_seconds[self._phase] += cpu_now - self._cpu_since
        self._phase, self._since, self._cpu_since = phase, now, cpu_now

    def leave(self) -> None:
        """The step ends: what comes until the next one is no part of it."""
        if self._phase is not None:
            self.enter(self._phase)
            self._phase = None
