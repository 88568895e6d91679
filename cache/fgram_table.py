"""The one door to a table while serving: longest match, then rows.

Holds no state of any sequence: what matched at a position follows from the last `max_n` token ids alone.
Source: arXiv 2502.01637, section 3; the paper's row replaces the token embedding where something matched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import CpuDevice, Device
from scone.cache.device_rows import DeviceRows
from scone.cache.direct_reader import DirectReader
from scone.cache.errors import CacheError, RowReadError
from scone.cache.memory_budget import MemoryBudget, Share
from scone.cache.queued_rows import RowQueue
from scone.cache.ram_index import RamIndex
from scone.cache.ram_rows import RamRows
from scone.cache.row_reader import MappedReader, RowReader
from scone.cache.row_share import RowShare
from scone.cache.row_worth import RowWorth
from scone.cache.stats import TableStats
from scone.cache.table_config import INDEX, TableConfig
from scone.kernels.errors import DamagedDataError
from scone.kernels.gather import RowTarget
from scone.kernels.look_up import look_up_newest
from scone.kernels.match import BucketIndex, Matcher, Matches
from scone.model_store.errors import TableError
from scone.model_store.manifest import TableManifest
from scone.model_store.table_files import TableFiles, open_table_files

Ids = Sequence[int] | NDArray[Any] | Tensor
_TOKEN_DTYPES = frozenset((np.dtype(np.int32), np.dtype(np.int64)))


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


class FGramTable:
    """An open table. Thread-safe; arrays it returns are the caller's own.

    Example:
        with FGramTable.open("data/tables/demo") as table:
            row_ids, matched_len = table.match(input_ids)
            rows = table.rows(row_ids)
    """

    def __init__(
        self,
        files: TableFiles,
        disk: RowReader,
        ram: RamRows | None = None,
        stats: TableStats | None = None,
        device_bytes: int = 0,
    ) -> None:
        """Use `open`."""
        self.device_rows: DeviceRows | None = None
        self._device_bytes = device_bytes
        self.stats = stats or TableStats()
        self._matcher = Matcher(files.index, self.stats.num_matched)
        self._files = files
        self._disk = disk
        self._ram = ram
        self._ram_index: RamIndex | None = None
        self._shares: list[RowShare | Share] = []
        self._num_rows = files.manifest.num_fgrams
        self._row_bytes = files.manifest.row_bytes
        self._only_disk = ((disk, 0, self._num_rows),)
        self._only_ram = () if ram is None else ((ram, 0, self._num_rows),)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: TableConfig | None = None,
        stats: TableStats | None = None,
    ) -> Self:
        """Opens the table in directory `path`, reading no more than its headers.

        RAM tier and index are loaded in the background; the table serves meanwhile. `stats` are the counters
        of an earlier generation, if those are to go on.

        Raises:
            TableError: the table is missing, incomplete, truncated, or damaged where it was looked at.
        """
        config = config or TableConfig()
        files = open_table_files(path)
        manifest = files.manifest
        disk: RowReader
        if config.disk_reader == "direct" and manifest.backend == "mmap":
            disk = DirectReader(files, config.io_depth)
        else:
            disk = MappedReader(files, config.num_threads)
        index_bytes = files.index.buckets.nbytes
        plan = config.ram_plan(manifest.num_fgrams, manifest.row_bytes, index_bytes)
        ram = RamRows(files, plan.num_rows, config.num_threads) if plan.num_rows else None
        table = cls(files, disk, ram, stats, config.device_bytes)
        if plan.holds_index:
            table._load_index(config.memory, index_bytes)
        if ram is not None and config.memory is not None:
            table._shares.append(RowShare(config.memory, ram, RowWorth(manifest, table.stats)))
        return table

    def _load_index(self, memory: MemoryBudget | None, num_bytes: int) -> None:
        """Has the index copied into memory, if somebody else has not been faster to take it."""
        if memory is not None:
            share = memory.join(INDEX)
            self._shares.append(share)
            if not share.reserve(num_bytes, 0.0):
                return
        self._ram_index = RamIndex(self._files, self._match_in)

    def _match_in(self, index: BucketIndex) -> None:
        self._matcher = Matcher(index, self.stats.num_matched)

    @property
    def manifest(self) -> TableManifest:
        return self._files.manifest

    @property
    def num_fgrams(self) -> int:
        return self.manifest.num_fgrams

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def dtype(self) -> torch.dtype:
        """What row values are rounded to, whatever they are stored as."""
        return self.manifest.row_codec.torch_dtype

    @property
    def max_n(self) -> int:
        """The longest f-gram: so many of the last token ids decide a match."""
        return self.manifest.max_n

    @property
    def closed(self) -> bool:
        """Whether the prefix and the suffix of every f-gram are in the table too."""
        return self.manifest.closed

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """As they are now, the fastest first; none is empty."""
        num_device_rows = self.num_device_rows
        plan: list[tuple[DeviceRows | RamRows | RowReader, int, int]] = [
            (reader, max(begin, num_device_rows), end) for reader, begin, end in self._plan()
        ]
        if self.device_rows is not None:
            plan.insert(0, (self.device_rows, 0, num_device_rows))
        return tuple(
            Tier(reader.tier, reader.name, begin, end, (end - begin) * self._row_bytes)
            for reader, begin, end in plan
            if begin < end
        )

    @property
    def num_device_rows(self) -> int:
        return 0 if self.device_rows is None else self.device_rows.num_rows

    def count_device_rows(self, num_rows: int) -> None:
        """Notes that the device gathered so many of its rows."""
        self.stats.add_device_rows(num_rows, num_rows * self._row_bytes)

    def load_device_rows(self, device: Device) -> None:
        """Fills the device tier, if `device_bytes` asks for one; raises CacheError where there is no device.

        The model reads those rows there. `read_into` goes on reading all rows from memory or disk.
        """
        num_rows = min(self.num_fgrams, self._device_bytes // self._row_bytes)
        if self._device_bytes and isinstance(device, CpuDevice):
            raise CacheError(
                f"device_bytes is {self._device_bytes}, but the model runs on the CPU, whose memory"
                " ram_bytes gives out: leave device_bytes at 0"
            )
        if num_rows:
            try:
                self.device_rows = DeviceRows(device, self._files, num_rows)
            except OSError as error:
                raise CacheError(f"cannot read the rows of {self._files.path}: {error}") from None

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Every tier that rows may have been read from: the disk too, until the RAM tier is full."""
        names = ("disk",) if self._ram is None else ("ram", "disk")
        return names if self.device_rows is None else ("device", *names)

    @property
    def ram_loaded(self) -> bool:
        """Whether the RAM tier holds all the rows it was given room for."""
        return self._ram is None or self._ram.num_loaded == self._ram.num_rows

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Waits until index and RAM tier are in memory or their loading failed; returns `ram_loaded`."""
        if self._ram_index is not None:
            self._ram_index.wait_loaded(timeout)
        return self._ram is None or self._ram.wait_loaded(timeout)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the files mapped into memory, whether present or not."""
        files = self._files
        return (
            files.index.buckets.nbytes + files.rows.nbytes + files.page_sums.nbytes + files.index_sums.nbytes
        )

    def check_model(self, model_hash: str, tokenizer_hash: str) -> None:
        """Raises TableError unless the table was built from this model and for this tokenizer."""
        for what, ours, theirs in (
            ("model", self.manifest.model_hash, model_hash),
            ("tokenizer", self.manifest.tokenizer_hash, tokenizer_hash),
        ):
            if ours != theirs:
                raise TableError(
                    f"the table {self._files.path} was built for {what} {ours[:12]}, this {what} is"
                    f" {theirs[:12]}: give the {what} it was built for, or build a table for this one"
                )

    def match(self, input_ids: Ids) -> Matches:
        """The longest f-gram that ends at each position of one sequence.

        Args:
            input_ids: (n,) token ids.

        Returns:
            row_ids: (n,) int64, -1 where no f-gram ends.
            matched_len: (n,) int8, tokens of the f-gram; 1 where there is none.

        Raises:
            RowReadError: the index is damaged or cannot be read.
        """
        try:
            return self._matcher.match(_token_array(input_ids))
        except DamagedDataError as error:
            raise self._index_error(error) from None

    def match_last(self, windows: NDArray[Any] | Tensor) -> Matches:
        """The longest f-gram that ends at the last position of each window.

        Args:
            windows: (batch, width) token ids, newest last, padded with -1 on the left. A width of max_n is
                enough.

        Returns:
            row_ids (batch,) int64 and matched_len (batch,) int8, as `match`.

        Raises:
            RowReadError: the index is damaged or cannot be read.
        """
        try:
            return self._matcher.match_last(_token_array(windows))
        except DamagedDataError as error:
            raise self._index_error(error) from None

    def match_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        wanted: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> int:
        """As `match_last`, of whole sequences of token ids: appends each one's row id to its list of row ids.

        Args:
            wanted: (at least batch,) int64; the ids that are not -1, one after the other, are written here.
            places: (at least batch,) int64; whose they are.

        Returns:
            How many are not -1.

        Raises:
            RowReadError: the index is damaged or cannot be read; nothing was appended.
        """
        try:
            return self._matcher.match_newest(sequences, row_ids, wanted, places)
        except DamagedDataError as error:
            raise self._index_error(error) from None

    def look_up_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
        wanted: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> int | None:
        """`match_newest`, and the row of wanted[k] to out[k], in one native call where all rows are in RAM.

        Args:
            positions: of each sequence, the input that is asked for.
            out: of at least as many rows as there are sequences.

        Returns:
            How many rows there are. None, and nothing was done, if the RAM tier does not hold all rows, or
            some position is not that of the newest token, or was matched before.

        Raises:
            RowReadError: as `match_newest`.
        """
        ram = self._ram
        if ram is None or self.device_rows is not None:
            return None
        num_shrinks = ram.num_shrinks
        if ram.num_loaded != self._num_rows:
            return None
        started = time.perf_counter()
        try:
            num_wanted = look_up_newest(
                self._matcher, ram.memory, sequences, row_ids, positions, out, wanted, places
            )
        except DamagedDataError as error:
            raise self._index_error(error) from None
        if num_wanted:
            if ram.num_shrinks == num_shrinks:
                seconds = time.perf_counter() - started
                self.stats.add_read(ram.tier, num_wanted, num_wanted * self._row_bytes, seconds)
            else:  # rows may have been given up before they were copied
                self.read_into(wanted[:num_wanted], out.rows[:num_wanted])
        return num_wanted

    def rows(self, row_ids: Ids) -> Tensor:
        """(n, dim) rows in the table's dtype; those of id -1 are undefined. Raises as `read_into`."""
        ids = _row_id_array(row_ids)
        out = torch.empty(len(ids), self.dim, dtype=self.dtype)
        self.read_into(ids, out)
        return out

    def read_into(self, row_ids: Ids, out: Tensor) -> None:
        """Writes row row_ids[i] to out[i], cast (to nearest, ties to even); blocks until all are read.

        Args:
            row_ids: (n,) int64; where it is -1, `out` stays untouched.
            out: (n, dim) float32, bfloat16 or float16 on the CPU.

        Raises:
            IndexError: an id is beyond the table; nothing was written.
            RowReadError: a row cannot be read or is damaged; `out` is then undefined.
        """
        ids = _row_id_array(row_ids)
        ram = self._ram
        while True:
            num_shrinks = 0 if ram is None else ram.num_shrinks
            for reader, begin, end in self._plan():
                started = time.perf_counter()
                num_rows = reader.read_into(ids, begin, end, out)
                if num_rows:
                    seconds = time.perf_counter() - started
                    self.stats.add_read(reader.tier, num_rows, num_rows * self._row_bytes, seconds)
            if ram is None or ram.num_shrinks == num_shrinks:
                return  # else rows may have been given up before they were read

    @property
    def never_waits(self) -> bool:
        """Whether every row is in memory, here or on the device."""
        return self.num_memory_rows == self._num_rows

    @property
    def num_memory_rows(self) -> int:
        """So many rows, the first ones, are in memory, here or on the device."""
        return max(0 if self._ram is None else self._ram.num_loaded, self.num_device_rows)

    def may_wait(self, row_ids: Ids) -> NDArray[np.bool_]:
        """Which of these rows (n,) may have to be waited for, since only a disk holds them."""
        ids = _row_id_array(row_ids)
        if self.never_waits:
            return np.zeros(len(ids), np.bool_)
        return self._disk.may_wait(ids, self.num_memory_rows, self.num_fgrams)

    def will_need(self, row_ids: NDArray[np.int64]) -> None:
        """Asks the disk for rows (n,) that are about to be read one after the other."""
        self._disk.will_need(row_ids, self._ram.num_loaded if self._ram else 0, self._num_rows)

    def open_queue(self) -> RowQueue | None:
        """For one thread: a few rows at a time without a thread between; None where there is no way."""
        return self._disk.open_queue(self.stats, self._ram)

    def tier_of(self, row_ids: Ids) -> NDArray[np.str_]:
        """The name of the tier of each row, "" where the id is -1."""
        ids = _row_id_array(row_ids)
        tiers = self.tiers
        names = np.array(["", *(tier.name for tier in tiers)])
        begins = np.array([tier.begin for tier in tiers])
        return names[np.where(ids < 0, 0, np.searchsorted(begins, ids, side="right"))]

    def close(self) -> None:
        """Ends the readers; no other call may be under way or follow."""
        if self._ram_index is not None:
            self._ram_index.close()
        for share in self._shares:
            share.leave()
        if self._ram is not None:
            self._ram.close()
        self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self) -> Sequence[tuple[RamRows | RowReader, int, int]]:
        """Who reads which rows: the RAM tier what it has loaded, the disk the rest."""
        if self._ram is None:
            return self._only_disk
        num_ram_rows = self._ram.num_loaded
        if num_ram_rows == self._num_rows:
            return self._only_ram
        return ((self._ram, 0, num_ram_rows), (self._disk, num_ram_rows, self._num_rows))

    def _index_error(self, error: DamagedDataError) -> RowReadError:
        return RowReadError(f"{self._files.path}: {error}; check the table with `scone verify`")


def _token_array(token_ids: Ids) -> NDArray[Any]:
    if type(token_ids) is np.ndarray:  # the usual case first: the other questions take longer than this one
        array = token_ids
    else:
        array = token_ids.numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    return array if array.dtype in _TOKEN_DTYPES else array.astype(np.int64)


def _row_id_array(row_ids: Ids) -> NDArray[np.int64]:
    array = row_ids.numpy() if isinstance(row_ids, Tensor) else row_ids
    return np.ascontiguousarray(array, np.int64)
