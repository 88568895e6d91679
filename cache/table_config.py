"""How a table is read: the budget of each tier, and the way to the disk."""

from __future__ import annotations

from dataclasses import dataclass

from scone.cache.errors import CacheError
from scone.cache.memory_budget import MemoryBudget
from scone.cache.memory_limit import available_bytes
from scone.kernels.gather import CHECK_BYTES

DISK_READERS = ("auto", "mmap", "direct")

ROWS = "rows"
"""The name of the rows' share of a budget."""
_AUTO_SHARE = 0.4
"""The model, its KV cache and the kernel's page cache need the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """Settings of one open table; those of `scone serve` have the same names.

    Attributes:
        ram_bytes: what the most frequent rows may take in this process's memory; None ("auto"): 40 % of what
            the machine and the cgroup leave. 0: no row is kept, all are read from the file.
        device_bytes: what the rows before those may take in the accelerator's memory.
        disk_reader: `mmap`: through the kernel's page cache; `direct`: past it (O_DIRECT), each page checked
            each time it is read; `auto`: mmap. LMDB tables are always mapped.
        io_depth: reads under way at a time when reading directly.
        num_threads: threads that may share one large copy of rows.
        memory: a budget that rows share with other parties, who may take it from them; the rows begin with
            what is free of it. None: they have `ram_bytes` to themselves.
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

    def ram_rows(self, num_rows: int, row_bytes: int) -> int:
        """How many of the first rows the RAM tier holds."""
        if self.memory is not None:
            self.memory.take_back(ROWS, num_rows * row_bytes)  # of a table that this one is to replace
            budget = self.memory.free_bytes - CHECK_BYTES  # memory is given up in whole pages
        else:
            budget = auto_bytes() if self.ram_bytes is None else self.ram_bytes
        return max(0, min(num_rows, budget // row_bytes))


def auto_bytes() -> int:
    """The RAM budget where none was set."""
    return int(available_bytes() * _AUTO_SHARE)
