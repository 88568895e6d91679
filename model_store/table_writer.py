"""Writes a table: rows in rank order, then index, checksums and manifest, and publishes all at once.

Everything grows in `<out>.partial`, which is renamed when complete: a reader sees no table or a whole one.
A build that was killed is resumed by creating the writer again with the same inputs. Same inputs, same
bytes. Knows neither model nor corpus. Format: FORMAT.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scone.kernels.checksum import crc32c_pages
from scone.kernels.gather import CHECK_BYTES
from scone.kernels.row_codec import RowCodec
from scone.model_store import lmdb_rows
from scone.model_store.errors import TableError
from scone.model_store.fgram_index import IndexShape, build_index, check_indexable
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS, FORMAT_VERSION, MANIFEST_NAME, TableFile, TableManifest
from scone.model_store.row_errors import ERROR_DTYPE, row_errors, summarize
from scone.model_store.table_header import BLOCKS_MAGIC, HEADER_BYTES, ROWS_MAGIC, SUMS_MAGIC, TableHeader

INDEX_NAME = "index.bin"
ROWS_NAME = "rows.bin"
BLOCKS_NAME = "blocks.bin"
SUMS_NAME = "checksums.bin"
FGRAMS_NAME = "set.fgrams"
ERRORS_NAME = "row_errors.bin"

_BUILD_NAME = "build.json"
_DONE_NAME = "rows_done.json"
_BYTES_PER_SYNC = 16 << 20
_BYTES_PER_SCAN = 64 << 20


class TableWriter:
    """One build of one table. Not thread-safe; a second writer of the same table is refused.

    Example:
        writer = TableWriter.create(out, fgrams, dim=576, dtype="bfloat16", model_hash=m, tokenizer_hash=t)
        for rows in embed(fgrams, first=writer.num_rows_done):
            writer.append(rows)
        writer.finish()
    """

    def __init__(self, out: Path, fgrams: FGramSet, codec: RowCodec, identity: dict[str, Any]) -> None:
        """Use `create`."""
        self._out, self._fgrams, self._codec, self._identity = out, fgrams, codec, identity
        self._partial = out.with_name(out.name + ".partial")
        self._table_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._lock: BinaryIO | None = None
        self._rows: BinaryIO | None = None
        self._errors: BinaryIO | None = None
        self._num_rows = 0
        self._num_synced = 0

    @classmethod
    def create(
        cls,
        out: Path,
        fgrams: FGramSet,
        *,
        dim: int,
        dtype: str,
        codec: str = "raw",
        backend: str = "mmap",
        model_hash: str,
        tokenizer_hash: str,
        fgram_model_hash: str = "",
        fp_bits: int = 64,
    ) -> TableWriter:
        """Begins a table, or resumes the build of the same one.

        Args:
            dtype: what row values are rounded to: float32, bfloat16 or float16.
            model_hash: the main model's, which the server compares with the one it serves.
            fgram_model_hash: of the model that makes the rows, so that no other one resumes the build.
            fp_bits: width of the index's fingerprints; fewer than 64 only to test collisions.

        Raises:
            TableError: `out` exists, another build is writing it, a partial build has other inputs, the
                f-grams belong to another tokenizer, or the inputs allow no table.
        """
        try:
            row_codec = RowCodec(codec, dtype, dim)
        except ValueError as error:
            raise TableError(f"cannot build {out}: {error}") from None
        if backend not in BACKENDS:
            raise TableError(f"backend is {backend!r}, wanted one of {', '.join(BACKENDS)}")
        if fgrams.tokenizer_hash != tokenizer_hash:
            raise TableError(
                f"the f-gram set was counted with tokenizer {fgrams.tokenizer_hash[:12]}, the model has"
                f" {tokenizer_hash[:12]}: count the corpus again with the model's tokenizer"
            )
        check_indexable(fgrams)
        identity = {
            "format_version": FORMAT_VERSION,
            "model_hash": model_hash,
            "fgram_model_hash": fgram_model_hash,
            "tokenizer_hash": tokenizer_hash,
            "fgram_set_hash": fgrams.hash,
            "dim": dim,
            "dtype": dtype,
            "codec": codec,
            "backend": backend,
            "fp_bits": fp_bits,
        }
        writer = cls(Path(out), fgrams, row_codec, identity)
        writer._open()
        return writer

    @property
    def num_rows_done(self) -> int:
        """Rows that are in the table already: where to go on."""
        return self._num_rows

    def append(self, rows: Tensor) -> None:
        """Adds the next rows, (n, dim) of any float dtype; raises ValueError, TableError."""
        if rows.dim() != 2 or rows.shape[1] != self._codec.dim:
            raise ValueError(f"rows have shape {tuple(rows.shape)}, wanted (n, {self._codec.dim})")
        self.append_stored(*encode_rows(self._codec, rows))

    def append_stored(self, rows: NDArray[np.uint8], errors: NDArray[np.float32]) -> None:
        """Adds the next rows as they are stored, (n, row_bytes), and their errors (n,).

        Raises:
            ValueError, TableError: as `append`.
        """
        assert self._lock is not None, "the writer is closed"
        if rows.ndim != 2 or rows.shape[1] != self._codec.row_bytes:
            raise ValueError(f"rows have shape {rows.shape}, wanted (n, {self._codec.row_bytes})")
        if self._num_rows + len(rows) > len(self._fgrams):
            raise ValueError(f"{self._num_rows} + {len(rows)} rows for {len(self._fgrams)} f-grams")
        if self._rows is None or self._errors is None:
            return  # all rows were there already, and `rows` is empty
        try:
            self._rows.write(rows.tobytes())
            self._errors.write(errors.astype(ERROR_DTYPE).tobytes())
        except OSError as error:
            raise TableError(f"cannot write {self._partial / ROWS_NAME}: {error}") from None
        self._num_rows += len(rows)
        if (self._num_rows - self._num_synced) * self._codec.row_bytes >= _BYTES_PER_SYNC:
            self._sync_rows()

    def finish(self) -> None:
        """Completes and publishes the table; raises TableError."""
        assert self._lock is not None, "the writer is closed"
        if self._num_rows != len(self._fgrams):
            raise TableError(
                f"the table has {self._num_rows} rows, wanted {len(self._fgrams)}, one for each f-gram"
            )
        try:
            if self._rows is not None:
                self._rows.write(bytes(-self._rows.tell() % HEADER_BYTES))
                self._sync_rows()
                self._write_rest()
            _publish(self._partial, self._out)
        except OSError as error:
            raise TableError(f"cannot finish the table {self._out}: {error}") from None
        finally:
            self.close()

    def close(self) -> None:
        """Leaves the build as it is; it can be resumed."""
        if self._rows is not None and self._num_rows > self._num_synced:
            self._sync_rows()
        for file in (self._rows, self._errors, self._lock):
            if file is not None:
                file.close()
        self._rows = self._errors = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        if self._out.exists():
            raise TableError(f"{self._out} exists: delete it, or choose another --out")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._partial / _BUILD_NAME, "a+b")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_whole():
                self._num_rows = len(self._fgrams)
                return
            self._check_identity()
            self._open_rows()
        except BlockingIOError:
            self.close()
            raise TableError(f"another build is writing {self._partial}: wait for it, or end it") from None
        except TableError:
            self.close()
            raise

    def _is_whole(self) -> bool:
        """Whether all was written and only the publication was interrupted: the manifest is written last."""
        if not (self._partial / MANIFEST_NAME).exists():
            return False
        return TableManifest.read(self._partial).table_id == self._table_id

    def _check_identity(self) -> None:
        assert self._lock is not None
        self._lock.seek(0)
        earlier = self._lock.read()
        wanted = json.dumps(self._identity, indent=2, sort_keys=True).encode()
        if earlier == wanted:
            return
        # A kill before the first sync may leave the file empty or short: then there is nothing to resume.
        if earlier and wanted[: len(earlier)] != earlier:
            raise TableError(
                f"{self._partial} is the unfinished build of a table from other inputs: delete it, or repeat"
                f" the build that began it ({_difference(earlier, self._identity)})"
            )
        self._lock.truncate(0)
        self._lock.write(wanted)
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def _open_rows(self) -> None:
        done = self._partial / _DONE_NAME
        self._num_rows = int(json.loads(done.read_text())["num_rows"]) if done.exists() else 0
        self._rows = _open_for_update(self._partial / ROWS_NAME)
        self._errors = _open_for_update(self._partial / ERRORS_NAME)
        if self._num_rows == 0:
            codec = self._codec
            numbers = (len(self._fgrams), codec.row_bytes, codec.dim, codec.codec_id, codec.dtype_id)
            self._rows.write(TableHeader(ROWS_MAGIC, self._table_id, numbers).to_bytes())
        # What was written after the last sync is not trusted.
        _cut(self._rows, HEADER_BYTES + self._num_rows * self._codec.row_bytes)
        _cut(self._errors, self._num_rows * ERROR_DTYPE.itemsize)
        self._num_synced = self._num_rows

    def _sync_rows(self) -> None:
        assert self._rows is not None
        assert self._errors is not None
        for file in (self._rows, self._errors):
            file.flush()
            os.fdatasync(file.fileno())
        _replace_text(self._partial / _DONE_NAME, json.dumps({"num_rows": self._num_rows}))
        self._num_synced = self._num_rows

    def _write_rest(self) -> None:
        """All that follows from rows and f-grams; the manifest, which makes it a table, comes last."""
        partial = self._partial
        index = build_index(self._fgrams, partial / INDEX_NAME, self._table_id, self._identity["fp_bits"])
        num_bytes = len(self._fgrams) * self._codec.row_bytes
        rows = np.memmap(partial / ROWS_NAME, np.uint8, "r", HEADER_BYTES, num_bytes)
        sums = self._write_sums(rows)
        self._fgrams.save(partial / FGRAMS_NAME)
        # readable for whoever may read the rows, also when another user serves the table
        (partial / FGRAMS_NAME).chmod((partial / INDEX_NAME).stat().st_mode)
        files = {
            INDEX_NAME: TableFile((partial / INDEX_NAME).stat().st_size),
            SUMS_NAME: sums,
            FGRAMS_NAME: _hashed(partial / FGRAMS_NAME),
            ERRORS_NAME: _hashed(partial / ERRORS_NAME),
        }
        if self._identity["backend"] == "lmdb":
            files |= self._convert_to_lmdb(rows)
        else:
            files[ROWS_NAME] = TableFile((partial / ROWS_NAME).stat().st_size)
        manifest = self._manifest(index, files)
        for name in files:
            _fsync(partial / name)
        _replace_text(partial / MANIFEST_NAME, manifest.to_json())

    def _write_sums(self, rows: NDArray[np.uint8]) -> TableFile:
        """The checksums of the pages of index and rows."""
        index = np.memmap(self._partial / INDEX_NAME, np.uint8, "r", HEADER_BYTES)
        index_sums, row_sums = _page_sums(index), _page_sums(rows)
        numbers = (len(index_sums), len(row_sums), CHECK_BYTES, 0, 0)
        header = TableHeader(SUMS_MAGIC, self._table_id, numbers).to_bytes()
        sums = header + index_sums.astype("<u4").tobytes() + row_sums.astype("<u4").tobytes()
        (self._partial / SUMS_NAME).write_bytes(sums)
        return TableFile(len(sums), hashlib.sha256(sums).hexdigest())

    def _manifest(self, index: IndexShape, files: dict[str, TableFile]) -> TableManifest:
        codec, num_rows = self._codec, len(self._fgrams)
        is_lmdb = self._identity["backend"] == "lmdb"
        return TableManifest(
            table_id=self._table_id,
            num_fgrams=num_rows,
            dim=codec.dim,
            dtype=codec.dtype,
            codec=codec.codec,
            backend=self._identity["backend"],
            max_n=self._fgrams.max_n,
            closed=self._fgrams.is_closed(),
            fp_bits=self._identity["fp_bits"],
            hash_seed=index.hash_seed,
            num_home_buckets=index.num_home_buckets,
            num_buckets=index.num_buckets,
            row_bytes=codec.row_bytes,
            rows_per_block=lmdb_rows.rows_per_block(codec.row_bytes, num_rows) if is_lmdb else num_rows,
            row_error=summarize(self._partial / ERRORS_NAME),
            model_hash=self._identity["model_hash"],
            fgram_model_hash=self._identity["fgram_model_hash"],
            tokenizer_hash=self._identity["tokenizer_hash"],
            fgram_set_hash=self._identity["fgram_set_hash"],
            min_count=int(self._fgrams.counts[-1]),
            max_count=int(self._fgrams.counts[0]),
            num_corpus_tokens=self._fgrams.num_corpus_tokens,
            files=files,
        )

    def _convert_to_lmdb(self, rows: NDArray[np.uint8]) -> dict[str, TableFile]:
        """rows.bin -> rows.lmdb and blocks.bin, from the start if a kill interrupted it."""
        path = self._partial / lmdb_rows.ROWS_NAME
        path.unlink(missing_ok=True)
        offsets = lmdb_rows.write_blocks(rows, self._codec.row_bytes, len(self._fgrams), path)
        per_block = lmdb_rows.rows_per_block(self._codec.row_bytes, len(self._fgrams))
        numbers = (len(offsets), per_block, self._codec.row_bytes, 0, 0)
        header = TableHeader(BLOCKS_MAGIC, self._table_id, numbers).to_bytes()
        (self._partial / BLOCKS_NAME).write_bytes(header + offsets.astype("<u8").tobytes())
        return {
            lmdb_rows.ROWS_NAME: TableFile(path.stat().st_size),
            BLOCKS_NAME: _hashed(self._partial / BLOCKS_NAME),
        }


def encode_rows(codec: RowCodec, rows: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(n, dim) of any float dtype -> (n, row_bytes) as they are stored, and their errors (n,).

    Raises:
        TableError: a row is not finite.
    """
    if not rows.isfinite().all():
        raise TableError("a row is not finite: the f-gram model has diverged")
    stored = codec.encode(rows.cpu())
    return stored.numpy(), row_errors(codec, rows.cpu(), stored)


