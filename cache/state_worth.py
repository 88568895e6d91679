"""What a stored state is worth: seconds of computing that its bytes save, by how often it was used of late.

Uses are counted with a weight that halves with each unit of a clock. All weights fall alike, so the order of
two states changes only when one of them is used: instead of lowering every count all the time, a use counts
the more the later it comes (2^clock), and sums are kept as logarithms to base 2, which do not overflow.

The clock of memory is time. That of a file is its own turnover: one unit passes while as many bytes are
offered to it as it can hold, so that a store that is much written to forgets soon, and one that nobody writes
to forgets nothing. There a state used often counts as one used twice just now: what was popular goes a little
later than what was used once, and not after everything that is popular by then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HALF_LIFE_SECONDS = 3600.0
_MOST_USES = 2
_CHAIN_BLOCKS = 1024
_LEAST_SECONDS = 1e-9


def clock_of_memory(now: float) -> float:
    """At `now` seconds."""
    return now / HALF_LIFE_SECONDS


@dataclass(frozen=True, slots=True)
class Worth:
    """Of one state.

    Attributes:
        density: log2 of the seconds saved per use and byte.
        uses: log2 of the sum of 2^(clock at the use).
    """

    density: float
    uses: float

    @classmethod
    def new(cls, cost_seconds: float, num_bytes: int, depth: int, clock: float) -> Worth:
        """Of a state used once, now.

        One deep in its chain is worth slightly less than one before it: it cannot be used without that one,
        so of two states with the same uses the deeper is to go first.
        """
        density = math.log2(max(cost_seconds, _LEAST_SECONDS) / max(num_bytes, 1))
        return cls(density - depth / _CHAIN_BLOCKS, clock)

    @property
    def score(self) -> float:
        """Orders states by what they are worth, at any time."""
        return self.density + self.uses

    def capped(self, most_seconds: float | None, num_bytes: int) -> Worth:
        """The same, where a use saves at most so many seconds; None: no limit is known."""
        if most_seconds is None:
            return self
        most = math.log2(max(most_seconds, _LEAST_SECONDS) / max(num_bytes, 1))
        return Worth(min(self.density, most), self.uses)

    def used_once(self, clock: float) -> Worth:
        """The same state by another clock, or one whose former uses do not count."""
        return Worth(self.density, clock)

    def used(self, clock: float) -> Worth:
        """After one more use."""
        return Worth(self.density, max(self.uses, clock) + math.log2(1 + 2 ** -abs(self.uses - clock)))

    def limited(self, clock: float) -> Worth:
        """The same, counting no more than a few uses just now."""
        return Worth(self.density, min(self.uses, clock + math.log2(_MOST_USES)))


def seconds_per_second(score: float, now: float) -> float:
    """Seconds saved per second and byte, from a score by the clock of memory: the rate of uses follows from
    their decayed count.
    """
    exponent = min(score - clock_of_memory(now), 1000.0)
    return float(2.0**exponent) * math.log(2) / HALF_LIFE_SECONDS
