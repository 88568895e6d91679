"""Server-sent events as OpenAI's clients read them: `data: {json}` frames, the last one `data: [DONE]`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from scone.server.api.disconnect import wait_for_disconnect
from scone.server.api.errors import as_api_error

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def frame(content: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class ChunkFrames:
    """Events of one stream, which differ in their choices alone: the rest is written once."""

    def __init__(self, fields: Mapping[str, Any], *, with_usage: bool) -> None:
        """`fields` come before the choices. With usage, each has null there, and the last one has it."""
        self._begin = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """The event of one choice."""
        return self._begin + orjson.dumps(choice) + self._end

    def last(self, usage: Mapping[str, Any]) -> bytes:
        """The event with the usage; nothing if that is not wanted."""
        return self._begin + b'],"usage":' + orjson.dumps(usage) + b"}\n\n" if self._with_usage else b""


class Events(Protocol):
    """What a stream says."""

    async def next(self) -> bytes:
        """The next events, b"" after the last; raises what made them end."""


class EventStreamResponse(Response):
    """Sends events as they come, an error event if they end in an exception, then exactly one [DONE].

    Stops when the client goes; however it ends, `on_close` is called.

    Args:
        keep_alive_interval: seconds of silence after which a comment is sent: proxies cut idle streams.
    """

    def __init__(self, events: Events, keep_alive_interval: float, on_close: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        # The length is not known: Response has written that of its empty body.
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        self._events = events
        self._keep_alive_interval = keep_alive_interval
        self._on_close = on_close
        self._last_sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        watching = asyncio.create_task(wait_for_disconnect(receive))
        sending = asyncio.create_task(self._send_events(send))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            self._on_close()

    async def _send_events(self, send: Send) -> None:
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        end = DONE
        try:
            while data := await self._events.next():
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            end = frame(as_api_error(error).body()) + DONE
        finally:
            keeping_alive.cancel()
            await asyncio.gather(keeping_alive, return_exceptions=True)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_seconds = time.monotonic() - self._last_sent
            if silent_seconds >= self._keep_alive_interval:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            else:
                await asyncio.sleep(self._keep_alive_interval - silent_seconds)
