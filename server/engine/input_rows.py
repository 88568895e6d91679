"""The f-gram rows of each sequence's inputs: matched at once, read ahead, gathered for a step.

A prompt is matched whole when its request is admitted, and its reads are issued chunk by chunk; the
tokens generated in one step are matched together. Only rows that may have to be waited for are read ahead;
those in memory are gathered when a step computes their inputs. Where all rows are in memory, generated tokens
are matched only then, too. Nothing is carried from one match to the next: a sequence that is preempted,
forked or started from cached blocks is read again from its ids.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import Device
from scone.cache.device_rows import DeviceRows
from scone.cache.errors import RowReadError
from scone.cache.fgram_table import FGramTable
from scone.cache.prefetcher import Prefetcher
from scone.kernels.row_target import IdTarget, RowTarget
from scone.server.engine.scheduler import Chunk

CHUNK_TOKENS = 256
"""Inputs per read of a prompt: large enough to sort and batch, small enough to start early."""


class PendingRows(Protocol):
    """Rows under way; see `cache.prefetcher.PendingRows` and `cache.queued_rows.QueuedRows`."""

    @property
    def row_ids(self) -> NDArray[np.int64]: ...
    def num_under_way(self) -> int: ...
    def ready(self, begin: int, end: int) -> bool: ...
    def wait(self, begin: int, end: int, timeout: float) -> bool: ...
    def error(self, begin: int, end: int) -> RowReadError | None: ...
    def copy_into(self, picks: NDArray[np.int64], out: Tensor) -> None: ...
    def gather_newest(
        self,
        ids: NDArray[np.int64],
        places: NDArray[np.int64],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> bool: ...
    def cancel(self, begin: int, end: int) -> None: ...


class RowSource(Protocol):
    """Reads rows in the background."""

    def submit(self, row_ids: NDArray[np.int64]) -> PendingRows | None: ...
    def submit_apart(self, row_ids: NDArray[np.int64]) -> PendingRows | None: ...


class Table(Protocol):
    """Finds longest f-grams, and their rows."""

    @property
    def max_n(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def device_rows(self) -> DeviceRows | None: ...
    @property
    def never_waits(self) -> bool: ...
    def count_device_rows(self, num_rows: int) -> None: ...
    def match(self, input_ids: NDArray[np.int32]) -> tuple[Any, Any]: ...
    def match_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        out: IdTarget,
    ) -> int: ...
    def look_up_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> int | None: ...
    def tier_of(self, row_ids: NDArray[np.int64]) -> Any: ...
    def read_into(self, row_ids: NDArray[np.int64], out: Tensor) -> None: ...


class _Read(NamedTuple):
    """Inputs [start, end) of one sequence: rows [first, last) of what is read."""

    start: int
    end: int
    pending: PendingRows
    first: int

    @property
    def last(self) -> int:
        return self.first + self.end - self.start

    def ready(self) -> bool:
        return self.pending.ready(self.first, self.last)

    def wait(self, seconds: float) -> None:
        self.pending.wait(self.first, self.last, seconds)

    def error(self) -> RowReadError | None:
        return self.pending.error(self.first, self.last)

    def cancel(self) -> None:
        self.pending.cancel(self.first, self.last)


@dataclass(eq=False, slots=True)
class SequenceRows:
    """Row ids of one sequence's inputs (-1: none) and the reads under way.

    Attributes:
        source: where the rows come from.
        row_ids: of its inputs, the newest one's perhaps not yet.
        prompt_row_ids: (num_prompt_tokens,) int64: the first of them, as an array: a prompt's are many.
        staged_from: the rows of all inputs from here on have been asked for; None: of no input.
        reads: those of them that may have to be waited for, in the order of their inputs.
    """

    source: InputRows
    row_ids: list[int]
    prompt_row_ids: NDArray[np.int64]
    staged_from: int | None = None
    reads: list[_Read] = field(default_factory=list)

    def ready_range(self) -> tuple[int, int]:
        """The inputs that can be used now, those yet to come included; empty ranges have equal ends."""
        if self.staged_from is None:
            return sys.maxsize, sys.maxsize
        for read in self.reads:
            if not read.ready():
                return self.staged_from, read.start
        return self.staged_from, sys.maxsize

    def wait(self, seconds: float) -> None:
        """Waits for the rows under way, at most so long."""
        deadline = time.monotonic() + seconds
        for read in self.reads:
            read.wait(max(0.0, deadline - time.monotonic()))

    def error(self, start: int, end: int) -> RowReadError | None:
        """Why the rows of some of inputs [start, end) could not be read ahead, if so."""
        for read in self.reads:
            if read.start < end and start < read.end and (error := read.error()) is not None:
                return error
        return None

    def fork(self) -> SequenceRows:
        """The same inputs, all of them computed."""
        return SequenceRows(
            self.source, self.row_ids.copy(), self.prompt_row_ids, staged_from=len(self.row_ids)
        )

    def drop_before(self, position: int) -> None:
        """Forgets what was read for inputs that are computed."""
        while self.reads and self.reads[0].end <= position:
            self.reads.pop(0)

    def cancel(self) -> None:
        """Gives up all reads."""
        for read in self.reads:
            read.cancel()
        self.reads.clear()
        self.staged_from = None

    def ids_of(self, start: int, end: int) -> NDArray[np.int64]:
        """Row ids (end - start,) of inputs [start, end), all of them matched."""
        if end <= len(self.prompt_row_ids):
            return self.prompt_row_ids[start:end]
        return np.array(self.row_ids[start:end], np.int64)

    def num_matched(self, num_inputs: int) -> int:
        """How many of the first inputs have a row; those that are there, if fewer were matched."""
        num_prompt = min(num_inputs, len(self.prompt_row_ids))
        in_prompt = int(np.count_nonzero(self.prompt_row_ids[:num_prompt] >= 0))
        return in_prompt + sum([row_id >= 0 for row_id in self.row_ids[num_prompt:num_inputs]])


Rows = Sequence[SequenceRows | None]
"""Of each chunk's sequence, the rows; None: rows of no table, or of another one."""


