"""How large the files of a table will be, from its shape alone; FORMAT.md in arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from scone.kernels.fgram_hash import BUCKET_DTYPE
from scone.kernels.gather import CHECK_BYTES
from scone.kernels.row_codec import RowCodec
from scone.model_store.fgram_index import KEYS_PER_HOME_BUCKET
from scone.model_store.lmdb_rows import stored_bytes
from scone.model_store.row_errors import ERROR_DTYPE
from scone.model_store.table_header import HEADER_BYTES

_SET_HEADER_BYTES = 400  # of the safetensors file; its length varies with the numbers in it
_SET_BYTES_PER_FGRAM = 1 + 8  # length and count; 4 more for each token


@dataclass(frozen=True, slots=True)
class TableSize:
    """Bytes of a table's files.

    Attributes:
        index: read by every match, so meant to stay in memory.
        rows: rows.bin, or rows.lmdb and blocks.bin.
        rest: checksums, f-grams and row errors; only the first are read while serving.
    """

    index: int
    rows: int
    rest: int

    @property
    def total(self) -> int:
        return self.index + self.rows + self.rest


def predict_table_size(
    codec: RowCodec, num_fgrams: int, *, backend: str = "mmap", mean_length: float = 3.0
) -> TableSize:
    """The table of `num_fgrams` f-grams of `mean_length` tokens; raises TableError if LMDB cannot hold it."""
    index = -(-num_fgrams // KEYS_PER_HOME_BUCKET) * BUCKET_DTYPE.itemsize
    stream = num_fgrams * codec.row_bytes
    num_pages = -(-stream // CHECK_BYTES)
    if backend == "lmdb":
        rows = stored_bytes(codec.row_bytes, num_fgrams)
    else:
        rows = HEADER_BYTES + num_pages * CHECK_BYTES
    checksums = HEADER_BYTES + 4 * (num_pages + -(-index // CHECK_BYTES))
    fgrams = _SET_HEADER_BYTES + int(num_fgrams * (_SET_BYTES_PER_FGRAM + 4 * mean_length))
    return TableSize(HEADER_BYTES + index, rows, checksums + fgrams + num_fgrams * ERROR_DTYPE.itemsize)
