"""The one door to a table while serving: longest match, then rows.

Holds no state of any sequence: what matched at a position follows from the last `max_n` token ids alone.
Source: arXiv 2502.01637, section 3; the paper's row replaces the token embedding where something matched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import Device
from scone.cache.device_rows import DeviceRows
from scone.cache.direct_reader import DirectReader
from scone.cache.queued_rows import RowQueue
from scone.cache.ram_rows import RamRows
from scone.cache.row_reader import MappedReader, RowReader
from scone.cache.row_share import RowShare
from scone.cache.row_tiers import RowTiers, Tier
from scone.cache.row_worth import RowWorth
from scone.cache.stats import TableStats
from scone.cache.table_config import TableConfig
from scone.cache.table_index import TableIndex
from scone.kernels.errors import DamagedDataError
from scone.kernels.look_up import look_up_newest
from scone.kernels.match import Matches
from scone.kernels.row_target import IdTarget, RowTarget
from scone.model_store.errors import TableError
from scone.model_store.manifest import TableManifest
from scone.model_store.table_files import TableFiles, open_table_files

Ids = Sequence[int] | NDArray[Any] | Tensor
_TOKEN_DTYPES = frozenset((np.dtype(np.int32), np.dtype(np.int64)))


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
        self.stats = stats or TableStats()
        self._files = files
        self._num_rows, self._row_bytes = files.manifest.num_fgrams, files.manifest.row_bytes
        self._index = TableIndex(files, self.stats)
        self._row_tiers = RowTiers(files, disk, ram, self.stats)
        self._row_share: RowShare | None = None
        self._device_bytes = device_bytes

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
            table._index.load(config.memory)
        if ram is not None and config.memory is not None:
            table._row_share = RowShare(config.memory, ram, RowWorth(manifest, table.stats))
        return table

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
    def tiers(self) -> tuple[Tier, ...]:
        """As they are now, the fastest first; none is empty."""
        return self._row_tiers.now

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Every tier that rows may have been read from: the disk too, until the RAM tier is full."""
        return self._row_tiers.names

    def tier_of(self, row_ids: Ids) -> NDArray[np.str_]:
        """The name of the tier of each row, "" where the id is -1."""
        return self._row_tiers.tier_of(_row_id_array(row_ids))

    @property
    def device_rows(self) -> DeviceRows | None:
        """The device tier, if there is one: the model reads its rows there."""
        return self._row_tiers.on_device

    def load_device_rows(self, device: Device) -> None:
        """Fills the device tier, if `device_bytes` asks for one; raises CacheError where there is no device.

        `read_into` goes on reading all rows from memory or disk.
        """
        self._row_tiers.load_device_rows(device, self._device_bytes)

    def count_device_rows(self, num_rows: int) -> None:
        """Notes that the device gathered so many of its rows."""
        self.stats.add_device_rows(num_rows, num_rows * self.manifest.row_bytes)

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Waits until index and RAM tier are in memory or their loading failed.

        Returns:
            Whether the RAM tier holds all the rows it was given room for.
        """
        self._index.wait_loaded(timeout)
        return self._row_tiers.wait_loaded(timeout)

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
        return self._index.match(_token_array(input_ids))

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
        return self._index.match_last(_token_array(windows))

    def match_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        out: IdTarget,
    ) -> int:
        """As `match_last`, of whole sequences of token ids: appends each one's row id to its list of row ids.

        Args:
            out: takes the ids that are not -1, and whose they are.

        Returns:
            How many are not -1.

        Raises:
            RowReadError: the index is damaged or cannot be read; nothing was appended.
        """
        try:
            return self._index.matcher.match_newest(sequences, row_ids, out)
        except DamagedDataError as error:
            raise self._index.read_error(error) from None

    def look_up_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> int | None:
        """`match_newest`, and the rows to `out`, in one native call where all rows are in RAM.

        Args:
            positions: of each sequence, the input that is asked for.
            out: of at least as many rows as there are sequences; takes the rows, their ids and whose they
                are.

        Returns:
            How many rows there are. None, and nothing was done, if the RAM tier does not hold all rows, or
            some position is not that of the newest token, or was matched before.

        Raises:
            RowReadError: as `match_newest`.
        """
        ram = self._row_tiers.ram
        if ram is None or self._row_tiers.on_device is not None:
            return None
        num_shrinks = ram.num_shrinks
        if ram.num_loaded != self._num_rows:
            return None
        started = time.perf_counter()
        try:
            num_wanted = look_up_newest(self._index.matcher, ram.memory, sequences, row_ids, positions, out)
        except DamagedDataError as error:
            raise self._index.read_error(error) from None
        if num_wanted:
            if ram.num_shrinks == num_shrinks:
                num_bytes = num_wanted * self._row_bytes
                self.stats.add_read("ram", num_wanted, num_bytes, time.perf_counter() - started)
            else:  # rows may have been given up before they were copied
                rows = torch.empty(num_wanted, self.dim, dtype=out.rows.dtype)
                self.read_into(out.row_ids[:num_wanted], rows)
                out.put(rows)
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
        self._row_tiers.read_into(_row_id_array(row_ids), out)

    @property
    def never_waits(self) -> bool:
        """Whether every row is in memory, here or on the device."""
        return self._row_tiers.all_in_memory

    @property
    def num_memory_rows(self) -> int:
        """So many rows, the first ones, are in memory, here or on the device."""
        return self._row_tiers.num_in_memory

    def may_wait(self, row_ids: Ids) -> NDArray[np.bool_]:
        """Which of these rows (n,) may have to be waited for, since only a disk holds them."""
        return self._row_tiers.may_wait(_row_id_array(row_ids))

    def will_need(self, row_ids: NDArray[np.int64]) -> None:
        """Asks the disk for rows (n,) that are about to be read one after the other."""
        self._row_tiers.will_need(row_ids)

    def open_queue(self) -> RowQueue | None:
        """For one thread: a few rows at a time without a thread between; None where there is no way."""
        return self._row_tiers.open_queue()

    def close(self) -> None:
        """Ends the readers; no other call may be under way or follow."""
        self._index.close()
        if self._row_share is not None:
            self._row_share.leave()
        self._row_tiers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _token_array(token_ids: Ids) -> NDArray[Any]:
    if type(token_ids) is np.ndarray:  # the usual case first: the other questions take longer than this one
        array = token_ids
    else:
        array = token_ids.numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    return array if array.dtype in _TOKEN_DTYPES else array.astype(np.int64)


def _row_id_array(row_ids: Ids) -> NDArray[np.int64]:
    array = row_ids.numpy() if isinstance(row_ids, Tensor) else row_ids
    return np.ascontiguousarray(array, np.int64)
