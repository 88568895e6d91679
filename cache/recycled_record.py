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

_PAGE_BYTES = 4096

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


def checksum(name: bytes, ids: bytes, payload: Bytes) -> int:
    """CRC-32C over name, ids, and the CRC-32Cs of the payload's pages."""
    sums = crc32c_pages(payload, _PAGE_BYTES) if len(payload) else np.empty(0, np.uint32)
    return crc32c(name + len(ids).to_bytes(8, "little") + ids + sums.tobytes())


@dataclass(frozen=True, slots=True)
class Record:
    """One state: its name (kind and key), stored ids, payload and checksum."""

    name: bytes
    ids: bytes
    payload: Bytes
    crc: int

    @classmethod
    def make(cls, name: bytes, ids: bytes, payload: Bytes) -> Record:
        return cls(name, ids, payload, checksum(name, ids, payload))

    @property
    def num_bytes(self) -> int:
        return len(self.ids) + len(self.payload)

    def part(self, begin: int, end: int) -> bytes | memoryview:
        """Bytes [begin, end) of ids and payload end to end."""
        num_ids = len(self.ids)
        if begin >= num_ids:
            return self.payload.data[begin - num_ids : end - num_ids]
        return self.ids[begin:end] + self.payload[: max(0, end - num_ids)].tobytes()

    def fault(self, ids: bytes) -> str | None:
        """Why this may not be handed out for `ids`; None: all is well."""
        if checksum(self.name, self.ids, self.payload) != self.crc:
            return "checksum"
        return None if self.ids == ids else "token_ids"
