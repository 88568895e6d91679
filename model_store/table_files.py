"""The files of a published table, checked and mapped.

`open_table_files` reads the manifest and the headers and compares sizes before it maps anything, so that a
damaged table is an error message and a table of any size opens at once. `verify_table_files` reads
everything. Knows bytes and checksums; matching and reading rows is the cache floor's. Format: FORMAT.md.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scone.kernels.checksum import crc32c, crc32c_pages
from scone.kernels.errors import DamagedDataError
from scone.kernels.fgram_hash import BUCKET_DTYPE
from scone.kernels.gather import CHECK_BYTES
from scone.kernels.match import BucketIndex
from scone.model_store import lmdb_rows
from scone.model_store.errors import TableError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import TableManifest
from scone.model_store.table_header import (
    BLOCKS_MAGIC,
    HEADER_BYTES,
    INDEX_MAGIC,
    ROWS_MAGIC,
    SUMS_MAGIC,
    TableHeader,
)
from scone.model_store.table_writer import BLOCKS_NAME, FGRAMS_NAME, INDEX_NAME, ROWS_NAME, SUMS_NAME

_BYTES_PER_SCAN = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TableFiles:
    """A mapped table; the arrays are views of the files, read-only, and must not outlive this object.

    Attributes:
        rows: the bytes of rows.bin or rows.lmdb, header included.
        rows_path: the file of `rows`, for readers that do not go through the mapping.
        block_offsets: where in `rows` each block of `manifest.rows_per_block` rows begins, uint64.
        page_sums: CRC-32C of each CHECK_BYTES of the row stream, uint32.
        index_sums: the same of the buckets.
    """

    path: Path
    manifest: TableManifest
    index: BucketIndex
    rows: NDArray[np.uint8]
    rows_path: Path
    block_offsets: NDArray[np.uint64]
    page_sums: NDArray[np.uint32]
    index_sums: NDArray[np.uint32]

    def stream_page(self, page: int) -> bytes:
        """One page of the row stream: CHECK_BYTES of the rows end to end, fewer at the end."""
        at, block_bytes = page * CHECK_BYTES, self.manifest.rows_per_block * self.manifest.row_bytes
        end = min(at + CHECK_BYTES, self.manifest.stream_bytes)
        pieces = []
        while at < end:
            block, within = divmod(at, block_bytes)
            size = min(end - at, block_bytes - within)
            begin = int(self.block_offsets[block]) + within
            pieces.append(self.rows[begin : begin + size].tobytes())
            at += size
        return b"".join(pieces)


def open_table_files(path: str | os.PathLike[str]) -> TableFiles:
    """Opens the table in directory `path` without reading more than its headers; raises TableError."""
    table = Path(path)
    manifest = TableManifest.read(table)
    try:
        files = _open(table, manifest)
    except OSError as error:
        raise TableError(f"cannot open the table {table}: {error}") from None
    # A file of the right size from another table, or zeros after a crash, would pass until the first read.
    for page in {0, len(files.page_sums) - 1}:
        if crc32c(files.stream_page(page)) != files.page_sums[page]:
            raise TableError(
                f"{files.rows_path} is damaged: page {page} of the rows does not fit its checksum"
            )
    return files


def verify_table_files(
    files: TableFiles, on_progress: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Reads the whole table and compares every checksum.

    Args:
        on_progress: called with the number of bytes just read.

    Raises:
        TableError: naming the first file that is damaged, and where.
    """
    for name, entry in files.manifest.files.items():
        if entry.sha256 is not None:
            _verify_hash(files.path / name, entry.sha256)
            on_progress(entry.num_bytes)
    if files.manifest.backend == "lmdb":
        offsets = lmdb_rows.block_offsets(files.rows_path, len(files.block_offsets))
        if not np.array_equal(offsets, files.block_offsets):
            raise TableError(
                f"{files.path / BLOCKS_NAME} does not say where the blocks of {files.rows_path} are"
            )
    try:
        _verify_index(files, on_progress)
        _verify_rows(files, on_progress)
    except DamagedDataError as error:
        raise TableError(f"{files.path}: {error}") from None
    fgrams = FGramSet.load(files.path / FGRAMS_NAME)
    if fgrams.hash != files.manifest.fgram_set_hash:
        raise TableError(f"{files.path / FGRAMS_NAME} is not the f-gram set of this table")


