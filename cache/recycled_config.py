"""How recycled states are kept: the budgets, and how much may wait to be written."""

from __future__ import annotations

from dataclasses import dataclass

from scone.cache.errors import CacheError

LEAST_DISK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RecycledConfig:
    """Settings of one open store; those of `scone serve` have the same names.

    Attributes:
        disk_bytes: what all files of the store may take together; for every process that shares it, the
            value given last counts.
        queue_length: writes that may wait; more are dropped.
        queue_bytes: payload bytes that may wait with them.
    """

    disk_bytes: int = 8 << 30
    queue_length: int = 1024
    queue_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.disk_bytes < LEAST_DISK_BYTES:
            raise CacheError(f"disk_bytes is {self.disk_bytes}, wanted at least {LEAST_DISK_BYTES}")
        for name in ("queue_length", "queue_bytes"):
            if getattr(self, name) < 1:
                raise CacheError(f"{name} is {getattr(self, name)}, wanted at least 1")
