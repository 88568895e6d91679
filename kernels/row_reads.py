"""Which pages of a file of rows are read for some rows, and where in what was read these then lie.

Rows lie end to end, so one may reach over two pages, and a page may hold several. Rows become pages, pages
spans: without repetition, in file order, neighbours merged. `plan_row_reads` runs natively
(native/row_reads.cpp), since NumPy's dozen steps took a fifteenth of a cold prompt's time, or on its oracle.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scone.kernels.disk_read import I64, PAGE_BYTES, Spans
from scone.kernels.extension import native

_MAX_SPAN_PAGES = 32
"""Longer runs of neighbours are cut, so that one of them does not hold up the rest of the queue."""


class RowReads(NamedTuple):
    """What is to be read, into a buffer that takes the pages back to back.

    Attributes:
        pages: (num_pages,) of the row stream, rising, none twice.
        spans: byte ranges of the stream that these pages come to, and their places in the buffer.
        row_offsets: (num_rows,) where each row begins in the buffer, rising.
        targets: (num_rows,) which of the row ids asked for it is the row of.
    """

    pages: I64
    spans: Spans
    row_offsets: I64
    targets: I64


def plan_row_reads(row_ids: NDArray[np.int64], begin: int, end: int, row_bytes: int) -> RowReads:
    """The reads for those of `row_ids` (n,) that lie in [begin, end)."""
    if native is None:
        return plan_row_reads_numpy(row_ids, begin, end, row_bytes)
    most_pages = len(row_ids) * _most_pages_of_a_row(row_bytes)
    pages, offsets, sizes, places = np.empty((4, most_pages), np.int64)
    row_offsets, targets = np.empty((2, len(row_ids)), np.int64)
    num_pages, num_spans, num_rows = native.plan_row_reads(
        row_ids,
        begin,
        end,
        row_bytes,
        PAGE_BYTES,
        _MAX_SPAN_PAGES,
        pages,
        offsets,
        sizes,
        places,
        row_offsets,
        targets,
    )
    spans = Spans(offsets[:num_spans], sizes[:num_spans], places[:num_spans])
    return RowReads(pages[:num_pages], spans, row_offsets[:num_rows], targets[:num_rows])


def plan_row_reads_numpy(row_ids: NDArray[np.int64], begin: int, end: int, row_bytes: int) -> RowReads:
    """The oracle of `plan_row_reads`."""
    wanted = np.flatnonzero((row_ids >= begin) & (row_ids < end))
    targets = wanted[np.argsort(row_ids[wanted], kind="stable")]
    first_byte = row_ids[targets] * row_bytes
    first, last = first_byte // PAGE_BYTES, (first_byte + row_bytes - 1) // PAGE_BYTES
    widest = _most_pages_of_a_row(row_bytes)
    pages = np.unique(np.concatenate([np.minimum(first + i, last) for i in range(widest)]))
    row_offsets = np.searchsorted(pages, first) * PAGE_BYTES + first_byte % PAGE_BYTES
    starts = _span_starts(pages)
    sizes = np.diff(np.append(starts, len(pages))) * PAGE_BYTES
    spans = Spans(pages[starts] * PAGE_BYTES, sizes, starts * PAGE_BYTES)
    return RowReads(pages, spans, row_offsets, targets)


def _most_pages_of_a_row(row_bytes: int) -> int:
    if row_bytes % PAGE_BYTES == 0:
        return row_bytes // PAGE_BYTES
    return (row_bytes + PAGE_BYTES - 2) // PAGE_BYTES + 1


def _span_starts(pages: I64) -> I64:
    """Where in `pages` each run of neighbours begins, long runs cut."""
    run_starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    within = np.arange(len(pages)) - np.repeat(run_starts, np.diff(np.append(run_starts, len(pages))))
    return np.flatnonzero(within % _MAX_SPAN_PAGES == 0)
