"""Anonymous memory for what is looked at in random order: in huge pages, one translation serves 2 MiB."""

from __future__ import annotations

import logging
import mmap

_logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20


def map_memory(num_bytes: int, what: str) -> mmap.mmap:
    """At least `num_bytes` of zeros, in use as far as they are written; the end is in ordinary pages.

    Whole huge pages only: one that reached beyond the end would take memory that nobody has asked for.

    Args:
        what: for the log, should the kernel give no huge pages.
    """
    # A multiple of huge pages, or Linux would not begin at the border of one.
    mapped_bytes = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, mapped_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE, 0, num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    except OSError as error:
        _logger.info("no huge pages for %s (%s): using ordinary ones", what, error)
    return mapping
