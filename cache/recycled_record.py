"""The bytes of a stored state: token ids, then payload, with one checksum over them and the name.

The checksum covers the kind and the key as well, so that bytes that belong to another state never pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scone.cache.recycled_stats import KINDS, Kind
from scone.kernels.checksum import crc32c, crc32c_pages

SUMMED_BYTES = 4096
"""Of a payload, for each of the checksums that its own is made of."""

Bytes = NDArray[np.uint8]
Payload = NDArray[Any] | bytes | bytearray | memoryview


def id_bytes(token_ids: NDArray[np.int32] | bytes) -> bytes:
    """Token ids as stored: little-endian, two bytes each where all fit."""
    if isinstance(token_ids, bytes):
        return b"b" + token_ids
    ids = np.ascontiguousarray(token_ids)
    if len(ids) and ids.min() >= 0 and ids.max() < 1 << 16:
        return b"h" + ids.astype("<u2").tobytes()
    return b"i" + ids.astype("<i4").tobytes()


def as_bytes(payload: Payload) -> Bytes:
    """A payload as flat bytes; shares its memory if that is contiguous."""
    array = payload if isinstance(payload, np.ndarray) else np.frombuffer(payload, np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def state_key(kind: Kind, key: bytes) -> bytes:
    return bytes((KINDS.index(kind),)) + key


def kind_of(name: bytes) -> Kind:
    return KINDS[name[0]]


def page_sums(payload: Bytes) -> NDArray[np.uint32]:
    """The CRC-32Cs of the pages of a flat payload."""
    return crc32c_pages(payload, SUMMED_BYTES) if len(payload) else np.empty(0, np.uint32)


def checksum(name: bytes, ids: bytes, sums: NDArray[np.uint32]) -> int:
    """CRC-32C over name, ids, and the CRC-32Cs of the payload's pages."""
    return crc32c(name + len(ids).to_bytes(8, "little") + ids + sums.tobytes())


@dataclass(frozen=True, slots=True)
class Record:
    """One state.

    Attributes:
        name: kind and key.
        ids: as stored.
        payload: flat; read to where it was wanted, the rows of somebody's memory.
        crc: as stored.
        sums: of the payload's pages, if they were computed while it was read.
    """

    name: bytes
    ids: bytes
    payload: Bytes
    crc: int
    sums: NDArray[np.uint32] | None = None

    @classmethod
    def make(cls, name: bytes, ids: bytes, payload: Bytes) -> Record:
        return cls(name, ids, payload, checksum(name, ids, page_sums(payload)))

    @property
    def num_bytes(self) -> int:
        return len(self.ids) + self.payload.nbytes

    def flat(self) -> Bytes:
        """The payload as flat bytes; copied if it lies in rows."""
        return np.ascontiguousarray(self.payload).reshape(-1)

    def part(self, begin: int, end: int) -> bytes | memoryview:
        """Bytes [begin, end) of ids and payload end to end."""
        num_ids = len(self.ids)
        if begin >= num_ids:
            return self.payload.data[begin - num_ids : end - num_ids]
        return self.ids[begin:end] + self.payload[: max(0, end - num_ids)].tobytes()

    def fault(self, ids: bytes) -> str | None:
        """Why this may not be handed out for `ids`; None: all is well."""
        sums = page_sums(self.flat()) if self.sums is None else self.sums
        if checksum(self.name, self.ids, sums) != self.crc:
            return "checksum"
        return None if self.ids == ids else "token_ids"
