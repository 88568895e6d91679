"""The f-gram rows of each sequence's inputs: matched at once, read ahead, laid over the embeddings.

A prompt is matched whole when its request is admitted, and its reads are issued chunk by chunk; the
tokens generated in one step are matched and read together. Nothing is carried from one match to the
next: a sequence that is preempted, forked or started from cached blocks is read again from its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scone.cache.errors import RowReadError
from scone.cache.fgram_table import FGramTable
from scone.cache.prefetcher import Prefetcher

CHUNK_TOKENS = 256
"""Inputs per read of a prompt: large enough to sort and batch, small enough to start early."""


class PendingRows(Protocol):
    """Rows that were asked for."""

    def ready(self) -> bool: ...
    def copy_into(self, out: Tensor) -> None: ...
    def cancel(self) -> None: ...


class RowSource(Protocol):
    """Reads rows in the background."""

    def submit(self, row_ids: np.ndarray[Any, Any], reason: str = "demand") -> PendingRows: ...


class Matcher(Protocol):
    """Finds longest f-grams."""

    @property
    def max_n(self) -> int: ...
    @property
    def dim(self) -> int: ...
    def match(self, input_ids: np.ndarray[Any, Any]) -> tuple[Any, Any]: ...
    def match_last(self, windows: np.ndarray[Any, Any]) -> tuple[Any, Any]: ...
    def tier_of(self, row_ids: np.ndarray[Any, Any]) -> Any: ...


class _Read:
    """One submitted read and, once used, the rows it brought."""

    def __init__(self, source: RowSource, row_ids: np.ndarray[Any, Any], dim: int) -> None:
        self.source = source
        self.row_ids = row_ids
        self._dim = dim
        self._pending = source.submit(row_ids, reason="demand")
        self._rows: Tensor | None = None

    def ready(self) -> bool:
        return self._rows is not None or self._pending.ready()

    def rows(self) -> Tensor:
        """(n, dim) float32; rows without an id are unspecified. Raises RowReadError."""
        if self._rows is None:
            rows = torch.zeros(len(self.row_ids), self._dim)
            self._pending.copy_into(rows)
            self._rows = rows
        return self._rows

    def alone(self, begin: int, end: int) -> _Read:
        """The same read for some of its rows only."""
        return _Read(self.source, self.row_ids[begin:end], self._dim)

    def cancel(self) -> None:
        self._pending.cancel()


@dataclass(slots=True)
class _Span:
    """Inputs `[start, end)` of a sequence lie at `offset` of a read; no read where nothing matched."""

    start: int
    end: int
    read: _Read | None
    offset: int
    is_shared: bool


@dataclass(slots=True)
class SequenceRows:
    """Row ids of one sequence's inputs (-1: none) and the reads under way; `spans` are contiguous."""

    row_ids: list[int]
    spans: list[_Span] = field(default_factory=list)

    @property
    def staged_from(self) -> int:
        return self.spans[0].start if self.spans else len(self.row_ids)

    def ready_range(self) -> tuple[int, int]:
        """The inputs that can be used now; empty ranges have equal ends."""
        end = self.staged_from
        for span in self.spans:
            if span.read is not None and not span.read.ready():
                break
            end = span.end
        return self.staged_from, end

    def fork(self) -> SequenceRows:
        """The same inputs, with nothing read yet."""
        return SequenceRows(self.row_ids.copy())

    def drop_before(self, position: int) -> None:
        """Forgets the rows of inputs that are computed."""
        while self.spans and self.spans[0].end <= position:
            self.spans.pop(0)

    def cancel(self) -> None:
        """Gives up all reads, save those that other sequences share."""
        for span in self.spans:
            if span.read is not None and not span.is_shared:
                span.read.cancel()
        self.spans.clear()

    def num_matched(self, num_inputs: int) -> int:
        return sum(row_id >= 0 for row_id in self.row_ids[:num_inputs])


class InputRows:
    """One generation of the table, as the engine uses it."""

    def __init__(
        self, table: Matcher, source: RowSource, table_id: str, close: Callable[[], None] = lambda: None
    ) -> None:
        """`table_id` names everything that determines the table's rows; `close` ends the source."""
        self.close = close
        self.table = table
        self.table_id = table_id
        self._source = source

    def match(self, input_ids: Sequence[int]) -> SequenceRows:
        """Matches a whole prompt; reads nothing yet."""
        row_ids, _ = self.table.match(np.asarray(input_ids, dtype=np.int32))
        return SequenceRows(np.asarray(row_ids).tolist())

    def stage(self, rows: SequenceRows, start: int) -> None:
        """Issues the reads of all inputs from `start` on, unless they are under way."""
        if rows.spans and rows.staged_from <= start:
            return
        rows.cancel()
        total = len(rows.row_ids)
        while start < total:
            end = min(total, (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
            row_ids = np.array(rows.row_ids[start:end], dtype=np.int64)
            read = _Read(self._source, row_ids, self.table.dim) if (row_ids >= 0).any() else None
            rows.spans.append(_Span(start, end, read, 0, is_shared=False))
            start = end

    def extend(self, batch: Sequence[tuple[SequenceRows, Sequence[int]]]) -> None:
        """Matches the newest token of each sequence (rows, token ids) and reads all rows at once."""
        max_n = self.table.max_n
        windows = np.full((len(batch), max_n), -1, dtype=np.int32)
        for i, (_, token_ids) in enumerate(batch):
            window = token_ids[-max_n:]
            windows[i, max_n - len(window) :] = window
        row_ids = np.asarray(self.table.match_last(windows)[0])
        wanted = np.flatnonzero(row_ids >= 0)
        read = _Read(self._source, row_ids[wanted], self.table.dim) if len(wanted) else None
        offsets = dict(zip(wanted.tolist(), range(len(wanted)), strict=True))
        for i, (rows, token_ids) in enumerate(batch):
            rows.row_ids.append(int(row_ids[i]))
            start = len(token_ids) - 1
            rows.spans.append(
                _Span(start, start + 1, read if i in offsets else None, offsets.get(i, 0), is_shared=True)
            )

    def write(self, rows: SequenceRows, start: int, out: Tensor) -> None:
        """Lays the rows of inputs `[start, start + len(out))` over embeddings `out` (n, dim).

        Raises RowReadError for this sequence's rows only: where a read that sequences share failed,
        this one's part is read again by itself.
        """
        end = start + len(out)
        for span in rows.spans:
            begin, stop = max(start, span.start), min(end, span.end)
            if begin >= stop or span.read is None:
                continue
            first = span.offset + begin - span.start
            last = first + stop - begin
            try:
                read_rows = span.read.rows()[first:last]
            except RowReadError:
                if not span.is_shared:
                    raise
                read_rows = span.read.alone(first, last).rows()
            matched = torch.from_numpy(span.read.row_ids[first:last] >= 0)
            target = out[begin - start : stop - start]
            if matched.all():
                target.copy_(read_rows)
            else:
                target[matched] = read_rows[matched].to(target)

    def count_tiers(self, rows: SequenceRows, num_inputs: int) -> dict[str, int]:
        """How many of the first `num_inputs` rows lie in each tier of the table."""
        row_ids = np.array([r for r in rows.row_ids[:num_inputs] if r >= 0], dtype=np.int64)
        names, counts = np.unique(np.asarray(self.table.tier_of(row_ids)).astype(str), return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))


def read_ahead(table: FGramTable) -> InputRows:
    """The rows of a table, read by its own prefetcher."""
    prefetcher = Prefetcher(table)
    return InputRows(table, prefetcher, table.manifest.table_id, prefetcher.close)
