"""The rows of one table as a party to a memory budget: others may take the memory of the last of them."""

from __future__ import annotations

from scone.cache.memory_budget import MemoryBudget
from scone.cache.ram_rows import RamRows
from scone.cache.row_worth import RowWorth
from scone.cache.table_config import ROWS

_STEP_BYTES = 256 << 10
"""Given up at a time: not a system call for every small state that is stored."""


class RowShare:
    """Begins with all rows of the tier; they only become fewer."""

    def __init__(self, memory: MemoryBudget, ram: RamRows, worth: RowWorth) -> None:
        self._ram = ram
        self._worth = worth
        self._share = memory.join(ROWS, self._evict, self._least_value)
        if not self._share.reserve(ram.num_bytes, 0.0):  # somebody was faster
            ram.shrink_to(0)

    def leave(self) -> None:
        self._share.leave()

    def _least_value(self) -> float:
        return self._worth.least_value(self._ram.num_rows)

    def _evict(self, num_bytes: int, below: float) -> int:
        """In steps, as long as the last rows are worth less than `below`."""
        freed = 0
        while freed < num_bytes and self._ram.num_rows and self._least_value() < below:
            former = self._ram.num_bytes
            kept = max(0, (former - 1) // _STEP_BYTES * _STEP_BYTES)
            self._ram.shrink_to(self._ram.rows_in(kept))
            self._share.release(former - self._ram.num_bytes)
            freed += former - self._ram.num_bytes
        return freed
