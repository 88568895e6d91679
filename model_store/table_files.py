"""The files of a published table, checked and mapped.

`open_table_files` reads the manifest and the headers and compares sizes before it maps anything, so that a
damaged table is an error message and a table of any size opens at once. `verify_table_files` reads
everything. Knows bytes and checksums; matching and reading rows is the cache floor's. Format: FORMAT.md.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scone.kernels.checksum import crc32c_pages
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
from scone.model_store.table_writer import (
    BLOCKS_NAME,
    ERRORS_NAME,
    FGRAMS_NAME,
    INDEX_NAME,
    ROWS_NAME,
    SUMS_NAME,
)

_BYTES_PER_SCAN = 64 << 20


@dataclass(frozen=True, eq=False)
class TableFiles:
    """A mapped table; the arrays are views of the files, read-only.

    Attributes:
        rows: the bytes of rows.bin or rows.lmdb, header included.
        rows_path: the file of `rows`; `rows_fd` is the same file, open as long as `rows` is in use.
        index_fd: the file of `index`, open likewise.
        block_offsets: where in `rows` each block of `manifest.rows_per_block` rows begins, uint64.
        page_sums: CRC-32C of each CHECK_BYTES of the row stream, uint32.
        index_sums: the same of the buckets.
    """

    path: Path
    manifest: TableManifest
    index: BucketIndex
    rows: NDArray[np.uint8]
    rows_path: Path
    rows_fd: int
    index_fd: int
    block_offsets: NDArray[np.uint64]
    page_sums: NDArray[np.uint32]
    index_sums: NDArray[np.uint32]

    def __post_init__(self) -> None:
        weakref.finalize(self.rows, os.close, self.rows_fd)
        weakref.finalize(self.index, os.close, self.index_fd)

    def read_stream(self, begin: int, out: memoryview) -> None:
        """Reads the row stream (the rows end to end) from byte `begin` on, by pread.

        Unlike access through the mapping, a read that fails is an exception.

        Raises:
            OSError: the disk failed, or the file ended early.
        """
        block_bytes = self.manifest.rows_per_block * self.manifest.row_bytes
        done = 0
        while done < len(out):
            block, within = divmod(begin + done, block_bytes)
            size = min(len(out) - done, block_bytes - within)
            _read_fully(self.rows_fd, out[done : done + size], int(self.block_offsets[block]) + within)
            done += size

    def read_index(self, begin: int, out: memoryview) -> None:
        """Reads the buckets' bytes from byte `begin` on; raises OSError as `read_stream`."""
        _read_fully(self.index_fd, out, HEADER_BYTES + begin)

    def read_pages(self, first: int, end: int) -> NDArray[np.uint8]:
        """Pages [first, end) of the row stream, CHECK_BYTES each, the last of the table maybe fewer;
        unchecked.

        Raises:
            OSError: as `read_stream`.
        """
        begin = first * CHECK_BYTES
        data = np.empty(min(end * CHECK_BYTES, self.manifest.stream_bytes) - begin, np.uint8)
        self.read_stream(begin, data.data)
        return data

    def check_pages(self, first: int, data: NDArray[np.uint8]) -> None:
        """Raises TableError if `data`, pages of the row stream from `first` on, is damaged."""
        sums = crc32c_pages(data, CHECK_BYTES)
        wrong = sums != self.page_sums[first : first + len(sums)]
        if np.any(wrong):
            page = first + int(wrong.argmax())
            raise TableError(
                f"{self.rows_path} is damaged: page {page} of the rows does not fit its checksum"
            )


def _read_fully(fd: int, out: memoryview, offset: int) -> None:
    done = 0
    while done < len(out):
        got = os.preadv(fd, [out[done:]], offset + done)
        if got == 0:
            raise OSError(errno.EIO, "the file ended early")
        done += got


def open_table_files(path: str | os.PathLike[str]) -> TableFiles:
    """Opens the table in directory `path` without reading more than its headers; raises TableError."""
    table = Path(path)
    manifest = TableManifest.read(table)
    try:
        files = _open(table, manifest)
        # A file of the right size from another table, or zeros after a crash, would pass until it is read.
        for page in (0, len(files.page_sums) - 1):
            files.check_pages(page, files.read_pages(page, page + 1))
    except OSError as error:
        raise TableError(f"cannot open the table {table}: {error}") from None
    return files


