"""The first page of index.bin, rows.bin, blocks.bin and checksums.bin: what the file is and whose it is.

Format: FORMAT.md, "Headers".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from scone.kernels.checksum import crc32c
from scone.model_store.errors import TableError
from scone.model_store.manifest import FORMAT_VERSION

HEADER_BYTES = 4096
"""One page, so that what follows is aligned for direct reads; only the first 128 bytes are in use."""

_LAYOUT = struct.Struct("<8sII32sQQQQQ36xI")
_USED_BYTES = _LAYOUT.size

INDEX_MAGIC = b"SCONEIDX"
ROWS_MAGIC = b"SCONEROW"
BLOCKS_MAGIC = b"SCONEBLK"
SUMS_MAGIC = b"SCONESUM"


@dataclass(frozen=True, slots=True)
class TableHeader:
    """One header; the meaning of the five numbers depends on `magic`."""

    magic: bytes
    table_id: str
    numbers: tuple[int, int, int, int, int]

    def to_bytes(self) -> bytes:
        """HEADER_BYTES bytes."""
        table_id = bytes.fromhex(self.table_id)
        body = _LAYOUT.pack(self.magic, FORMAT_VERSION, HEADER_BYTES, table_id, *self.numbers, 0)[:-4]
        return (body + crc32c(body).to_bytes(4, "little")).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def from_bytes(cls, data: bytes, path: object) -> TableHeader:
        """Reads and checks a header; raises TableError naming `path`."""
        if len(data) < _USED_BYTES:
            raise TableError(f"{path} is truncated: its header is missing")
        magic, version, header_bytes, table_id, *numbers, check = _LAYOUT.unpack(data[:_USED_BYTES])
        if check != crc32c(data[: _USED_BYTES - 4]):
            raise TableError(f"{path} is damaged: its header does not fit its checksum")
        if version != FORMAT_VERSION or header_bytes != HEADER_BYTES:
            raise TableError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
        first, second, third, fourth, fifth = numbers
        return cls(magic, table_id.hex(), (first, second, third, fourth, fifth))
