"""A store whose reads come as from a slower disk: to measure what its bandwidth means."""

from __future__ import annotations

import threading
import time
from typing import Any

from numpy.typing import NDArray

from scone.cache.recycled_store import RecycledStore


class PacedStore(RecycledStore):
    """Reads of all threads share the bandwidth.

    Attributes:
        bytes_per_second: None: as fast as they come.
    """

    bytes_per_second: float | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pace_lock = threading.Lock()
        self._free_at = 0.0

    def read(self, *args: Any) -> NDArray[Any] | None:
        """As RecycledStore.read, later."""
        began = time.perf_counter()
        payload = super().read(*args)
        if payload is not None and self.bytes_per_second is not None:
            with self._pace_lock:
                self._free_at = max(self._free_at, began) + payload.nbytes / self.bytes_per_second
                ready_at = self._free_at
            time.sleep(max(0.0, ready_at - time.perf_counter()))
        return payload
