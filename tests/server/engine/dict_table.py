"""A table in a dict: longest match by trying, and reads that end when a test lets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scone.cache.device_rows import DeviceRows
from scone.cache.errors import RowReadError
from scone.kernels.row_target import IdTarget, RowTarget


class DictTable:
    """Longest match by trying; rows in memory or `slow`, as on a disk.

    Attributes:
        broken: rows that cannot be read.
        slow: rows that are read ahead; None: all of them.
        held: rows whose read does not end; None: none of them may.
    """

    def __init__(self, rows: dict[tuple[int, ...], Tensor], dim: int, max_n: int = 5) -> None:
        self.dim, self.max_n = dim, max_n
        self.device_rows: DeviceRows | None = None
        self._ids = {fgram: row_id for row_id, fgram in enumerate(rows)}
        self._rows = torch.stack(list(rows.values())) if rows else torch.empty(0, dim)
        self.broken: set[int] = set()
        self.slow: set[int] | None = None
        self.held: set[int] | None = set()
        self.num_read = 0
        self.num_looked_up = 0
        self.num_gathered = 0
        self.num_cancelled = 0
        self.waits: list[float] = []

    @property
    def never_waits(self) -> bool:
        return self.slow is not None and not self.slow

    @property
    def is_held(self) -> bool:
        return self.held is None

    @is_held.setter
    def is_held(self, value: bool) -> None:
        self.held = None if value else set()

    def longest(self, window: Sequence[int]) -> int:
        for n in range(min(self.max_n, len(window)), 1, -1):
            row_id = self._ids.get(tuple(window[-n:]))
            if row_id is not None:
                return row_id
        return -1

    def match(self, input_ids: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        ids = input_ids.tolist()
        return np.array([self.longest(ids[: i + 1]) for i in range(len(ids))], dtype=np.int64), None

    def match_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        out: IdTarget,
    ) -> int:
        num_wanted = 0
        for i, (tokens, its_row_ids) in enumerate(zip(sequences, row_ids, strict=True)):
            its_row_ids.append(self.longest(tokens))
            if its_row_ids[-1] >= 0:
                out.row_ids[num_wanted], out.places[num_wanted] = its_row_ids[-1], i
                num_wanted += 1
        return num_wanted

    def look_up_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> int | None:
        ends = [(len(tokens) - 1, len(ids)) for tokens, ids in zip(sequences, row_ids, strict=True)]
        if not self.never_waits or self.broken or ends != [(p, p) for p in positions]:
            return None
        num_wanted = self.match_newest(sequences, row_ids, out)
        rows = torch.empty(num_wanted, self.dim)
        self.read_into(out.row_ids[:num_wanted], rows)
        out.put(rows)
        self.num_looked_up += num_wanted
        return num_wanted

    def tier_of(self, row_ids: np.ndarray[Any, Any]) -> Any:
        return np.where(row_ids % 2 == 0, "ram", "disk")

    def count_device_rows(self, num_rows: int) -> None:
        raise AssertionError("there are none")

    def fgrams(self) -> list[tuple[int, ...]]:
        return list(self._ids)

    def row(self, row_id: int) -> Tensor:
        return self._rows[row_id]

    def read_into(self, row_ids: np.ndarray[Any, Any], out: Tensor) -> None:
        for i, row_id in enumerate(row_ids.tolist()):
            if row_id in self.broken:
                raise RowReadError(f"row {row_id} cannot be read")
            if row_id >= 0:
                assert self.slow is not None, "a row that is read ahead was not waited for"
                assert row_id not in self.slow, "a row that is read ahead was not waited for"
                out[i] = self.row(row_id)
                self.num_read += 1

    def submit(self, row_ids: np.ndarray[Any, Any]) -> DictRead | None:
        read = self.submit_apart(row_ids)
        return read if read.num_under_way() or (read.row_ids >= 0).any() else None

    def submit_apart(self, row_ids: np.ndarray[Any, Any]) -> DictRead:
        is_slow = [self.slow is None or row_id in self.slow for row_id in row_ids.tolist()]
        return DictRead(self, np.where(is_slow, row_ids, -1))


class DictRead:
    def __init__(self, table: DictTable, row_ids: np.ndarray[Any, Any]) -> None:
        self.table, self.row_ids = table, row_ids

    def num_under_way(self) -> int:
        return sum(not self.ready(i, i + 1) for i in range(len(self.row_ids)) if self.row_ids[i] >= 0)

    def ready(self, begin: int, end: int) -> bool:
        held = self.table.held
        return held is not None and held.isdisjoint(self.row_ids[begin:end].tolist())

    def wait(self, begin: int, end: int, timeout: float) -> bool:
        self.table.waits.append(timeout)
        return self.ready(begin, end)

    def error(self, begin: int, end: int) -> RowReadError | None:
        broken = self.table.broken & set(self.row_ids[begin:end].tolist())
        return RowReadError(f"row {min(broken)} cannot be read") if broken else None

    def copy_into(self, picks: np.ndarray[Any, Any], out: Tensor) -> None:
        for i, pick in enumerate(picks.tolist()):
            if pick >= 0:
                assert self.ready(pick, pick + 1), "the engine would block on a read that is not ready"
                assert self.row_ids[pick] >= 0
                out[i] = self.table.row(self.row_ids[pick])
                self.table.num_read += 1

    def gather_newest(
        self,
        ids: np.ndarray[Any, Any],
        places: np.ndarray[Any, Any],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> bool:
        newest = [[i, its[-1]] for i, its in enumerate(row_ids) if its[-1] >= 0]
        if newest != np.stack((places, ids), 1).tolist() or positions != [len(its) - 1 for its in row_ids]:
            return False
        if self.num_under_way() or not self.table.broken.isdisjoint(ids.tolist()):
            return False
        rows = torch.empty(len(ids), self.table.dim)
        self.table.read_into(np.where(self.row_ids < 0, ids, -1), rows)
        self.copy_into(np.where(self.row_ids < 0, -1, np.arange(len(ids))), rows)
        out.row_ids[: len(ids)], out.places[: len(ids)] = ids, places
        out.put(rows)
        self.table.num_gathered += len(ids)
        return True

    def cancel(self, begin: int, end: int) -> None:
        self.table.num_cancelled += 1
