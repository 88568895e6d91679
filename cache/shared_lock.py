"""A lock that many may share, or one may have alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Not re-entrant. Whoever wants it alone goes before those who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._num_sharing = 0
        self._num_waiting = 0
        self._taken = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            while self._taken or self._num_waiting:
                self._changed.wait()
            self._num_sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_sharing -= 1
                if not self._num_sharing:
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._num_waiting += 1
            while self._taken or self._num_sharing:
                self._changed.wait()
            self._num_waiting -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
