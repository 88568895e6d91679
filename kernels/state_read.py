"""One stored state, read from where its parts lie in a file straight to where it is wanted.

Native, one call a state (native/state_read.cpp); without the extension the same bytes come by the same system
call from Python. Knows byte ranges and memory, not what a state is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from scone.kernels.checksum import crc32c_pages
from scone.kernels.extension import native

I64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def read_state(
    fd: int, offsets: I64, sizes: I64, gap: int, tail: Bytes, ids: Bytes, payload: Bytes, page_bytes: int
) -> NDArray[np.uint32]:
    """Fills `ids`, then the rows of `payload`, from parts of the file and, at last, from `tail`.

    Args:
        offsets, sizes: (n,) sizes[i] bytes at offsets[i], one part after the other.
        gap: parts that lie so many bytes apart are read together.
        payload: (rows, row_bytes), each row contiguous, rows anywhere.

    Returns:
        The CRC-32C of each `page_bytes` of the payload.

    Raises:
        OSError: a read failed, or the file ended early (EIO); what was to be filled is then undefined.
    """
    if native is None:
        return read_state_reference(fd, offsets, sizes, gap, tail, ids, payload, page_bytes)
    sums = np.empty(-(-payload.size // page_bytes), np.uint32)
    fault = native.read_state(fd, offsets, sizes, gap, tail, ids, payload, page_bytes, sums)
    if fault == native.STATE_CUT_SHORT:
        raise _cut_short()
    if fault:
        raise OSError(fault, os.strerror(fault))
    return sums


def will_need(fd: int, offsets: I64, sizes: I64, gap: int) -> None:
    """Has the kernel read these parts ahead; waits for none of them."""
    if native is not None:
        native.will_need(fd, offsets, sizes, gap)
        return
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)


def read_state_reference(
    fd: int, offsets: I64, sizes: I64, gap: int, tail: Bytes, ids: Bytes, payload: Bytes, page_bytes: int
) -> NDArray[np.uint32]:
    """The oracle of `read_state`; reads each part alone."""
    places = [ids, *payload]
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        for part in _parts(places, size):
            if os.preadv(fd, [part.data], offset) != len(part):
                raise _cut_short()
            offset += len(part)
    taken = 0
    for part in _parts(places, len(tail)):
        part[:] = tail[taken : taken + len(part)]
        taken += len(part)
    data = np.ascontiguousarray(payload).reshape(-1)
    return crc32c_pages(data, page_bytes) if len(data) else np.empty(0, np.uint32)


def _parts(places: list[Bytes], size: int) -> Iterator[Bytes]:
    """The memory that the next `size` bytes go to, taken from the front of `places`."""
    while size > 0:
        part = places[0][:size]
        places[0] = places[0][size:]
        if not len(places[0]):
            places.pop(0)
        size -= len(part)
        if len(part):
            yield part


def _cut_short() -> OSError:
    return OSError(errno.EIO, "the file ended early")
