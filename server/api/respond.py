"""The two ways a generation is answered: one JSON body, or a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from scone.server.api.disconnect import ClientDisconnectedError, until_disconnect
from scone.server.api.generation import Generation, PromptDelta
from scone.server.api.sse import EventStreamResponse

CLIENT_CLOSED_REQUEST = 499


class Answer(Protocol):
    """How one kind of request words its answer."""

    def whole(self, deltas: Sequence[PromptDelta]) -> bytes: ...
    def events(self, deltas: Sequence[PromptDelta]) -> bytes: ...
    def last_event(self) -> bytes: ...


async def respond(request: Request, generation: Generation, answer: Answer, *, stream: bool) -> Response:
    """The response to a started generation, which is aborted if the client goes or anything fails."""
    if not stream:
        return await respond_whole(request, generation, answer.whole)
    try:
        return await _stream(request, generation, answer)
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it


async def respond_whole(
    request: Request, generation: Generation, whole: Callable[[Sequence[PromptDelta]], bytes]
) -> Response:
    """The response that is made of all deltas at once."""
    try:
        deltas = await until_disconnect(request.receive, _all_deltas(generation))
        return Response(whole(deltas), media_type="application/json")
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it
    finally:
        generation.close()


async def _all_deltas(generation: Generation) -> list[PromptDelta]:
    deltas: list[PromptDelta] = []
    while fresh := await generation.next_deltas():
        deltas += fresh
    return deltas


async def _stream(request: Request, generation: Generation, answer: Answer) -> Response:
    """Waits for the first deltas before the response starts, so that an early failure has its own status."""
    interval = generation.keep_alive_interval
    first = asyncio.ensure_future(generation.next_deltas())
    try:
        # Not longer than one keep-alive interval: behind a proxy, silence costs the connection.
        await until_disconnect(request.receive, asyncio.wait({first}, timeout=interval))
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        generation.close()
        raise

    def close() -> None:
        first.cancel()
        generation.close()

    return EventStreamResponse(_AnswerEvents(generation, answer, first), interval, on_close=close)


class _AnswerEvents:
    """What a stream says of a generation; not an async generator, which takes longer to resume."""

    def __init__(
        self, generation: Generation, answer: Answer, first: asyncio.Future[list[PromptDelta]]
    ) -> None:
        self._generation, self._answer = generation, answer
        self._first: asyncio.Future[list[PromptDelta]] | None = first
        self._is_over = False

    async def next(self) -> bytes:
        while not self._is_over:
            if self._first is not None:
                deltas, self._first = await self._first, None
            else:
                deltas = await self._generation.next_deltas()
            if not deltas:
                self._is_over = True
                return self._answer.last_event()
            if events := self._answer.events(deltas):
                return events
        return b""
