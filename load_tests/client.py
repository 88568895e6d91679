"""One streamed completion over a raw HTTP/1.1 connection, with the arrival time of every event.

Only the standard library: a client library's own buffering and CPU time would be measured as the server's.
For the same reason a measured answer is only noted, with the time of each piece, and read once it has ended.
Every request opens its own connection, so connecting counts into the time to the first token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from load_tests.http_response import EventStream, HttpResponse, ResponseError


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds of the monotonic clock.

    Attributes:
        end: when the last of the answer came.
        token_times: arrival of each event that carried text; the first gives the time to first token.
        error: one line, None when the stream ended properly.
    """

    start: float
    end: float = 0.0
    token_times: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    error: str | None = None


async def complete(
    url: str, body: Mapping[str, Any], *, api_key: str | None = None, timeout_seconds: float = 600
) -> RequestRecord:
    """Sends one streamed completion to `url`, the server's root, and reads it to its end.

    A request that fails is a record with an error, never an exception.
    """
    record = RequestRecord(start=time.monotonic())
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            _exchange(url, "POST", "/v1/completions", json.dumps(streamed).encode(), api_key) as exchange,
        ):
            await exchange.until_done()
        record.end = exchange.blocks[-1][0] if exchange.blocks else time.monotonic()
        _read(record, exchange.blocks)
    except TimeoutError:  # before OSError, its base class
        record.error = f"no complete answer within {timeout_seconds:g} s"
    except (OSError, ResponseError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = record.end or time.monotonic()
    return record


def _read(record: RequestRecord, blocks: list[tuple[float, bytes]]) -> None:
    """Fills in what an answer says; raises ResponseError if it is an error or was cut short."""
    stream = EventStream()
    for seconds, block in blocks:
        for event in stream.feed(block):
            if "error" in event:
                raise ResponseError(event["error"].get("message", "error event"))
            if any(choice.get("text") for choice in event["choices"]):
                record.token_times.append(seconds)
            if usage := event.get("usage"):
                record.num_prompt_tokens = usage["prompt_tokens"]
                record.num_generated_tokens = usage["completion_tokens"]
    stream.end()


async def stream_events(
    url: str, path: str, body: Mapping[str, Any], api_key: str | None
) -> AsyncGenerator[dict[str, Any]]:
    """The JSON of each `data:` event up to `[DONE]`, as they come; raises ResponseError or OSError."""
    stream = EventStream()
    async with _exchange(url, "POST", path, json.dumps(body).encode(), api_key) as exchange:
        async for block in exchange:
            for event in stream.feed(block):
                yield event
            if stream.is_done:
                return
        stream.end()


async def post_json(url: str, path: str, body: Mapping[str, Any], api_key: str | None = None) -> Any:
    """The JSON that a POST is answered with; raises ResponseError unless the status is 200, and OSError."""
    return json.loads(await _whole(url, "POST", path, json.dumps(body).encode(), api_key))


async def get_text(url: str, path: str, api_key: str | None = None) -> str:
    """The body of a plain GET; raises ResponseError or OSError."""
    return (await _whole(url, "GET", path, b"", api_key)).decode()


async def _whole(url: str, method: str, path: str, body: bytes, api_key: str | None) -> bytes:
    response = HttpResponse()
    content = b""
    async with _exchange(url, method, path, body, api_key) as exchange:
        async for block in exchange:
            content += response.feed(block)
    response.end()
    if response.status != 200:
        raise ResponseError(f"{method} {path}: HTTP {response.status}: {content[:200]!r}")
    return content


class _Exchange(asyncio.Protocol):
    """One request, and what comes back: iterating waits for it, block by block.

    Attributes:
        blocks: with the time at which each came.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[float, bytes]] = []
        self.closed = asyncio.Event()
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._done = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.blocks.append((time.monotonic(), data))
        self._news.set()
        if b"data: [DONE]" in data:
            self._done.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._error = error
        for event in (self._news, self._done, self.closed):
            event.set()

    async def until_done(self) -> None:
        """Returns when `[DONE]` has come, or the connection has ended; raises OSError if it broke."""
        await self._done.wait()
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_read = 0
        while True:
            while num_read < len(self.blocks):
                num_read += 1
                yield self.blocks[num_read - 1][1]
            if self._error is not None:
                raise self._error
            if self.closed.is_set():
                return
            self._news.clear()
            await self._news.wait()


@asynccontextmanager
async def _exchange(
    url: str, method: str, path: str, body: bytes, api_key: str | None
) -> AsyncIterator[_Exchange]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ResponseError(f"url is {url!r}, wanted http://HOST:PORT")
    head = [
        f"{method} {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if api_key:
        head.append(f"Authorization: Bearer {api_key}")
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_connection(_Exchange, parts.hostname, parts.port or 80)
    try:
        transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        yield exchange
    finally:
        transport.close()
        await exchange.closed.wait()
