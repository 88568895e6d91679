"""Errors of the online look-up.

CacheError(SconeError)
├── RowReadError        rows that could not be read: I/O error, short read, checksum
└── StoreVersionError   recycled states of another format version
"""

from scone.kernels.errors import SconeError


class CacheError(SconeError):
    """Root of this floor's errors."""


class RowReadError(CacheError):
    """Rows that could not be read; fails the requests that need them, and only those."""


class StoreVersionError(CacheError):
    """Recycled states of another format version: to be removed, or kept for another release."""
