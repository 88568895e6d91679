"""Whether fetching a state is cheaper than computing it again, from what both took so far.

Every figure is measured while serving: what a tier's reads take (a latency and a bandwidth, from how
durations follow sizes), and what a prompt token takes to compute. As long as one of them is unknown, fetching
is tried: it is the only way to know, and costs one slow request at worst. Plain arithmetic, no clock of its
own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scone.cache.recycled_stats import StateTier

WEIGHT = 0.1
"""Of the newest measurement; those before it keep the rest."""
RETRY_AFTER = 64
"""Refusals after which a refused tier is tried once, to see whether it has become faster."""
MIN_SAMPLES = 3
_UNMEASURED_SECONDS = 1e-3
"""Of a token, until one is measured; nothing is refused by it."""


@dataclass(slots=True)
class ReadSpeed:
    """Seconds of a read as latency + bytes / bandwidth: weighted least squares over the reads so far."""

    num_samples: int = 0
    mean_bytes: float = 0.0
    mean_seconds: float = 0.0
    variance_bytes: float = 0.0
    covariance: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """A read of `num_bytes` that took `seconds`."""
        self.num_samples += 1
        weight = max(WEIGHT, 1 / self.num_samples)  # a plain mean until there are enough
        off_bytes, off_seconds = num_bytes - self.mean_bytes, seconds - self.mean_seconds
        self.mean_bytes += weight * off_bytes
        self.mean_seconds += weight * off_seconds
        self.variance_bytes = (1 - weight) * (self.variance_bytes + weight * off_bytes**2)
        self.covariance = (1 - weight) * (self.covariance + weight * off_bytes * off_seconds)

    @property
    def seconds_per_byte(self) -> float:
        """The slope; where sizes do not differ enough to tell, all of the time is put down to bytes."""
        if not self.mean_bytes:
            return 0.0
        whole = self.mean_seconds / self.mean_bytes
        if self.variance_bytes < (0.01 * self.mean_bytes) ** 2:
            return whole
        return min(whole, max(0.0, self.covariance / self.variance_bytes))

    @property
    def latency_seconds(self) -> float:
        return max(0.0, self.mean_seconds - self.seconds_per_byte * self.mean_bytes)

    @property
    def bytes_per_second(self) -> float | None:
        """None: not measured yet."""
        return 1 / self.seconds_per_byte if self.seconds_per_byte > 0 else None

    def seconds(self, num_bytes: int) -> float | None:
        """What a read will take; None: too few were measured."""
        if self.num_samples < MIN_SAMPLES:
            return None
        return self.latency_seconds + num_bytes * self.seconds_per_byte


class HeldState(NamedTuple):
    """A state that may be fetched.

    Attributes:
        work_seconds: what is to be done with it once it is read.
    """

    tier: StateTier
    num_bytes: int
    work_seconds: float = 0.0


class RecycleCost:
    """Thread-safe.

    Args:
        read_speeds: of each tier, as the store measures them (RecycledStore.read_speeds).
    """

    def __init__(self, read_speeds: Mapping[StateTier, ReadSpeed]) -> None:
        self._lock = threading.Lock()
        self._read_speeds = read_speeds
        self._seconds_per_token: float | None = None
        self._num_samples = 0
        self._num_refused = 0

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A step computed `num_tokens` of prompts, and little else."""
        with self._lock:
            self._num_samples += 1
            weight = max(WEIGHT, 1 / self._num_samples)
            newest = seconds / num_tokens
            former = newest if self._seconds_per_token is None else self._seconds_per_token
            self._seconds_per_token = former + weight * (newest - former)

    def compute_seconds(self, num_tokens: int) -> float:
        """What computing so many tokens of a prompt takes: how much a state is worth, how long to wait."""
        per_token = self._seconds_per_token
        return num_tokens * (_UNMEASURED_SECONDS if per_token is None else per_token)

    def break_even_bytes_per_second(self, bytes_per_token: float, work_seconds: float = 0.0) -> float | None:
        """The bandwidth above which fetching is faster than computing; None: none is, or it is not measured.

        `work_seconds`: what is to be done for each token once it is read.
        """
        saved = (self._seconds_per_token or 0.0) - work_seconds
        return bytes_per_token / saved if saved > 0 else None

    def num_to_fetch(self, held: Sequence[HeldState], state_tokens: int) -> int:
        """How many states of a chain, from the first on, are to be fetched.

        Args:
            held: the states that are held.
            state_tokens: of each.

        Returns:
            The number that saves most time by what was measured; all of them while too little was, and once
            in RETRY_AFTER refusals, so that a figure that has become wrong does not stay for ever.
        """
        with self._lock:
            if self._seconds_per_token is None:
                return len(held)
            best, best_saved, saved = 0, 0.0, 0.0
            for number, state in enumerate(held, 1):
                saved += state_tokens * self._seconds_per_token - state.work_seconds
                saved -= self._read_speeds[state.tier].seconds(state.num_bytes) or 0.0
                if saved > best_saved:
                    best, best_saved = number, saved
            if best < len(held):
                self._num_refused += 1
                if self._num_refused % RETRY_AFTER == 0:
                    return len(held)
            return best
