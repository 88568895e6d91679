"""The rows of one open table over the memories that hold them: each tier a range of rows, the fastest first.

Row ids are ranks, so the device holds rows [0, a), RAM what it has loaded of [0, b), the disk all. Which tier
a row is read from never shows in it. Knows row ids, not f-grams.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import Device
from scone.cache.device_rows import DeviceRows
from scone.cache.errors import CacheError
from scone.cache.queued_rows import RowQueue
from scone.cache.ram_rows import RamRows
from scone.cache.row_reader import RowReader
from scone.cache.stats import TableStats
from scone.model_store.table_files import TableFiles


@dataclass(frozen=True, slots=True)
class Tier:
    """A range of rows that are read in one way; `num_bytes` are those of the stored rows."""

    name: str
    reader: str
    begin: int
    end: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return self.end - self.begin


class RowTiers:
    """Thread-safe; takes over its readers, which `close` ends.

    Attributes:
        disk: reads every row.
        ram: holds the first rows, as far as it has loaded them; None: there is no such tier.
        on_device: the rows that the model reads in the accelerator's memory; None: none.
    """

    def __init__(self, files: TableFiles, disk: RowReader, ram: RamRows | None, stats: TableStats) -> None:
        self.disk = disk
        self.ram = ram
        self.on_device: DeviceRows | None = None
        self._files = files
        self._stats = stats
        self._num_rows = files.manifest.num_fgrams
        self._row_bytes = files.manifest.row_bytes
        self._only_disk = ((disk, 0, self._num_rows),)
        self._only_ram = () if ram is None else ((ram, 0, self._num_rows),)

    @property
    def now(self) -> tuple[Tier, ...]:
        """The tiers as they are now, the fastest first; none is empty."""
        num_on_device = self.num_on_device
        plan: list[tuple[DeviceRows | RamRows | RowReader, int, int]] = [
            (reader, max(begin, num_on_device), end) for reader, begin, end in self._plan()
        ]
        if self.on_device is not None:
            plan.insert(0, (self.on_device, 0, num_on_device))
        return tuple(
            Tier(reader.tier, reader.name, begin, end, (end - begin) * self._row_bytes)
            for reader, begin, end in plan
            if begin < end
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every tier that rows may have been read from: the disk too, until the RAM tier is full."""
        names = ("disk",) if self.ram is None else ("ram", "disk")
        return names if self.on_device is None else ("device", *names)

    def tier_of(self, row_ids: NDArray[np.int64]) -> NDArray[np.str_]:
        """The name of the tier of each row, "" where the id is -1."""
        tiers = self.now
        names = np.array(["", *(tier.name for tier in tiers)])
        begins = np.array([tier.begin for tier in tiers])
        return names[np.where(row_ids < 0, 0, np.searchsorted(begins, row_ids, side="right"))]

    @property
    def num_on_device(self) -> int:
        return 0 if self.on_device is None else self.on_device.num_rows

    @property
    def num_in_memory(self) -> int:
        """So many rows, the first ones, are in memory, here or on the device."""
        return max(self._num_in_ram, self.num_on_device)

    def load_device_rows(self, device: Device, device_bytes: int) -> None:
        """Fills the device tier with the first rows that fit; raises CacheError where there is no device."""
        num_rows = min(self._num_rows, device_bytes // self._row_bytes)
        if device_bytes and device.is_host:
            raise CacheError(
                f"device_bytes is {device_bytes}, but the model runs on the CPU, whose memory"
                " ram_bytes gives out: leave device_bytes at 0"
            )
        if num_rows:
            try:
                self.on_device = DeviceRows(device, self._files, num_rows)
            except OSError as error:
                raise CacheError(f"cannot read the rows of {self._files.path}: {error}") from None

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Waits until the RAM tier is in memory or its loading failed; returns whether it is full."""
        return self.ram is None or self.ram.wait_loaded(timeout)

    def read_into(self, row_ids: NDArray[np.int64], out: Tensor) -> None:
        """As `FGramTable.read_into`."""
        ram = self.ram
        while True:
            num_shrinks = 0 if ram is None else ram.num_shrinks
            for reader, begin, end in self._plan():
                started = time.perf_counter()
                num_rows = reader.read_into(row_ids, begin, end, out)
                if num_rows:
                    self.count_read(reader.tier, num_rows, time.perf_counter() - started)
            if ram is None or ram.num_shrinks == num_shrinks:
                return  # else rows may have been given up before they were read

    def count_read(self, tier: str, num_rows: int, seconds: float) -> None:
        """Notes that so many rows were read."""
        self._stats.add_read(tier, num_rows, num_rows * self._row_bytes, seconds)

    @property
    def all_in_memory(self) -> bool:
        """Whether every row is in memory, here or on the device."""
        ram = self.ram  # first, since a step asks this
        return (ram is not None and ram.num_loaded == self._num_rows) or self.num_on_device == self._num_rows

    def may_wait(self, row_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows (n,) may have to be waited for, since only a disk holds them."""
        if self.all_in_memory:
            return np.zeros(len(row_ids), np.bool_)
        return self.disk.may_wait(row_ids, self.num_in_memory, self._num_rows)

    def will_need(self, row_ids: NDArray[np.int64]) -> None:
        """Asks the disk for rows (n,) that are about to be read one after the other."""
        self.disk.will_need(row_ids, self._num_in_ram, self._num_rows)

    def open_queue(self) -> RowQueue | None:
        """For one thread: a few rows at a time without a thread between; None where there is no way."""
        return self.disk.open_queue(self._stats, self.ram)

    def close(self) -> None:
        """Ends the readers; no other call may be under way or follow."""
        if self.ram is not None:
            self.ram.close()
        self.disk.close()

    @property
    def _num_in_ram(self) -> int:
        return 0 if self.ram is None else self.ram.num_loaded

    def _plan(self) -> Sequence[tuple[RamRows | RowReader, int, int]]:
        """Who reads which rows: the RAM tier what it has loaded, the disk the rest."""
        if self.ram is None:
            return self._only_disk
        num_ram_rows = self.ram.num_loaded
        if num_ram_rows == self._num_rows:
            return self._only_ram
        return ((self.ram, 0, num_ram_rows), (self.disk, num_ram_rows, self._num_rows))
