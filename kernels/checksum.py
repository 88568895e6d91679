"""CRC-32C of pages: native with the processor's instruction, or the NumPy oracle, many pages at a time."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from scone.kernels.errors import DamagedDataError
from scone.kernels.extension import native

_POLYNOMIAL = 0x82F63B78
_MIN_PAGES_AT_ONCE = 32
"""Below this, a NumPy call for each column of bytes costs more than plain Python for each byte."""


def crc32c_pages(data: NDArray[np.uint8], page_bytes: int) -> NDArray[np.uint32]:
    """The checksum of each `page_bytes` of `data`; the last page may be short. Raises DamagedDataError."""
    if native is None:
        return crc32c_pages_reference(data, page_bytes)
    sums = np.empty(-(-len(data) // page_bytes), np.uint32)
    if not native.crc32c_pages(data, page_bytes, sums):
        raise DamagedDataError("the data cannot be read: its file was truncated or the disk failed")
    return sums


def crc32c(data: bytes) -> int:
    """The checksum of `data`."""
    if not data:
        return 0
    return int(crc32c_pages(np.frombuffer(data, np.uint8), len(data))[0])


def crc32c_pages_reference(data: NDArray[np.uint8], page_bytes: int) -> NDArray[np.uint32]:
    """The oracle of `crc32c_pages`."""
    num_whole = len(data) // page_bytes
    sums = _advance(data[: num_whole * page_bytes].reshape(num_whole, page_bytes))
    rest = data[num_whole * page_bytes :]
    return np.concatenate((sums, _advance(rest[None]))) if len(rest) else sums


def _advance(pages: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(n, size) -> (n,): byte by byte, but all pages at once if that pays."""
    table = _table()
    if len(pages) < _MIN_PAGES_AT_ONCE:
        return np.array([_advance_one(page.tobytes()) for page in pages], np.uint32)
    crc = np.full(len(pages), 0xFFFFFFFF, np.uint32)
    for column in range(pages.shape[1]):
        crc = table[(crc ^ pages[:, column]) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return ~crc


def _advance_one(page: bytes) -> int:
    table, crc = _table_in_python(), 0xFFFFFFFF
    for byte in page:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table_in_python() -> list[int]:
    return [int(entry) for entry in _table()]


@cache
def _table() -> NDArray[np.uint32]:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(
            crc & np.uint32(1), (crc >> np.uint32(1)) ^ np.uint32(_POLYNOMIAL), crc >> np.uint32(1)
        )
    return crc
