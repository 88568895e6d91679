"""INTERIM."""

from __future__ import annotations

from collections.abc import Sequence


class RecycleCost:
    """INTERIM."""

    def __init__(self) -> None:
        self._seconds_per_token = 0.001

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        self._seconds_per_token += 0.1 * (seconds / num_tokens - self._seconds_per_token)

    def compute_seconds(self, num_tokens: int) -> float:
        return num_tokens * self._seconds_per_token

    def pays(self, kind: str, num_tokens: int, num_bytes: int, tiers: Sequence[str]) -> bool:
        return True
