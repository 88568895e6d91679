"""Which sequences wait for their f-gram rows, what the scheduler is told of it, and how long a step waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from scone.server.engine.generation import Generation
from scone.server.engine.input_rows import PendingRows
from scone.server.engine.scheduler import Status


class RowWaits:
    """The sequences with rows that were not there when last looked.

    Attributes:
        has_read: whether any sequence has ever had reads under way; never where all rows are in memory.
    """

    def __init__(self) -> None:
        self.has_read = False
        self._reading: set[Generation] = set()
        self._asked: list[tuple[PendingRows, Sequence[Generation]]] = []

    @property
    def expects_rows(self) -> bool:
        """Whether rows of some sequence were not there when last looked."""
        return bool(self._reading or self._asked)

    def expect(self, pending: PendingRows, generations: Sequence[Generation]) -> None:
        """The newest tokens' rows were asked for, of sequences that had all others.

        Most have come when the next step is made: until then nothing is noted of single sequences.
        """
        self.has_read = True
        self._asked.append((pending, generations))

    def note(self, generation: Generation) -> None:
        """Tells the scheduler which inputs of a sequence have their rows; to be called when that changes."""
        seq, rows = generation.seq, generation.input_rows
        if rows is None:
            seq.ready_from, seq.ready_to = 0, sys.maxsize
            return
        seq.ready_from, seq.ready_to = rows.ready_range()
        if rows.reads:
            self.has_read = True
        if rows.reads and seq.ready_to != sys.maxsize:
            self._reading.add(generation)
        else:
            self.forget(generation)
            generation.was_awaited = False

    def forget(self, generation: Generation) -> None:
        """It waits for nothing any more."""
        self._reading.discard(generation)

    def clear(self) -> None:
        """There are no sequences any more."""
        self._reading.clear()
        self._asked.clear()

    def poll(self) -> None:
        """Notes what has arrived."""
        for generation in list(self._reading):
            self.note(generation)

    def wait(self, num_running: int, step_seconds: float) -> None:
        """Waits for rows of decoding sequences, no longer than leaving them out of the step would cost.

        Left out, they stand idle for a step: their share of it is lost. Each row is waited for once.

        Args:
            num_running: sequences that the step is shared by.
            step_seconds: what a step takes.
        """
        awaited = [g for g in self._reading if not g.was_awaited and g.seq.num_uncomputed_tokens == 1]
        num_awaited = len(awaited) + sum(pending.num_under_way() for pending, _ in self._asked)
        deadline = time.monotonic() + num_awaited / max(1, num_running) * step_seconds
        for pending, generations in self._asked if num_awaited else ():
            if not pending.wait(0, len(pending.row_ids), max(0.0, deadline - time.monotonic())):
                self._note_late(generations)
        self._asked.clear()
        for generation in awaited:
            generation.was_awaited = True
            assert generation.rows is not None
            generation.rows.wait(deadline - time.monotonic())
            self.note(generation)

    def _note_late(self, generations: Sequence[Generation]) -> None:
        """Some of their rows have been waited for in vain."""
        for generation in generations:
            if generation.seq.status is not Status.FINISHED:
                self.note(generation)
                generation.was_awaited = generation in self._reading
