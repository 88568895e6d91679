"""One streamed completion over a raw HTTP/1.1 connection, with the arrival time of every event.

Only the standard library: a client library's own buffering and CPU time would be measured as the server's.
Every request opens its own connection, so connecting counts into the time to the first token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


class ResponseError(Exception):
    """The server answered, but not with a complete stream: a status, an error event, or an early end."""


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds of the monotonic clock.

    Attributes:
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
            aclosing(stream_events(url, "/v1/completions", streamed, api_key)) as events,
        ):
            async for event in events:
                _note(record, event)
    except TimeoutError:  # before OSError, its base class
        record.error = f"no complete answer within {timeout_seconds:g} s"
    except (OSError, ResponseError, asyncio.IncompleteReadError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = time.monotonic()
    return record


def _note(record: RequestRecord, event: dict[str, Any]) -> None:
    """Adds one event of the stream to the record."""
    if "error" in event:
        raise ResponseError(event["error"].get("message", "error event"))
    if any(choice.get("text") for choice in event["choices"]):
        record.token_times.append(time.monotonic())
    if usage := event.get("usage"):
        record.num_prompt_tokens = usage["prompt_tokens"]
        record.num_generated_tokens = usage["completion_tokens"]


async def stream_events(
    url: str, path: str, body: Mapping[str, Any], api_key: str | None
) -> AsyncGenerator[dict[str, Any]]:
    """The JSON of each `data:` event up to `[DONE]`; raises ResponseError, OSError or IncompleteReadError."""
    reader, writer = await _send(url, "POST", path, json.dumps(body).encode(), api_key)
    try:
        status, chunked = await _read_head(reader)
        if status != 200:
            raise ResponseError(f"HTTP {status}: {(await _read_all(reader, chunked))[:200]!r}")
        pending = b""
        async for block in _read_body(reader, chunked):
            pending += block
            *events, pending = pending.split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: "):
                    continue  # a keep-alive comment
                if event == b"data: [DONE]":
                    return
                yield json.loads(event.removeprefix(b"data: "))
        raise ResponseError("the stream ended without [DONE]")
    finally:
        await _close(writer)


async def post_json(url: str, path: str, body: Mapping[str, Any], api_key: str | None = None) -> Any:
    """The JSON that a POST is answered with; raises ResponseError unless the status is 200, and OSError."""
    reader, writer = await _send(url, "POST", path, json.dumps(body).encode(), api_key)
    try:
        status, chunked = await _read_head(reader)
        content = await _read_all(reader, chunked)
    finally:
        await _close(writer)
    if status != 200:
        raise ResponseError(f"POST {path}: HTTP {status}: {content[:200]!r}")
    return json.loads(content)


async def get_text(url: str, path: str, api_key: str | None = None) -> str:
    """The body of a plain GET; raises ResponseError or OSError."""
    reader, writer = await _send(url, "GET", path, b"", api_key)
    try:
        status, chunked = await _read_head(reader)
        text = (await _read_all(reader, chunked)).decode()
    finally:
        await _close(writer)
    if status != 200:
        raise ResponseError(f"GET {path}: HTTP {status}: {text[:200]!r}")
    return text


async def _send(
    url: str, method: str, path: str, body: bytes, api_key: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ResponseError(f"url is {url!r}, wanted http://HOST:PORT")
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    head = [
        f"{method} {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if api_key:
        head.append(f"Authorization: Bearer {api_key}")
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    await writer.drain()
    return reader, writer


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):  # the other side may have closed first
        await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status code, and whether the body comes in chunks."""
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status_line.split(" ", 2)[1]), headers.get("transfer-encoding", "").lower() == "chunked"


async def _read_body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Blocks of the body as they arrive; a chunk that is cut short raises IncompleteReadError."""
    if not chunked:
        while block := await reader.read(1 << 16):
            yield block
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _read_all(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    return b"".join([block async for block in _read_body(reader, chunked)])
