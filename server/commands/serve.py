"""`scone serve`: listens at once, loads the model meanwhile, answers OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time

from scone.kernels.errors import SconeError
from scone.server.api.app import create_app
from scone.server.api.config import ApiConfig
from scone.server.api.http_server import HttpServer, listen, new_event_loop
from scone.server.api.state import ServedModel, ServerState
from scone.server.log_format import configure_logging
from scone.server.metrics import ServerMetrics
from scone.server.serve_settings import SERVE_SETTINGS, api_config
from scone.server.settings import Command, Resolved
from scone.server.version import version

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""How long the last recycled states may take to reach the disk once all requests have ended."""


def run(settings: Resolved) -> int:
    """Serves until a signal; 0 after a drained stop, 1 if loading failed or requests were cut."""
    configure_logging(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_Serving(settings, api_config(settings)).run())


class _Serving:
    """One run of the server, from the listener to the last log line."""

    def __init__(self, settings: Resolved, config: ApiConfig) -> None:
        self._settings = settings
        self._started = time.monotonic()
        self._metrics = ServerMetrics()
        self._state = ServerState(config, self._metrics)
        self._listener = listen(settings.host, settings.port)
        self._server = HttpServer(create_app(self._state), self._state, self._listener)
        self._failure: str | None = None
        self._ready = False

    async def run(self) -> int:
        with self._server.stopped_by_signals():
            self._log_start()
            return await self._run()

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        # A daemon: a signal while it loads must not wait for it.
        loader = threading.Thread(target=self._load, args=(loop,), name="load-model", daemon=True)
        loader.start()
        await self._server.run_until_stopped()
        if self._failure is not None:
            print(f"scone serve: {self._failure}", file=sys.stderr)
            return 1
        if not self._ready:
            logger.info("stopped while loading")
            self._exit_now(0)
        if self._server.force_exit:
            self._exit_now(1)
        model = self._state.model
        model.engine.shutdown(timeout_seconds=0)
        if model.recycled is not None:
            model.recycled.close(flush_seconds=FLUSH_SECONDS)
        logger.info("stopped")
        return 0

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the loader's thread."""
        try:
            from scone.server.load_model import ModelLoader

            model = ModelLoader(self._settings, self._metrics).load()
        except SconeError as error:
            self._failure = str(error)
        except Exception as error:
            logger.exception("loading failed")
            self._failure = f"loading failed: {type(error).__name__}: {error}"
        if self._failure is not None:
            self._state.phase = "failed"
            loop.call_soon_threadsafe(self._server.stop)
        else:
            loop.call_soon_threadsafe(self._serve, model)

    def _serve(self, model: ServedModel) -> None:
        if self._state.phase != "loading":  # told to stop meanwhile
            return
        self._ready = True
        self._state.serve(model)
        seconds = time.monotonic() - self._started
        self._metrics.startup_seconds.labels("total").set(seconds)
        key = ' -H "Authorization: Bearer $SCONE_API_KEY"' if self._state.config.api_keys else ""
        logger.info(
            "ready after %.1f s. Try:\n\n  curl %s/v1/completions -H 'Content-Type: application/json'%s "
            """-d '{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'\n""",
            seconds,
            self._url,
            key,
        )

    def _log_start(self) -> None:
        changed = {n: self._settings.values[n] for n, o in self._settings.origins.items() if o != "default"}
        secret = {setting.name for setting in SERVE_SETTINGS if setting.secret}
        shown = " ".join(f"{n}={'***' if n in secret else v}" for n, v in changed.items())
        logger.info("scone-serve %s with %s", version(), shown)
        logger.info("listening on %s; answers 503 until the model is loaded", self._url)
        if self._settings.host not in ("127.0.0.1", "localhost", "::1") and not self._state.config.api_keys:
            logger.warning("open to the network without a key: set SCONE_API_KEY or api_key_file to close it")

    @property
    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{port}"

    def _exit_now(self, code: int) -> None:
        """Ends the process without waiting for threads that cannot be told to stop."""
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)


COMMAND = Command(
    name="serve", help="Serve a model over HTTP, as OpenAI's API.", settings=SERVE_SETTINGS, run=run
)
