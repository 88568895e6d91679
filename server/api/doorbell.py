"""Wakes the event loop once for all that a step of the engine has delivered, not once a token.

A wake-up is a system call on the engine's thread, which gives up Python's lock for it: with one for each
of 32 sequences, the two threads would hand the lock to and fro 32 times a step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scone.server.api.generation import Generation


class Doorbell:
    """Between the engine's thread, which notes and rings, and the event loop, which is woken."""

    def __init__(self) -> None:
        self._noted: deque[Generation] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # that of what was noted since the last ring

    def note(self, generation: Generation) -> None:
        """It has something new and has not been woken for it; `ring` follows."""
        self._noted.append(generation)
        self._loop = generation.loop

    def ring(self) -> None:
        """Wakes the loop if anything was noted since the last time."""
        loop, self._loop = self._loop, None
        if loop is not None:
            # The loop is closed only after the server gave up waiting for its requests.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        while self._noted:
            self._noted.popleft().wake()
