"""Rows of a table's file, read while their reader does something else, without a thread.

Reads are submitted in one system call (io_uring) and looked for later; each page is compared with its
checksum when it has arrived (native/read_queue.hpp). There is no queue where io_uring or the extension is
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
from scone.kernels.gather import RowMemory
from scone.kernels.row_codec import RowCodec
from scone.kernels.row_target import RowTarget

logger = logging.getLogger(__name__)

I64 = NDArray[np.int64]

SOUND = 0
SHORT_READ = -1
DAMAGED = -2
UNDER_WAY = -3
"""What a slot's status is; any other is the errno of its read."""

NO_SLOT = -1
"""In place of a slot: the row is not read here."""


class ReadQueue:
    """For one thread. Use `open_read_queue`.

    Attributes:
        memory: (num_slots * slot_bytes,) uint8, page-aligned.
        status: (num_slots,) int32; changes with every call but `release`.
    """

    def __init__(
        self,
        fd: int,
        num_slots: int,
        codec: RowCodec,
        page_sums: NDArray[np.uint32],
        *,
        begin: int,
        size: int,
    ) -> None:
        self._codec = codec
        slot_bytes = (
            (codec.row_bytes - 2) // PAGE_BYTES + 2
        ) * PAGE_BYTES  # as many pages as a row can touch
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, num_slots * slot_bytes), np.uint8)
        self.status = np.zeros(num_slots, np.int32)
        self._native: Any = native.ReadQueue(  # type: ignore[union-attr]
            fd,
            self.memory,
            slot_bytes,
            self.status,
            page_sums,
            begin,
            size,
            codec.codec_id,
            codec.dtype_id,
            codec.dim,
        )

    def submit(
        self, row_ids: I64, first_row: int, mapped: RowMemory | None, slots: I64, begins: I64
    ) -> tuple[int, int] | None:
        """Begins to read those rows (n,) that are not in memory, each once.

        Args:
            row_ids: those that are not read here become -1.
            first_row: rows before it are in memory.
            mapped: so are those that are wholly resident here.
            slots: (n,) is filled with the slots that rows go to, equal ones to the same, held until
                `release`; NO_SLOT where none is read.
            begins: (n,) is filled with where in `memory` each row will begin; -1 likewise.

        Returns:
            How many slots were taken, and for how many rows; None if not so many are free, and nothing was
            begun.
        """
        memory = None if mapped is None else mapped.native
        taken: tuple[int, int] = self._native.submit(row_ids, first_row, memory, slots, begins)
        return None if taken[0] < 0 else taken

    def num_under_way(self, slots: I64) -> int:
        """How many of these slots have not been read; waits for nothing."""
        result: int = self._native.num_under_way(slots)
        return result

    def wait(self, slots: I64, seconds: float) -> int:
        """Waits until none of `slots` is under way, at most so long; how many are."""
        result: int = self._native.wait(slots, seconds)
        return result

    def gather_newest(
        self,
        memory: RowMemory | None,
        num_loaded: int,
        mapped: RowMemory | None,
        row_ids: list[list[int]],
        positions: list[int],
        ids: I64,
        places: I64,
        slots: I64,
        begins: I64,
        out: RowTarget,
    ) -> tuple[int, int] | None:
        """Writes the rows of a decode step that were asked for with `submit` to `out`.

        Args:
            memory, num_loaded, mapped: where rows without a slot are: the first `num_loaded`, and the others.
            row_ids, positions: of each sequence of the step its row ids, and which input it computes.
            ids, places: (n,) the rows that there should be, and which sequence wants each.
            slots, begins: (n,) as `submit` filled them.
            out: of at least as many rows as there are sequences; takes `ids` and `places` too.

        Returns:
            How many rows came from `memory` and from `mapped`. None, and what was written has no meaning, if
            the sequences want other rows, or some row has not arrived, cannot be read or is not there.
        """
        result: tuple[int, int] | None = native.gather_newest(  # type: ignore[union-attr]
            self._native,
            None if memory is None else memory.native,
            num_loaded,
            None if mapped is None else mapped.native,
            row_ids,
            positions,
            ids,
            places,
            slots,
            begins,
            out.native,
        )
        return result

    def release(self, slots: I64) -> None:
        """Gives slots back, also those whose reads are under way: they are free once these have ended."""
        self._native.release(slots)

    def close(self) -> None:
        """Waits until no read is under way."""
        self._native.drain()

    @property
    def num_free(self) -> int:
        """Slots that are free."""
        self._native.poll()
        result: int = self._native.num_free
        return result


def open_read_queue(
    fd: int, num_slots: int, codec: RowCodec, page_sums: NDArray[np.uint32], *, begin: int, size: int
) -> ReadQueue | None:
    """A queue for the rows in file `fd`, which must stay open; None where there can be none.

    Args:
        page_sums: CRC-32C of each PAGE_BYTES of the `size` bytes that begin at `begin` of the file.
    """
    if not uring_available():
        return None
    try:
        return ReadQueue(fd, num_slots, codec, page_sums, begin=begin, size=size)
    except RuntimeError as error:  # no further ring (locked memory, descriptors), or an old kernel
        logger.info("no queue for reads from the disk (%s): threads read", error)
        return None
