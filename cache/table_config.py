"""How a table is read: the budget of each tier, and the way to the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scone.cache.errors import CacheError
from scone.cache.memory_budget import MemoryBudget
from scone.cache.memory_limit import available_bytes
from scone.kernels.gather import CHECK_BYTES

DISK_READERS = ("auto", "mmap", "direct")

ROWS, INDEX = "rows", "index"
"""The names of a table's shares of a budget."""
_AUTO_SHARE = 0.4
"""The model, its KV cache and the kernel's page cache need the rest."""


INDEX_SHARE = 8
"""The index is held in memory if it takes at most one eighth of the budget, or all rows fit beside it."""


class RamPlan(NamedTuple):
    """What of a table is held in this process's memory."""

    holds_index: bool
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """Settings of one open table; those of `scone serve` have the same names.

    Attributes:
        ram_bytes: what the index and the most frequent rows may take in this process's memory; None ("auto"):
            40 % of what the machine and the cgroup leave. 0: nothing is kept, all is read from the files.
        device_bytes: what the rows before those may take in the accelerator's memory.
        disk_reader: `mmap`: through the kernel's page cache; `direct`: past it (O_DIRECT), each page checked
            each time it is read; `auto`: mmap. LMDB tables are always mapped.
        io_depth: reads under way at a time when reading directly.
        num_threads: threads that may share one large copy of rows.
        memory: a budget that index and rows share with other parties, who may take it from the rows; the
            table begins with what is free of it. None: it has `ram_bytes` to itself.
    """

    ram_bytes: int | None = 0
    device_bytes: int = 0
    disk_reader: str = "auto"
    io_depth: int = 128
    num_threads: int = 1
    memory: MemoryBudget | None = None

    def __post_init__(self) -> None:
        if self.ram_bytes is not None and self.ram_bytes < 0:
            raise CacheError(f"ram_bytes is {self.ram_bytes}, wanted 0 or more, or auto")
        if self.device_bytes < 0:
            raise CacheError(f"device_bytes is {self.device_bytes}, wanted 0 or more")
        if self.disk_reader not in DISK_READERS:
            raise CacheError(f"disk_reader is {self.disk_reader!r}, wanted one of {', '.join(DISK_READERS)}")
        if not 1 <= self.io_depth <= 1024:
            raise CacheError(f"io_depth is {self.io_depth}, wanted 1 to 1024")
        if self.num_threads < 1:
            raise CacheError(f"num_threads is {self.num_threads}, wanted at least 1")

    def ram_plan(self, num_rows: int, row_bytes: int, index_bytes: int) -> RamPlan:
        """What the budget is spent on: the index, where it leaves the rows enough, then the first rows.

        Where `memory` is shared, what an earlier table of this name holds is taken back first.
        """
        if self.memory is not None:
            self.memory.take_back(ROWS, num_rows * row_bytes + index_bytes)
            budget = self.memory.free_bytes - CHECK_BYTES  # memory is given up in whole pages
        else:
            budget = auto_bytes() if self.ram_bytes is None else self.ram_bytes
        # Each match reads the index, and only some read one of the last rows that fit.
        fits = index_bytes * INDEX_SHARE <= budget or num_rows * row_bytes + index_bytes <= budget
        left = budget - index_bytes if fits else budget
        return RamPlan(fits, max(0, min(num_rows, left // row_bytes)))


def auto_bytes() -> int:
    """The RAM budget where none was set."""
    return int(available_bytes() * _AUTO_SHARE)
