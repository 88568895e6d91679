"""Pages of a table's rows, read while their reader does something else, without a thread.

Reads are submitted in one system call (io_uring) and looked for later; each page is compared with its
checksum when it has arrived (native/read_queue.cpp). There is no queue where io_uring or the extension is
missing: who reads then waits, as in disk_read.py, whose results are the same bytes.
"""

from __future__ import annotations

import logging
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.kernels.disk_read import PAGE_BYTES, uring_available
from scone.kernels.extension import native

logger = logging.getLogger(__name__)

I64 = NDArray[np.int64]

SOUND = 0
SHORT_READ = -1
DAMAGED = -2
UNDER_WAY = -3
"""What a slot's status is; any other is the errno of its read."""


class ReadQueue:
    """For one thread. Use `open_read_queue`.

    Attributes:
        memory: (num_slots * slot_bytes,) uint8, page-aligned.
        status: (num_slots,) int32; changes with every call of `poll`, `wait` or `submit`.
    """

    def __init__(
        self,
        fd: int,
        num_slots: int,
        slot_bytes: int,
        page_sums: NDArray[np.uint32],
        *,
        begin: int,
        size: int,
    ) -> None:
        self.slot_bytes = slot_bytes
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, num_slots * slot_bytes), np.uint8)
        self.status = np.zeros(num_slots, np.int32)
        self._native: Any = native.ReadQueue(  # type: ignore[union-attr]
            fd, self.memory, slot_bytes, self.status, page_sums, begin, size
        )

    def submit(self, first_page: I64, num_pages: I64) -> I64 | None:
        """Begins to read num_pages[i] pages from first_page[i] on, for all i.

        Returns:
            (n,) the slots that they go to, held until `release`; None if not so many are free.
        """
        slots = np.empty(len(first_page), np.int64)
        return slots if self._native.submit(first_page, num_pages, slots) else None

    def poll(self) -> None:
        """Notes in `status` what has arrived; waits for nothing."""
        self._native.poll()

    def wait(self, slots: I64, seconds: float) -> bool:
        """Waits until none of `slots` is under way, at most so long; whether none is."""
        result: bool = self._native.wait(slots, seconds)
        return result

    def release(self, slots: I64) -> None:
        """Gives slots back, also those whose reads are under way: they are free once these have ended."""
        self._native.release(slots)

    def close(self) -> None:
        """Waits until no read is under way."""
        self._native.drain()

    @property
    def num_free(self) -> int:
        """Slots that are free, so far as has been noted."""
        result: int = self._native.num_free
        return result


def open_read_queue(
    fd: int, num_slots: int, pages_per_slot: int, page_sums: NDArray[np.uint32], *, begin: int, size: int
) -> ReadQueue | None:
    """A queue for the file `fd`, which must stay open; None where there can be none.

    Args:
        page_sums: CRC-32C of each PAGE_BYTES of the `size` bytes that begin at `begin` of the file.
    """
    if not uring_available():
        return None
    try:
        return ReadQueue(fd, num_slots, pages_per_slot * PAGE_BYTES, page_sums, begin=begin, size=size)
    except RuntimeError as error:  # no further ring (locked memory, descriptors), or an old kernel
        logger.info("no queue for reads from the disk (%s): threads read", error)
        return None