def _open(table: Path, manifest: TableManifest) -> TableFiles:
    names = {INDEX_NAME, SUMS_NAME, FGRAMS_NAME}
    names |= {lmdb_rows.ROWS_NAME, BLOCKS_NAME} if manifest.backend == "lmdb" else {ROWS_NAME}
    if names != manifest.files.keys():
        raise TableError(f"the manifest of {table} lists {sorted(manifest.files)}, wanted {sorted(names)}")
    for name, entry in manifest.files.items():
        _check_size(table / name, entry.num_bytes)
    codec, num_rows = manifest.row_codec, manifest.num_fgrams
    num_index_pages = -(-manifest.num_buckets * BUCKET_DTYPE.itemsize // CHECK_BYTES)
    num_row_pages = -(-manifest.stream_bytes // CHECK_BYTES)
    shape = (manifest.num_home_buckets, manifest.num_buckets, manifest.hash_seed, manifest.fp_bits, num_rows)
    index = _map(table, INDEX_NAME, manifest, INDEX_MAGIC, shape)
    sums = _map(table, SUMS_NAME, manifest, SUMS_MAGIC, (num_index_pages, num_row_pages, CHECK_BYTES, 0, 0))
    if manifest.backend == "lmdb":
        rows_path = table / lmdb_rows.ROWS_NAME
        rows = _map_file(rows_path)
        num_blocks = -(-num_rows // manifest.rows_per_block)
        wanted = (num_blocks, manifest.rows_per_block, manifest.row_bytes, 0, 0)
        blocks = _map(table, BLOCKS_NAME, manifest, BLOCKS_MAGIC, wanted)
        block_offsets = blocks[HEADER_BYTES:].view("<u8")
    else:
        rows_path = table / ROWS_NAME
        row_shape = (num_rows, codec.row_bytes, codec.dim, codec.codec_id, codec.dtype_id)
        rows = _map(table, ROWS_NAME, manifest, ROWS_MAGIC, row_shape)
        block_offsets = np.array([HEADER_BYTES], np.uint64)
    all_sums = sums[HEADER_BYTES:].view("<u4")
    return TableFiles(
        path=table,
        manifest=manifest,
        index=BucketIndex(
            index[HEADER_BYTES:].view(BUCKET_DTYPE),
            manifest.num_home_buckets,
            manifest.hash_seed,
            manifest.fp_bits,
            manifest.max_n,
            manifest.closed,
        ),
        rows=rows,
        rows_path=rows_path,
        block_offsets=block_offsets,
        page_sums=all_sums[num_index_pages:],
        index_sums=all_sums[:num_index_pages],
    )


def _check_size(path: Path, num_bytes: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise TableError(f"{path} is missing: build the table again, or copy all of its files") from None
    if found != num_bytes:
        what = "truncated" if found < num_bytes else "too long"
        raise TableError(f"{path} is {what}: it has {found} bytes, wanted {num_bytes}")


def _map(
    table: Path, name: str, manifest: TableManifest, magic: bytes, numbers: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Maps a file after comparing its header with the manifest."""
    path = table / name
    with open(path, "rb") as file:
        header = TableHeader.from_bytes(file.read(HEADER_BYTES), path)
    if header.magic != magic or header.numbers != numbers:
        raise TableError(f"{path} is damaged: its header does not fit the manifest")
    if header.table_id != manifest.table_id:
        raise TableError(
            f"{path} belongs to another table ({header.table_id[:12]}, wanted {manifest.table_id[:12]})"
        )
    return _map_file(path)


def _map_file(path: Path) -> NDArray[np.uint8]:
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Without this the kernel reads ahead: hundreds of times the bytes that random rows need.
    mapping.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapping, np.uint8)


def _verify_hash(path: Path, sha256: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TableError(f"cannot read {path}: {error}") from None
    if found != sha256:
        raise TableError(f"{path} is damaged: its SHA-256 is {found[:12]}, wanted {sha256[:12]}")


def _verify_index(files: TableFiles, on_progress: Callable[[int], None]) -> None:
    data = files.index.buckets.view(np.uint8).reshape(-1)
    _verify_pages(data, files.index_sums, files.path / INDEX_NAME, on_progress)


def _verify_rows(files: TableFiles, on_progress: Callable[[int], None]) -> None:
    if files.manifest.backend == "mmap":
        data = files.rows[HEADER_BYTES : HEADER_BYTES + files.manifest.stream_bytes]
        _verify_pages(data, files.page_sums, files.rows_path, on_progress)
        return
    for page, wanted in enumerate(files.page_sums.tolist()):
        stored = files.stream_page(page)
        if crc32c(stored) != wanted:
            raise TableError(
                f"{files.rows_path} is damaged: page {page} of the rows does not fit its checksum"
            )
        on_progress(len(stored))


def _verify_pages(
    data: NDArray[np.uint8], sums: NDArray[np.uint32], path: Path, on_progress: Callable[[int], None]
) -> None:
    pages_per_scan = _BYTES_PER_SCAN // CHECK_BYTES
    for first in range(0, len(sums), pages_per_scan):
        part = data[first * CHECK_BYTES : (first + pages_per_scan) * CHECK_BYTES]
        wrong = crc32c_pages(part, CHECK_BYTES) != sums[first : first + pages_per_scan]
        if np.any(wrong):
            page = first + int(wrong.argmax())
            raise TableError(f"{path} is damaged: page {page} after its header does not fit its checksum")
        on_progress(len(part))
