"""What a stored state is worth: seconds of computing that its bytes save, by how often it was used of late.

Uses are counted with a weight that halves every hour. All weights fall alike, so the order of two states
changes only when one of them is used: instead of lowering every count all the time, a use counts the more
the later it comes (2^(time / half-life)), and sums are kept as logarithms to base 2, which do not overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HALF_LIFE_SECONDS = 3600.0
_CHAIN_BLOCKS = 1024
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Worth:
    """Of one state.

    Attributes:
        density: log2 of the seconds saved per use and byte.
        uses: log2 of the sum of 2^(time of use / half-life).
    """

    density: float
    uses: float

    @classmethod
    def new(cls, cost_seconds: float, num_bytes: int, depth: int, now: float) -> Worth:
        """Of a state used once, now.

        One deep in its chain is worth slightly less than one before it: it cannot be used without that one,
        so of two states with the same uses the deeper is to go first.
        """
        density = math.log2(max(cost_seconds, _LEAST_SECONDS) / max(num_bytes, 1))
        return cls(density - depth / _CHAIN_BLOCKS, now / HALF_LIFE_SECONDS)

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

    def used(self, now: float) -> Worth:
        """After one more use."""
        use = now / HALF_LIFE_SECONDS
        return Worth(self.density, max(self.uses, use) + math.log2(1 + 2 ** -abs(self.uses - use)))


def seconds_per_second(score: float, now: float) -> float:
    """Seconds saved per second and byte, from a score: the rate of uses follows from their decayed count."""
    exponent = min(score - now / HALF_LIFE_SECONDS, 1000.0)
    return float(2.0**exponent) * math.log(2) / HALF_LIFE_SECONDS
