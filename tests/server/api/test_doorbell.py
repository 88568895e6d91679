"""The event loop is woken once for all that the engine delivers in a step, and misses nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from scone.server.api.doorbell import Doorbell
from scone.server.api.generation import Generation

from .conftest import LiveServer


def test_one_wake_up_a_step(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    wakers: list[str] = []
    call_soon = server.loop.call_soon_threadsafe

    def counting(*arguments: Any) -> Any:
        wakers.append(threading.current_thread().name)
        return call_soon(*arguments)

    # uvloop's loops take no attributes: the doorbell's way to it is replaced.
    class CountedLoop:
        call_soon_threadsafe = staticmethod(counting)

    note = Doorbell.note

    def note_counted(self: Doorbell, generation: Generation) -> None:
        note(self, generation)
        self._loop = CountedLoop()  # type: ignore[assignment]

    monkeypatch.setattr(Doorbell, "note", note_counted)
    steps = server.metric("scone_step_seconds_count")
    answer = server.complete(prompt=["ab", "cd", "ef", "gh"], n=2, max_tokens=20, temperature=0)
    assert len(answer["choices"]) == 8
    streams = [
        threading.Thread(target=server.stream, kwargs={"prompt": "ab", "max_tokens": 30}) for _ in "1234"
    ]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    assert set(wakers) == {"engine"}
    assert 20 < len(wakers) <= server.metric("scone_step_seconds_count") - steps


def test_a_loop_that_is_gone_is_no_error() -> None:
    class Gone:
        loop = asyncio.new_event_loop()

    Gone.loop.close()
    bell = Doorbell()
    bell.ring()  # nothing to tell
    bell.note(Gone())  # type: ignore[arg-type]
    bell.ring()
