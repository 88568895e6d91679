"""One number of bytes that several parties share: what one of them does not need, another may use.

A party reserves before it allocates and releases after it has freed. Where a reservation does not fit,
parties that can give something back are asked to, the one whose least valuable bytes are worth least first,
and only for bytes worth less than what is to take their place. So the budget is never exceeded, and memory
goes to whoever saves most time with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from scone.cache.errors import CacheError

Evict = Callable[[int, float], int]
"""(num_bytes, below) -> bytes given back: about `num_bytes`, none of them worth `below` or more."""


class MemoryBudget:
    """Thread-safe. `lock` is re-entrant and may be held by a party around changes of its own."""

    def __init__(self, total_bytes: int) -> None:
        if total_bytes < 0:
            raise CacheError(f"the memory budget is {total_bytes} bytes, wanted 0 or more")
        self.lock = threading.RLock()
        self.total_bytes = total_bytes
        self._shares: list[Share] = []

    @property
    def used_bytes(self) -> int:
        with self.lock:
            return sum(share.used_bytes for share in self._shares)

    @property
    def free_bytes(self) -> int:
        return max(0, self.total_bytes - self.used_bytes)

    def used_by_party(self) -> dict[str, int]:
        with self.lock:
            used: dict[str, int] = {}
            for share in self._shares:
                used[share.name] = used.get(share.name, 0) + share.used_bytes
            return used

    def join(
        self, name: str, evict: Evict | None = None, least_value: Callable[[], float] | None = None
    ) -> Share:
        """A share of the budget, empty so far.

        Args:
            evict: gives bytes back, calling `Share.release`; None for a party that cannot.
            least_value: seconds saved per second and byte by what `evict` would give back first.
        """
        share = Share(name, self, evict, least_value)
        with self.lock:
            self._shares.append(share)
        return share

    def resize(self, total_bytes: int) -> int:
        """Sets the total, evicting what no longer fits; returns the bytes that nobody could give back."""
        with self.lock:
            self.total_bytes = total_bytes
            self._evict(self.used_bytes - total_bytes, float("inf"))
            return max(0, self.used_bytes - total_bytes)

    def take_back(self, name: str, num_bytes: int) -> None:
        """Has the parties of this name give back what is missing for `num_bytes` to be free."""
        with self.lock:
            for share in self._shares:
                missing = num_bytes - self.free_bytes
                if share.name == name and share.evict is not None and missing > 0:
                    share.evict(missing, float("inf"))

    def _evict(self, num_bytes: int, below: float) -> None:
        """Frees up to `num_bytes`, from the party that loses least first; the lock is held."""
        asked = [share for share in self._shares if share.evict is not None]
        while num_bytes > 0 and asked:
            values = {share: share.least_value() if share.least_value else 0.0 for share in asked}
            share = min(asked, key=lambda share: values[share])
            if values[share] >= below:
                return
            # As far as the others' least valuable bytes are worth more.
            limit = min((value for other, value in values.items() if other is not share), default=below)
            assert share.evict is not None
            before = self.used_bytes
            share.evict(num_bytes, max(min(limit, below), values[share] * (1 + 1e-6)))
            freed = before - self.used_bytes
            num_bytes -= freed
            if freed <= 0:
                asked.remove(share)


@dataclass(eq=False, slots=True)
class Share:
    """What one party uses of a budget."""

    name: str
    budget: MemoryBudget
    evict: Evict | None
    least_value: Callable[[], float] | None
    used_bytes: int = 0

    def reserve(self, num_bytes: int, value: float = float("inf")) -> bool:
        """Takes `num_bytes`, at the expense of anything worth less than `value` if need be.

        False: it does not fit, and nothing was taken; something may have been evicted.
        """
        budget = self.budget
        with budget.lock:
            if num_bytes > budget.total_bytes:
                return False
            budget._evict(budget.used_bytes + num_bytes - budget.total_bytes, value)
            if budget.used_bytes + num_bytes > budget.total_bytes:
                return False
            self.used_bytes += num_bytes
            return True

    def may_reserve(self, num_bytes: int, value: float) -> bool:
        """Whether `reserve` has a chance; evicts nothing."""
        budget = self.budget
        with budget.lock:
            if num_bytes <= budget.free_bytes:
                return True
            least = (share.least_value() for share in budget._shares if share.evict and share.least_value)
            return num_bytes <= budget.total_bytes and min(least, default=value) < value

    def release(self, num_bytes: int) -> None:
        """Gives back what was reserved and is no longer allocated."""
        with self.budget.lock:
            assert num_bytes <= self.used_bytes, (
                f"{self.name} releases {num_bytes} of {self.used_bytes} bytes"
            )
            self.used_bytes -= num_bytes

    def leave(self) -> None:
        """Gives everything back; the share is not used again."""
        with self.budget.lock:
            self.used_bytes = 0
            self.budget._shares.remove(self)
