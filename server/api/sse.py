"""Server-sent events as OpenAI's clients read them: `data: {json}` frames, the last one `data: [DONE]`."""

from __future__ import annotations

import asyncio
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
        upcoming: asyncio.Future[bytes] | None = None
        try:
            while True:
                if upcoming is None:
                    upcoming = asyncio.ensure_future(anext(self._frames))
                # wait, not wait_for: a keep-alive must not cancel the frame that is being made.
                await asyncio.wait({upcoming}, timeout=self._keep_alive_interval)
                if not upcoming.done():
                    data = KEEP_ALIVE
                elif isinstance(upcoming.exception(), StopAsyncIteration):
                    break
                else:
                    data, upcoming = upcoming.result(), None
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if upcoming is not None:
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)
