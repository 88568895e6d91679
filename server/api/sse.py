"""Server-sent events as OpenAI's clients read them: `data: {json}` frames, the last one `data: [DONE]`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

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


async def terminated(frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """`frames`, then an error event if they end in an exception, then exactly one [DONE]."""
    try:
        async for data in frames:
            yield data
    except Exception as error:
        yield frame(as_api_error(error).body())
    yield DONE


class EventStreamResponse(Response):
    """Sends frames as they come; stops and closes them when the client goes.

    Args:
        frames: closed (`aclose`) however the response ends; then `on_close` is called.
        keep_alive_interval: seconds of silence after which a comment is sent: proxies cut idle streams.
    """

    def __init__(
        self, frames: AsyncGenerator[bytes], keep_alive_interval: float, on_close: Callable[[], None]
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        # The length is not known: Response has written that of its empty body.
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        self._frames = frames
        self._keep_alive_interval = keep_alive_interval
        self._on_close = on_close
        self._last_sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        watching = asyncio.create_task(wait_for_disconnect(receive))
        sending = asyncio.create_task(self._send_frames(send))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            await self._frames.aclose()
            self._on_close()

    async def _send_frames(self, send: Send) -> None:
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            async for data in self._frames:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            keeping_alive.cancel()
            await asyncio.gather(keeping_alive, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_seconds = time.monotonic() - self._last_sent
            if silent_seconds >= self._keep_alive_interval:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            else:
                await asyncio.sleep(self._keep_alive_interval - silent_seconds)
