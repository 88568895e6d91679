"""The one thread that writes recycled states, and the bounded queue before it.

Whoever computes a state hands it over and goes on: a full queue refuses, it never makes anybody wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scone.cache.recycled_record import Payload, Record, as_bytes, kind_of
from scone.cache.recycled_stats import RecycledStats

logger = logging.getLogger(__name__)

_MAX_BATCH_BYTES = 16 << 20
_IDLE_SECONDS = 0.2


class StateSink(Protocol):
    """Where the writer puts records; called on its thread alone."""

    def holds(self, name: bytes) -> bool: ...
    def store(self, records: list[tuple[Record, float, int]]) -> None:
        """Keeps (record, cost_seconds, depth)."""

    def idle(self) -> None:
        """Called after each batch, and every so often while there is none."""


@dataclass(slots=True)
class Job:
    """One write that waits."""

    name: bytes
    ids: bytes
    payload: Payload | Callable[[], Payload]
    cost_seconds: float
    depth: int
    on_done: Callable[[], None] | None

    @property
    def known_bytes(self) -> int:
        return 0 if callable(self.payload) else as_bytes(self.payload).nbytes


class RecycledWriter:
    """Runs from construction to `close`."""

    def __init__(self, sink: StateSink, stats: RecycledStats, max_jobs: int, max_bytes: int) -> None:
        self._sink = sink
        self._stats = stats
        # Half may wait, half be on its way to the disk; but one payload, of whatever size, always may.
        self._max_jobs, self._max_bytes = max_jobs, max_bytes // 2
        self._batch_bytes = min(_MAX_BATCH_BYTES, max_bytes // 2)
        self._jobs: deque[Job] = deque()
        self._waiting_bytes = 0
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scone-recycled-writer", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._jobs)

    def submit(self, job: Job) -> bool:
        """False: the queue is full or closed, and the job was ended."""
        num_bytes = job.known_bytes
        with self._changed:
            fits = not self._waiting_bytes or self._waiting_bytes + num_bytes <= self._max_bytes
            if fits and len(self._jobs) < self._max_jobs and not self._closed:
                self._jobs.append(job)
                self._waiting_bytes += num_bytes
                self._changed.notify_all()
                return True
        self._end(job, "dropped")
        return False

    def flush(self, timeout: float) -> bool:
        """Waits until all that was submitted is stored or refused."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout)

    def close(self) -> None:
        """Ends the thread after the batch under way; what waits is dropped."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in waiting:
            self._end(job, "dropped")
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._closed, _IDLE_SECONDS)
                if self._closed:
                    return
                self._busy = bool(self._jobs)
            try:
                if self._busy:
                    self._write_batch()
                self._sink.idle()
            except Exception:
                logger.exception("recycled states could not be written")
                time.sleep(_IDLE_SECONDS)  # whatever it is, it is not to be repeated at full speed

    def _write_batch(self) -> None:
        batch: list[tuple[Record, float, int]] = []
        num_bytes = 0
        while num_bytes < self._batch_bytes:
            with self._changed:
                if not self._jobs:
                    break
                job = self._jobs.popleft()
                self._waiting_bytes -= job.known_bytes
            record = self._record(job)
            if record is not None:
                batch.append((record, job.cost_seconds, job.depth))
                num_bytes += record.num_bytes
        if batch:
            self._sink.store(batch)

    def _record(self, job: Job) -> Record | None:
        """The job's record; ends the job: from now on the payload is no longer looked at."""
        if self._sink.holds(job.name):
            self._end(job, "held")
            return None
        try:
            payload = job.payload() if callable(job.payload) else job.payload
            record = Record.make(job.name, job.ids, as_bytes(payload).copy())
        except Exception:
            logger.exception("the payload of a recycled state cannot be had")
            self._end(job, "failed")
            return None
        self._end(job, None)
        return record

    def _end(self, job: Job, result: str | None) -> None:
        if result is not None:
            self._stats.add_write(kind_of(job.name), result)
        if job.on_done is not None:
            try:
                job.on_done()
            except Exception:
                logger.exception("on_done of a recycled state's write failed")
