"""An HTTP/1.1 response and its server-sent events, from bytes that come in any pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class ResponseError(Exception):
    """The server answered, but not with a complete stream: a status, an error event, or an early end."""


class HttpResponse:
    """Fed with what a connection brings.

    Attributes:
        status: None until the head is there.
        is_complete: whether a chunked body has ended; one without chunks ends with the connection.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.is_complete = False
        self._is_chunked = False
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """What this adds to the body."""
        self._pending += data
        if self.status is None:
            head, separator, rest = self._pending.partition(b"\r\n\r\n")
            if not separator:
                return b""
            self._read_head(head.decode("latin-1"))
            self._pending = rest
        if self._is_chunked:
            return b"".join(self._chunks())
        body, self._pending = self._pending, b""
        return body

    def end(self) -> None:
        """To be called when the connection ends; raises ResponseError if something is missing."""
        if self.status is None or (self._is_chunked and not self.is_complete):
            raise ResponseError("the answer was cut short")

    def _read_head(self, head: str) -> None:
        status_line, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = int(status_line.split(" ", 2)[1])
        self._is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"

    def _chunks(self) -> Iterator[bytes]:
        while not self.is_complete:
            size_line, separator, rest = self._pending.partition(b"\r\n")
            if not separator:
                return
            size = int(size_line.split(b";")[0], 16)
            if len(rest) < size + 2:
                return
            self._pending = rest[size + 2 :]
            self.is_complete = size == 0
            yield rest[:size]


class EventStream:
    """The events of a streamed answer.

    Attributes:
        is_done: whether `[DONE]` has come.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._response = HttpResponse()
        self._pending = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The JSON of each `data:` event that is now complete, up to `[DONE]`; comments are passed over."""
        self._pending += self._response.feed(data)
        if self._response.status != 200:
            return []  # it is an error, which is read to its end
        events = []
        *frames, self._pending = self._pending.split(b"\n\n")
        for frame in frames:
            if frame == b"data: [DONE]":
                self.is_done = True
                break
            if frame.startswith(b"data: "):
                events.append(json.loads(frame.removeprefix(b"data: ")))
        return events

    def end(self) -> None:
        """To be called when the connection ends; raises ResponseError unless the stream was complete."""
        if self.is_done:
            return
        self._response.end()
        if self._response.status != 200:
            raise ResponseError(f"HTTP {self._response.status}: {self._pending[:200]!r}")
        raise ResponseError("the stream ended without [DONE]")
