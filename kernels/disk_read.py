"""Many reads of one file at once: io_uring where it is allowed, else threads that call pread.

The native readers (native/disk_read.cpp) hold no lock of Python while they wait; without the extension the
same reads are done one after the other. Knows byte ranges, not rows.
"""

from __future__ import annotations

import errno
import os
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.checksum import crc32c_pages
from scone.kernels.extension import native
from scone.kernels.gather import check_out, decode_rows
from scone.kernels.row_codec import RowCodec

I64 = NDArray[np.int64]
Sums = NDArray[np.uint32]

PAGE_BYTES = 4096
"""One checksum covers this much of what is read."""


class Spans(NamedTuple):
    """Byte ranges of a file: sizes[i] bytes at offsets[i], which go to places[i] of a buffer; each (n,)."""

    offsets: I64
    sizes: I64
    places: I64


class RowsOut(NamedTuple):
    """Rows to be decoded out of what is read.

    Attributes:
        offsets: (n,) where each row begins in the buffer, rising.
        targets: (n,) which row of `out` each one is.
        out: (any, dim) on the CPU; rows that are no target stay as they are.
    """

    offsets: I64
    targets: I64
    codec: RowCodec
    out: Tensor

    def decode(self, buffer: NDArray[np.uint8]) -> None:
        """All of them, once everything is in `buffer`."""
        offsets = np.full(len(self.out), -1, np.int64)
        offsets[self.targets] = self.offsets
        decode_rows(buffer, offsets, self.codec, self.out)


class SpanReader(Protocol):
    """Reads byte ranges of one file. Thread-safe."""

    name: str

    def read(
        self, spans: Spans, buffer: NDArray[np.uint8], sums: Sums | None = None, rows: RowsOut | None = None
    ) -> None:
        """Reads the spans into `buffer`; returns when all are there.

        Args:
            sums: takes the CRC-32C of each PAGE_BYTES of `buffer` that were read; `places` are then multiples
                of them. Computed while other reads are under way.
            rows: decoded while other reads are under way; `places` then rise. They are decoded of whatever
                bytes came: whether these are sound is in `sums`.

        Raises:
            OSError: a read failed, or ended early (EIO); `buffer` is then undefined, and no read is under
            way.
        """


def uring_available() -> bool:
    """Whether this process may use io_uring; containers often forbid it."""
    return native is not None and native.uring_available()


def open_span_reader(fd: int, depth: int, *, use_uring: bool = True) -> SpanReader:
    """The fastest reader there is for `fd`, which must stay open; `depth` reads are under way at a time."""
    if native is None:
        return _SerialReader(fd)
    return _NativeReader(fd, depth, use_uring and uring_available())


class _NativeReader:
    def __init__(self, fd: int, depth: int, use_uring: bool) -> None:
        assert native is not None
        self.name = "io_uring" if use_uring else "pread"
        self._short_read: int = native.SHORT_READ
        self._native: Any = native.SpanReader(fd, depth, use_uring)

    def read(
        self, spans: Spans, buffer: NDArray[np.uint8], sums: Sums | None = None, rows: RowsOut | None = None
    ) -> None:
        where = (*spans, buffer.ctypes.data, buffer.nbytes, sums)
        if rows is None:
            result = self._native.read(*where)
        else:
            codec, out = rows.codec, check_out(rows.out, len(rows.out), rows.codec.dim)
            assert len(rows.targets) == 0 or 0 <= rows.targets.min() <= rows.targets.max() < len(rows.out)
            result = self._native.read_and_decode(
                *where, rows.offsets, rows.targets, codec.codec_id, codec.dtype_id, codec.dim, *out
            )
        if result == self._short_read:
            raise _short_read()
        if result:
            raise OSError(result, os.strerror(result))


class _SerialReader:
    name = "pread"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(
        self, spans: Spans, buffer: NDArray[np.uint8], sums: Sums | None = None, rows: RowsOut | None = None
    ) -> None:
        for offset, size, place in zip(*(numbers.tolist() for numbers in spans), strict=True):
            if os.preadv(self._fd, [buffer.data[place : place + size]], offset) != size:
                raise _short_read()
            if sums is not None:
                found = crc32c_pages(buffer[place : place + size], PAGE_BYTES)
                sums[place // PAGE_BYTES : place // PAGE_BYTES + len(found)] = found
        if rows is not None:
            rows.decode(buffer)


def _short_read() -> OSError:
    return OSError(errno.EIO, "the file ended early")
