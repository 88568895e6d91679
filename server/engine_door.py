"""What the HTTP side needs of the engine. A protocol, so that it imports without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from scone.server.sequence import Delta, GenerationRequest

if TYPE_CHECKING:
    from scone.cache.fgram_table import FGramTable

OnDelta = Callable[[Delta], None]


class EngineStats(Protocol):
    """The engine's state at one moment."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_cache_usage(self) -> float: ...
    @property
    def last_step_monotonic(self) -> float: ...
    @property
    def has_work(self) -> bool: ...


class EngineDoor(Protocol):
    """What the API needs of the engine; all of it may be called from any thread.

    `after_deliveries` sets what is called, on the engine's thread, after deltas were delivered: once for all
    those of a step.
    """

    def after_deliveries(self, call: Callable[[], None]) -> None: ...
    def submit_batch(self, batch: Sequence[tuple[GenerationRequest, OnDelta]]) -> None: ...
    def swap_table(self, table: FGramTable | None, on_retired: Callable[[], None]) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def is_queued(self, request_id: str) -> bool: ...
    def is_alive(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def shutdown(self, timeout_seconds: float) -> bool: ...
