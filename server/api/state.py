"""What the routes share: which phase the server is in, the served model, the requests in flight.

Phases:

    loading -> ready -> leaving -> draining
          \\-> failed

`leaving` still takes work while /ready already says no, so that a balancer can look away first;
`draining` refuses new generations and ends those in flight. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scone.server.api.doorbell import Doorbell
from scone.server.api.errors import ApiError
from scone.server.engine_door import EngineDoor
from scone.server.errors import UnavailableError
from scone.server.metrics import ServerMetrics

if TYPE_CHECKING:
    from scone.model_store.tokenizer import Tokenizer
    from scone.server.api.config import ApiConfig
    from scone.server.api.generation import Generation
    from scone.server.served_recycled import ServedRecycled
    from scone.server.served_table import ServedTable

logger = logging.getLogger(__name__)

MAX_WARNED_NAMES = 1000
Phase = Literal["loading", "ready", "leaving", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that answers; `dim` is the size of its hidden states."""

    name: str
    engine: EngineDoor
    tokenizer: Tokenizer
    table: ServedTable | None
    max_model_len: int
    dim: int
    num_layers: int
    recycled: ServedRecycled | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class ServerState:
    """One per process; made before the model is loaded."""

    def __init__(self, config: ApiConfig, metrics: ServerMetrics) -> None:
        self.config = config
        self.metrics = metrics
        self.phase: Phase = "loading"
        self.in_flight: set[Generation] = set()
        self.doorbell = Doorbell()
        self.reloading = asyncio.Lock()
        self._model: ServedModel | None = None
        self._warned: set[str] = set()

    def serve(self, model: ServedModel) -> None:
        """The model is loaded: answers begin."""
        model.engine.after_deliveries(self.doorbell.ring)
        self._model = model
        self.phase = "ready"

    @property
    def model(self) -> ServedModel:
        """The served model; raises UnavailableError while it loads."""
        if self._model is None:
            raise UnavailableError("The model is being loaded.", code="model_loading", retry_after_seconds=2)
        return self._model

    def model_named(self, name: str | None) -> ServedModel:
        """The served model; raises ApiError (404) if `name` is another one's."""
        model = self.model
        if name is not None and name != model.name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; this server has {model.name!r}.",
                param="model",
                code="model_not_found",
            )
        return model

    def check_admission(self) -> None:
        """Raises UnavailableError once the server drains."""
        if self.phase == "draining":
            raise UnavailableError(
                "The server is shutting down.", code="shutting_down", retry_after_seconds=5
            )

    def warn_unknown(self, names: Iterable[str]) -> None:
        """Counts fields of a request that this server does not know, and warns of each name once."""
        for name in names:
            self.metrics.unknown_parameters.inc()
            # Bounded: names come from clients.
            if name not in self._warned and len(self._warned) < MAX_WARNED_NAMES:
                self._warned.add(name)
                logger.warning("requests hold the unknown field %r; it is ignored", name[:100])

    def failure(self) -> str | None:
        """Why the server cannot go on, or None: what /health answers with."""
        if self.phase == "failed":
            return "The model could not be loaded; the server's log says why."
        if self._model is None:
            return None
        if not self._model.engine.is_alive():
            return "The engine has stopped; the server's log says why."
        stats = self._model.engine.stats()
        stalled_seconds = time.monotonic() - stats.last_step_monotonic
        if stats.has_work and stalled_seconds > self.config.stall_timeout:
            return f"The engine has work and made no step for {stalled_seconds:.0f} s."
        return None

    def interrupt_if_engine_died(self) -> None:
        """Ends the requests in flight with an error if there is no engine any more that would."""
        if self.in_flight and self._model is not None and not self._model.engine.is_alive():
            for generation in self.in_flight:
                generation.interrupt(ApiError(500, "The engine has stopped.", code="engine_dead"))
