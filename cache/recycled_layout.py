"""How a state lies in LMDB: an entry of its own, its place in the order of worth, and its bytes in chunks.

LMDB keeps a value of more than about 2 KiB on pages of its own, 16 bytes of the first being their header, so
that 4,096 bytes take 8,192; smaller values share a page. A state is cut so that its chunks just fill 16 pages
each, and a rest of up to some 1,900 bytes lies in the entry, which shares a page with others. Chunks of one
size also keep a full file usable: the pages that one state leaves are fit for the next, which a run of 180
pages seldom is.

An entry names the pages of its chunks, which LMDB never moves: to ask LMDB for a chunk would touch each of
its pages, one fault after the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import lmdb
import numpy as np
from numpy.typing import NDArray

from scone.cache.state_worth import Worth

PAGE_BYTES = 4096
PAGE_HEADER_BYTES = 16
CHUNK_PAGES = 16
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES - PAGE_HEADER_BYTES
LONGEST_ENTRY_BYTES = 1990
"""The longest value that shares a page, for the names of states as keys."""
LEAST_CHUNK_BYTES = 2048
"""A shorter chunk is filled up to this, so that it has a page of its own."""

_ENTRY = struct.Struct("<QQQIHdd")
_PAGE_NUMBER = np.dtype("<u4")
_CHUNK_KEY = struct.Struct(">QI")
_SCORE = struct.Struct(">d")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a state without its bytes.

    Attributes:
        state_id: of its chunks; never given twice.
        num_id_bytes, num_payload_bytes: length of the two parts of its bytes, ids first.
        crc: of both and of its name.
        pages: (n,) uint32: the first page in the file of each chunk.
        tail: what is left of its bytes behind the chunks.
    """

    state_id: int
    num_id_bytes: int
    num_payload_bytes: int
    crc: int
    worth: Worth
    pages: NDArray[np.uint32]
    tail: bytes

    @property
    def num_bytes(self) -> int:
        return self.num_id_bytes + self.num_payload_bytes

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(n,) where in the file the bytes of the chunks begin; their sizes are `cut`'s."""
        return self.pages.astype(np.int64) * PAGE_BYTES + PAGE_HEADER_BYTES

    def to_bytes(self) -> bytes:
        fixed = _ENTRY.pack(
            self.state_id,
            self.num_id_bytes,
            self.num_payload_bytes,
            self.crc,
            len(self.pages),
            self.worth.density,
            self.worth.uses,
        )
        return fixed + self.pages.astype(_PAGE_NUMBER).tobytes() + self.tail

    def rated(self, worth: Worth) -> Entry:
        return replace(self, worth=worth)

    @classmethod
    def from_bytes(cls, value: bytes | memoryview) -> Self:
        """Raises lmdb.CorruptedError."""
        if len(value) < _ENTRY.size:
            raise lmdb.CorruptedError(f"an entry has {len(value)} bytes")
        state_id, num_id_bytes, num_payload_bytes, crc, num_chunks, density, uses = _ENTRY.unpack_from(value)
        tail_at = _ENTRY.size + num_chunks * _PAGE_NUMBER.itemsize
        pages = np.frombuffer(value[_ENTRY.size : tail_at], _PAGE_NUMBER).copy()
        worth, tail = Worth(density, uses), bytes(value[tail_at:])
        entry = cls(state_id, num_id_bytes, num_payload_bytes, crc, worth, pages, tail)
        pieces = cut(entry.num_bytes) if entry.num_bytes <= num_chunks * CHUNK_BYTES + len(tail) else None
        if pieces is None or (len(pieces.sizes), pieces.tail_bytes) != (num_chunks, len(tail)):
            raise lmdb.CorruptedError(f"an entry of {entry.num_bytes} bytes has {num_chunks} chunks")
        return entry


def chunk_key(state_id: int, chunk: int) -> bytes:
    return _CHUNK_KEY.pack(state_id, chunk)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the bytes of a state are cut.

    Attributes:
        sizes: (n,) int64: of the chunks, which have pages of their own.
        tail_bytes: of the rest, which lies in the entry.
    """

    sizes: NDArray[np.int64]
    tail_bytes: int

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The (begin, end) of each chunk."""
        ends = np.cumsum(self.sizes).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


@lru_cache(maxsize=1024)
def cut(num_bytes: int) -> Cut:
    """The cut of a state of `num_bytes`."""
    num_full, rest = divmod(num_bytes, CHUNK_BYTES)
    sizes = [CHUNK_BYTES] * num_full
    whole = max(0, (rest + PAGE_HEADER_BYTES) // PAGE_BYTES * PAGE_BYTES - PAGE_HEADER_BYTES)
    tail = rest - whole
    if _ENTRY.size + (num_full + 1) * _PAGE_NUMBER.itemsize + tail > LONGEST_ENTRY_BYTES:
        whole, tail = rest, 0
    if whole:
        sizes.append(whole)
    return Cut(np.array(sizes, np.int64), tail)


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