def verify_table_files(
    files: TableFiles, on_progress: Callable[[int], object] = lambda num_bytes: None
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
    except (DamagedDataError, OSError) as error:
        raise TableError(f"{files.path}: {error}") from None
    fgrams = FGramSet.load(files.path / FGRAMS_NAME)
    if fgrams.hash != files.manifest.fgram_set_hash:
        raise TableError(f"{files.path / FGRAMS_NAME} is not the f-gram set of this table")


def _open(table: Path, manifest: TableManifest) -> TableFiles:
    names = {INDEX_NAME, SUMS_NAME, FGRAMS_NAME, ERRORS_NAME}
    names |= {lmdb_rows.ROWS_NAME, BLOCKS_NAME} if manifest.backend == "lmdb" else {ROWS_NAME}
    if names != manifest.files.keys():
        raise TableError(f"the manifest of {table} lists {sorted(manifest.files)}, wanted {sorted(names)}")
    for name, entry in manifest.files.items():
        _check_size(table / name, entry.num_bytes)
    codec, num_rows = manifest.row_codec, manifest.num_fgrams
    num_index_pages = -(-manifest.num_buckets * BUCKET_DTYPE.itemsize // CHECK_BYTES)
    num_row_pages = -(-manifest.stream_bytes // CHECK_BYTES)
    shape = (manifest.num_home_buckets, manifest.num_buckets, manifest.hash_seed, manifest.fp_bits, num_rows)
    index_fd, index = _map(table, INDEX_NAME, manifest, INDEX_MAGIC, shape)
    sums_shape = (num_index_pages, num_row_pages, CHECK_BYTES, 0, 0)
    sums = _map_and_close(table, SUMS_NAME, manifest, SUMS_MAGIC, sums_shape)
    if manifest.backend == "lmdb":
        rows_path = table / lmdb_rows.ROWS_NAME
        rows_fd = os.open(rows_path, os.O_RDONLY | os.O_CLOEXEC)
        rows = _map_file(rows_fd)
        num_blocks = -(-num_rows // manifest.rows_per_block)
        wanted = (num_blocks, manifest.rows_per_block, manifest.row_bytes, 0, 0)
        blocks = _map_and_close(table, BLOCKS_NAME, manifest, BLOCKS_MAGIC, wanted)
        block_offsets = blocks[HEADER_BYTES:].view("<u8")
    else:
        rows_path = table / ROWS_NAME
        row_shape = (num_rows, codec.row_bytes, codec.dim, codec.codec_id, codec.dtype_id)
        rows_fd = os.open(rows_path, os.O_RDONLY | os.O_CLOEXEC)
        _check_header(os.pread(rows_fd, HEADER_BYTES, 0), rows_path, manifest, ROWS_MAGIC, row_shape)
        rows = _map_file(rows_fd)
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
        rows_fd=rows_fd,
        index_fd=index_fd,
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
) -> tuple[int, NDArray[np.uint8]]:
    """Opens and maps a file after comparing its header with the manifest."""
    path = table / name
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_header(os.pread(fd, HEADER_BYTES, 0), path, manifest, magic, numbers)
        return fd, _map_file(fd)
    except BaseException:
        os.close(fd)
        raise


def _map_and_close(
    table: Path, name: str, manifest: TableManifest, magic: bytes, numbers: tuple[int, ...]
) -> NDArray[np.uint8]:
    fd, mapped = _map(table, name, manifest, magic, numbers)
    os.close(fd)
    return mapped


def _check_header(
    data: bytes, path: Path, manifest: TableManifest, magic: bytes, numbers: tuple[int, ...]
) -> None:
    header = TableHeader.from_bytes(data, path)
    if header.magic != magic or header.numbers != numbers:
        raise TableError(f"{path} is damaged: its header does not fit the manifest")
    if header.table_id != manifest.table_id:
        raise TableError(
            f"{path} belongs to another table ({header.table_id[:12]}, wanted {manifest.table_id[:12]})"
        )


def _map_file(fd: int) -> NDArray[np.uint8]:
    mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
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


def _verify_rows(files: TableFiles, on_progress: Callable[[int], object]) -> None:
    pages_per_scan = _BYTES_PER_SCAN // CHECK_BYTES
    for first in range(0, len(files.page_sums), pages_per_scan):
        data = files.read_pages(first, first + pages_per_scan)
        files.check_pages(first, data)
        on_progress(len(data))


def _verify_index(files: TableFiles, on_progress: Callable[[int], object]) -> None:
    data = files.index.buckets.view(np.uint8).reshape(-1)
    pages_per_scan = _BYTES_PER_SCAN // CHECK_BYTES
    for first in range(0, len(files.index_sums), pages_per_scan):
        part = data[first * CHECK_BYTES : (first + pages_per_scan) * CHECK_BYTES]
        wrong = crc32c_pages(part, CHECK_BYTES) != files.index_sums[first : first + pages_per_scan]
        if np.any(wrong):
            page = first + int(wrong.argmax())
            raise TableError(
                f"{files.path / INDEX_NAME} is damaged: page {page} of the buckets does not fit its checksum"
            )
        on_progress(len(part))
