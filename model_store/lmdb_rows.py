"""The LMDB backend: `rows.lmdb` with blocks of rows as values, and `blocks.bin` with where each value lies.

A row per key, as the paper stores them, costs up to twice the row: LMDB keeps a value of more than about 2
KiB on pages of its own, 16 bytes of the first being its header, so that 4096 bytes take 8192. A block of
rows is sized to just fill its pages. Because a table never changes, each value stays where it was written:
readers take rows from the file at the offsets of blocks.bin, without a search in LMDB's tree and without
its Python binding. Any LMDB reader can read the table all the same. Format: FORMAT.md, "rows.lmdb".
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from scone.model_store.errors import TableError

ROWS_NAME = "rows.lmdb"

PAGE_BYTES = 4096
_PAGE_HEADER_BYTES = 16
_LEAF_ENTRY_BYTES = 27  # key, node header and pointer of one value, measured over full leaves
_MAX_PAGES = 512
_WASTE = 1.01
_BLOCKS_PER_COMMIT = 256


def rows_per_block(row_bytes: int, num_rows: int) -> int:
    """Rows in one value: as few pages as keep the whole within 1 % of the rows' own bytes."""
    best_ratio, best_rows = float("inf"), 0
    for num_pages in range(1, _MAX_PAGES + 1):
        rows = (num_pages * PAGE_BYTES - _PAGE_HEADER_BYTES) // row_bytes
        if rows == 0:
            continue
        ratio = (num_pages * PAGE_BYTES + _LEAF_ENTRY_BYTES) / (rows * row_bytes)
        if ratio < best_ratio:
            best_ratio, best_rows = ratio, rows
        if ratio <= _WASTE or rows >= num_rows:
            break
    if best_rows == 0:
        raise TableError(f"a row of {row_bytes} bytes is too long for the LMDB backend: use --backend mmap")
    return min(best_rows, num_rows)


def stored_bytes(row_bytes: int, num_rows: int) -> int:
    """Bytes of rows.lmdb and blocks.bin for so many rows, but for LMDB's inner pages (under 0.1 %)."""
    per_block = rows_per_block(row_bytes, num_rows)
    num_blocks = -(-num_rows // per_block)
    pages = -(-(max(per_block * row_bytes, PAGE_BYTES) + _PAGE_HEADER_BYTES) // PAGE_BYTES)
    return num_blocks * (pages * PAGE_BYTES + _LEAF_ENTRY_BYTES + 8) + 4 * PAGE_BYTES


def block_key(block: int) -> bytes:
    """Big-endian, so that LMDB's byte order is the order of the rows."""
    return block.to_bytes(8, "big")


def write_blocks(rows: NDArray[np.uint8], row_bytes: int, num_rows: int, path: Path) -> NDArray[np.uint64]:
    """Writes all rows (flat bytes) as LMDB values; returns where each block begins in the file.

    A value is never shorter than a page, so that LMDB gives it pages of its own: the last block is filled up
    with zeros.
    """
    per_block = rows_per_block(row_bytes, num_rows)
    num_blocks = -(-num_rows // per_block)
    block_bytes = max(per_block * row_bytes, PAGE_BYTES)
    pages_per_block = -(-(block_bytes + _PAGE_HEADER_BYTES) // PAGE_BYTES)
    # Address space, not disk: the file grows with what is written.
    map_bytes = num_blocks * (pages_per_block * PAGE_BYTES + 128) + (16 << 20)
    with lmdb.open(str(path), subdir=False, map_size=map_bytes, sync=False, lock=False) as env:
        for first in range(0, num_blocks, _BLOCKS_PER_COMMIT):
            with env.begin(write=True) as txn:
                for block in range(first, min(first + _BLOCKS_PER_COMMIT, num_blocks)):
                    begin = block * per_block * row_bytes
                    value = rows[begin : min(begin + per_block * row_bytes, num_rows * row_bytes)].tobytes()
                    txn.put(block_key(block), value.ljust(block_bytes, b"\0"), append=True)
        env.sync(True)
    return block_offsets(path, num_blocks)


def block_offsets(path: Path, num_blocks: int) -> NDArray[np.uint64]:
    """Where the value of each block begins in the file, found by LMDB itself; raises TableError."""
    offsets = np.empty(num_blocks, np.uint64)
    try:
        with (
            lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as env,
            env.begin(buffers=True) as txn,
        ):
            for block, (key, value) in enumerate(txn.cursor()):
                if block >= num_blocks or bytes(key) != block_key(block):
                    raise TableError(f"{path} is damaged: key {bytes(key).hex()} is none of its blocks")
                offsets[block] = _file_offset(value)
            if env.stat()["entries"] != num_blocks:
                raise TableError(
                    f"{path} is damaged: it holds {env.stat()['entries']} blocks, wanted {num_blocks}"
                )
    except lmdb.Error as error:
        raise TableError(f"cannot read {path}: {error}") from None
    return offsets


def _file_offset(value: memoryview) -> int:
    """A value with pages of its own follows their header, which begins with the number of the page."""
    address = np.frombuffer(value, np.uint8).ctypes.data
    page = ctypes.c_uint64.from_address(address - _PAGE_HEADER_BYTES).value
    return page * PAGE_BYTES + _PAGE_HEADER_BYTES
