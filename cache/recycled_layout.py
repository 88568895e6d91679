"""How a state lies in LMDB: an entry of its own, its place in the order of worth, and its bytes in chunks.

LMDB keeps a value of more than about 2 KiB on pages of its own, 16 bytes of the first being their header, so
that 4,096 bytes take 8,192; smaller values share a page. A state is cut so that its chunks just fill 4 pages
each, and a rest of up to 2,016 bytes shares a page with others. Chunks of one size also keep a full file
usable: the pages that one state leaves are fit for the next, which a run of 180 pages seldom is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import lmdb

from scone.cache.state_worth import Worth

PAGE_BYTES = 4096
PAGE_HEADER_BYTES = 16
CHUNK_PAGES = 4
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES - PAGE_HEADER_BYTES
IN_LEAF_BYTES = 2016
"""The longest value that shares a page, for the keys used here."""

_ENTRY = struct.Struct("<QQQIdd")
_CHUNK_KEY = struct.Struct(">QI")
_SCORE = struct.Struct(">d")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a state without its bytes.

    Attributes:
        state_id: of its chunks; never given twice.
        num_id_bytes, num_payload_bytes: length of the two parts of its bytes, ids first.
        crc: of both and of its name.
    """

    state_id: int
    num_id_bytes: int
    num_payload_bytes: int
    crc: int
    worth: Worth

    @property
    def num_bytes(self) -> int:
        return self.num_id_bytes + self.num_payload_bytes

    def to_bytes(self) -> bytes:
        return _ENTRY.pack(
            self.state_id,
            self.num_id_bytes,
            self.num_payload_bytes,
            self.crc,
            self.worth.density,
            self.worth.uses,
        )

    def rated(self, worth: Worth) -> Entry:
        return replace(self, worth=worth)

    @classmethod
    def from_bytes(cls, value: bytes | memoryview) -> Self:
        if len(value) != _ENTRY.size:
            raise lmdb.CorruptedError(f"an entry has {len(value)} bytes, wanted {_ENTRY.size}")
        state_id, num_id_bytes, num_payload_bytes, crc, density, uses = _ENTRY.unpack(value)
        return cls(state_id, num_id_bytes, num_payload_bytes, crc, Worth(density, uses))


def chunk_key(state_id: int, chunk: int) -> bytes:
    return _CHUNK_KEY.pack(state_id, chunk)


def chunks(num_bytes: int) -> Iterator[tuple[int, int]]:
    """The (begin, end) of each chunk of a state of `num_bytes`."""
    begin = 0
    while begin < num_bytes:
        rest = num_bytes - begin
        whole = (rest + PAGE_HEADER_BYTES) // PAGE_BYTES * PAGE_BYTES - PAGE_HEADER_BYTES
        if rest >= CHUNK_BYTES:
            length = CHUNK_BYTES
        elif whole > 0 and rest - whole <= IN_LEAF_BYTES:
            length = whole
        else:
            length = rest
        yield begin, begin + length
        begin += length


def num_pages(num_bytes: int) -> int:
    """Pages that a state takes at most, its share of pages with others included."""
    full, rest = divmod(num_bytes, CHUNK_BYTES)
    return full * CHUNK_PAGES + -(-rest // (PAGE_BYTES - PAGE_HEADER_BYTES)) + 1


def order_key(score: float, name: bytes) -> bytes:
    """Sorts as the score does: a float's bytes do, once negative ones are turned round."""
    bits = int.from_bytes(_SCORE.pack(score), "big")
    bits ^= (1 << 64) - 1 if bits >> 63 else 1 << 63
    return bits.to_bytes(8, "big") + name


def name_in_order_key(key: bytes) -> bytes:
    return key[8:]


def score_in_order_key(key: bytes) -> float:
    bits = int.from_bytes(key[:8], "big")
    bits ^= 1 << 63 if bits >> 63 else (1 << 64) - 1
    score: float = _SCORE.unpack(bits.to_bytes(8, "big"))[0]
    return score