def _open_for_update(path: Path) -> BinaryIO:
    return open(path, "r+b" if path.exists() else "w+b")


def _cut(file: BinaryIO, num_bytes: int) -> None:
    """Drops all beyond `num_bytes`, where writing goes on."""
    file.truncate(num_bytes)
    file.seek(num_bytes)


def _page_sums(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    parts = range(0, len(data), _BYTES_PER_SCAN)
    return np.concatenate([crc32c_pages(data[at : at + _BYTES_PER_SCAN], CHECK_BYTES) for at in parts])


def _hashed(path: Path) -> TableFile:
    with open(path, "rb") as file:
        return TableFile(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _difference(earlier: bytes, identity: dict[str, Any]) -> str:
    try:
        before = json.loads(earlier)
        return "; ".join(
            f"{k} was {before.get(k)}, is {v}" for k, v in identity.items() if before.get(k) != v
        )
    except (ValueError, AttributeError):
        return f"{_BUILD_NAME} is damaged"


def _publish(partial: Path, out: Path) -> None:
    """Makes the table, whole and durable in `partial`, visible under its name."""
    if out.exists():
        raise TableError(f"{out} appeared while it was being built: move it away and repeat the build")
    wanted = {MANIFEST_NAME, *TableManifest.read(partial).files}
    for path in partial.iterdir():
        if path.name not in wanted:
            path.unlink()
    _fsync(partial)
    os.rename(partial, out)
    _fsync(out.parent)


def _replace_text(path: Path, text: str) -> None:
    """Writes a file that is seen whole or not at all, also after a power cut."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    _fsync(draft)
    os.replace(draft, path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