class _Newest(NamedTuple):
    """The rows of the newest tokens of sequences that go on decoding together: ids[k] of batch[places[k]]."""

    batch: Rows
    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    pending: PendingRows


class InputRows:
    """One generation of the table, as the engine uses it."""

    def __init__(
        self,
        table: Table,
        source: RowSource,
        table_id: str,
        close: Callable[[], None] = lambda: None,
        row_codec: str = "",
    ) -> None:
        """`table_id` names everything that determines the table's rows; `close` ends the source."""
        self.close = close
        self.table = table
        self.table_id = table_id
        self.row_codec = row_codec
        self._source = source
        self._newest: _Newest | None = None  # asked for, until a step decodes
        self._found = IdTarget(*np.empty((2, 0), np.int64))

    def match(self, input_ids: Sequence[int]) -> SequenceRows:
        """Matches a whole prompt; reads nothing yet."""
        row_ids, _ = self.table.match(np.asarray(input_ids, dtype=np.int32))
        return SequenceRows(self, row_ids.tolist(), row_ids)

    def stage(self, rows: SequenceRows, start: int) -> None:
        """Issues the reads of all inputs from `start` on, unless they are under way."""
        if rows.staged_from is not None and rows.staged_from <= start:
            return
        rows.cancel()
        rows.staged_from = start
        if self.table.never_waits:
            return
        row_ids = rows.ids_of(0, len(rows.row_ids))
        while start < len(row_ids):
            end = min(len(row_ids), (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
            pending = self._source.submit(row_ids[start:end])
            if pending is not None:
                rows.reads.append(_Read(start, end, pending, 0))
            start = end

    def extend(self, batch: Sequence[SequenceRows], token_ids: list[list[int]]) -> PendingRows | None:
        """Matches the newest token of each sequence and asks for all their rows at once.

        Returns:
            The rows that may have to be waited for, each by its own sequence only; None if there are none.
        """
        self._newest = None  # gives back what it holds
        num_wanted = self._match_newest([rows.row_ids for rows in batch], token_ids)
        ids, places = self._found.row_ids[:num_wanted].copy(), self._found.places[:num_wanted].copy()
        pending = self._source.submit_apart(ids)
        if pending is None:
            return None
        if self.table.device_rows is None:  # else a step has rows to lay that are not the host's
            self._newest = _Newest(batch, ids, places, pending)
        awaited = (pending.row_ids >= 0).nonzero()[0]
        for k, i in zip(awaited.tolist(), places[awaited].tolist(), strict=True):
            num_inputs = len(token_ids[i])
            batch[i].reads.append(_Read(num_inputs - 1, num_inputs, pending, k))
        return pending if len(awaited) else None

    def wanted(
        self, rows: Rows, chunks: Sequence[Chunk], num_inputs: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row ids of the inputs that have a row, and which of the chunks' `num_inputs` these are.

        Valid until the next call. Raises RowReadError: the index is damaged or cannot be read.
        """
        late = [
            (r.row_ids, c.seq.token_ids)
            for r, c in zip(rows, chunks, strict=True)
            if r is not None and len(r.row_ids) < c.start + c.num_tokens
        ]
        if late:
            row_ids, token_ids = map(list, zip(*late, strict=True))
            num_wanted = self._match_newest(row_ids, token_ids)
            if len(late) == num_inputs:  # all decode
                return self._found.row_ids[:num_wanted], self._found.places[:num_wanted]
        found = np.concatenate(
            [
                np.full(c.num_tokens, -1) if r is None else r.ids_of(c.start, c.start + c.num_tokens)
                for r, c in zip(rows, chunks, strict=True)
            ]
        )
        places = (found >= 0).nonzero()[0]
        return found[places], places

    def look_up_newest(
        self,
        batch: Rows,
        row_ids: list[list[int]],
        token_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> int | None:
        """`wanted` and `gather` in one for decoding sequences, each asking for the row of its newest token.

        Args:
            row_ids, token_ids: of each sequence of the batch; may append to the former.
            positions: its input.
            out: of at least as many rows as there are sequences.

        Returns:
            How many rows there are. None, and nothing was done, if it cannot be done at once: see the table's
            method and, where rows were asked for ahead, that of what is pending.

        Raises:
            RowReadError: the index is damaged or cannot be read; nothing was appended.
        """
        newest, self._newest = self._newest, None
        if newest is not None:
            is_done = newest.batch == batch and newest.pending.gather_newest(
                newest.ids, newest.places, row_ids, positions, out
            )
            return len(newest.ids) if is_done else None
        return self.table.look_up_newest(token_ids, row_ids, positions, out)

    def match_newest(
        self, row_ids: list[list[int]], token_ids: list[list[int]], positions: list[int], out: IdTarget
    ) -> int | None:
        """As `look_up_newest` without the rows; None, and nothing was done, if some was matched before."""
        if not self.table.never_waits or [len(ids) for ids in row_ids] != positions:
            return None
        return self.table.match_newest(token_ids, row_ids, out)

    def gather(
        self,
        rows: Rows,
        chunks: Sequence[Chunk],
        row_ids: NDArray[np.int64],
        places: NDArray[np.int64],
        out: Tensor,
    ) -> None:
        """Writes the row of input places[i] of the chunks, row_ids[i], to out[i].

        Raises:
            RowReadError: a row in memory turned out to be damaged or gone. Rows read ahead must be ready
                and without error.
        """
        if not self.table.never_waits:
            for pending, picks in _read_ahead(rows, chunks).items():
                picks = picks[places]
                is_there = (picks >= 0) & (pending.row_ids[picks] >= 0)
                pending.copy_into(np.where(is_there, picks, -1), out)
                row_ids = np.where(is_there, -1, row_ids)
        self.table.read_into(row_ids, out)

    def gather_error(self, rows: SequenceRows, chunk: Chunk) -> RowReadError | None:
        """Why `gather` fails for this sequence, if it does."""
        try:
            row_ids, places = self.wanted([rows], [chunk], chunk.num_tokens)
            out = torch.empty(len(places), self.table.dim)
            self.gather([rows], [chunk], row_ids, places, out)
        except RowReadError as error:
            return error
        return None

    def count_tiers(self, rows: SequenceRows, num_inputs: int) -> dict[str, int]:
        """How many of the first `num_inputs` rows lie in each tier of the table."""
        row_ids = rows.ids_of(0, min(num_inputs, len(rows.row_ids)))
        row_ids = row_ids[row_ids >= 0]
        return dict(sorted(Counter(self.table.tier_of(row_ids).tolist()).items()))

    def _match_newest(self, row_ids: list[list[int]], token_ids: list[list[int]]) -> int:
        """Of each sequence, the row id of the newest token; those that there are also to `_found`."""
        if len(self._found.row_ids) < len(row_ids):
            self._found = IdTarget(*np.empty((2, len(row_ids)), np.int64))
        return self.table.match_newest(token_ids, row_ids, self._found)


def _read_ahead(rows: Rows, chunks: Sequence[Chunk]) -> dict[PendingRows, NDArray[np.int64]]:
    """For each read, which of its rows belongs to each input of the chunks; -1: none."""
    picks: dict[PendingRows, NDArray[np.int64]] = {}
    num_inputs = sum([chunk.num_tokens for chunk in chunks])
    offset = 0
    for r, chunk in zip(rows, chunks, strict=True):
        for read in r.reads if r is not None else ():
            begin, end = max(chunk.start, read.start), min(chunk.start + chunk.num_tokens, read.end)
            if begin < end:
                if read.pending not in picks:
                    picks[read.pending] = np.full(num_inputs, -1, np.int64)
                first = read.first + begin - read.start
                at = offset + begin - chunk.start
                picks[read.pending][at : at + end - begin] = np.arange(first, first + end - begin)
        offset += chunk.num_tokens
    return picks


def read_ahead(table: FGramTable, device: Device) -> InputRows:
    """The rows of a table, read by its own prefetcher; the first on the device if there is a budget."""
    table.load_device_rows(device)
    prefetcher = Prefetcher(table)
    manifest = table.manifest
    return InputRows(table, prefetcher, manifest.table_id, prefetcher.close, manifest.codec)
