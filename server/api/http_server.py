"""uvicorn, stopped our way.

SIGTERM or SIGINT: /ready says no; `drain_delay` seconds later new generations are refused; those in
flight have `drain_timeout` seconds, then they get an error event and [DONE]; then the listener closes.
A second signal ends everything at once. uvicorn itself would close the listener first and cut streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from scone.server.api.errors import ApiError
from scone.server.api.state import ServerState
from scone.server.errors import ServerError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GOODBYE_SECONDS = 2.0
"""For writing the error events of interrupted requests."""


class HttpServer(uvicorn.Server):
    """Serves `app` on `listener` until it is told to stop."""

    def __init__(self, app: ASGIApp, state: ServerState, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=int(GOODBYE_SECONDS),
            )
        )
        self._state = state
        self._listener = listener
        self._stopping: asyncio.Task[None] | None = None

    async def run_until_stopped(self) -> None:
        """Returns when all is closed; `force_exit` says whether requests were cut."""
        await self.serve(sockets=[self._listener])

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Signals mean `stop` while this lasts. Enter it before anybody may know that the process runs."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begins to drain; the second call ends at once. Call it on the event loop."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._drain())
        else:
            logger.warning("told to stop again: ending at once")
            self.should_exit = self.force_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Keeps uvicorn's handlers out: they close the listener first and raise the signal again."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if counter % 10 == 0:
            self._state.interrupt_if_engine_died()
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        state, config = self._state, self._state.config
        if state.phase == "ready":
            logger.info("stopping: not ready any more, still serving for %g s", config.drain_delay)
            state.phase = "leaving"
            await asyncio.sleep(config.drain_delay)
            logger.info(
                "stopping: %d requests in flight have %g s", len(state.in_flight), config.drain_timeout
            )
            state.phase = "draining"
            await self._wait_for_requests(config.drain_timeout)
            for generation in state.in_flight:
                generation.interrupt(ApiError(503, "The server is shutting down.", code="shutting_down"))
            await self._wait_for_requests(GOODBYE_SECONDS)
        state.phase = "draining"
        self.should_exit = True

    async def _wait_for_requests(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._state.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where there is one: it takes half the time a streamed token."""
    try:
        import uvloop
    except ImportError:  # as on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections already; raises ServerError saying what is in the way."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another address with --host and --port"
        ) from None
    return listener
