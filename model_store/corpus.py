"""Documents of a text corpus, whatever files it lies in.

One document is one text file, one line of a `.jsonl` file ({"text": ...}) or one row of a `.parquet` file
(column `text`); `.gz` and `.zst` of text and `.jsonl` are unpacked on the way. Paths may be files, folders
and globs.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from scone.model_store.errors import CorpusError

TEXT_FIELD = "text"
"""The key of a JSON line and the column of a Parquet file."""

_PACKED = {".gz", ".zst"}


def find_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files behind paths and globs, in the order given; raises CorpusError.

    Within a folder or a glob they come sorted by name. A folder stands for every file below it, less hidden
    files and folders.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [
                p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path))
            ]
        elif path.exists():
            found = [path]
        elif glob.has_magic(str(path)):
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)]
        else:
            raise CorpusError(f"corpus path {path} does not exist; wanted a file, a folder or a glob")
        if not found:
            raise CorpusError(f"corpus path {path} holds no files")
        files += found
    return files


def corpus_identity(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Hex SHA-256 over names, sizes and modification times of all files; raises CorpusError."""
    digest = hashlib.sha256()
    for path in find_files(paths):
        status = path.stat()
        digest.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def read_documents(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Every document that is not empty, in a stable order; raises CorpusError, also if there is none.

    A file is read as a stream, so no more than one document is in memory at a time.
    """
    num_documents = 0
    for path in find_files(paths):
        for text in read_file(path):
            if text:
                num_documents += 1
                yield text
    if not num_documents:
        raise CorpusError(f"the corpus {', '.join(map(str, paths))} holds no documents: all of it is empty")


def read_file(path: Path) -> Iterator[str]:
    """The documents of one file; raises CorpusError."""
    kind = (path.with_suffix("") if path.suffix in _PACKED else path).suffix
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
        elif kind == ".jsonl":
            with _open(path) as file:
                yield from _read_json_lines(path, file)
        else:
            with _open(path) as file:
                yield _decode(file.read(), str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read {path}: {error}") from None


def _read_json_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where} is no JSON: {error}") from None
        text = record.get(TEXT_FIELD) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CorpusError(f'{where} has no text: wanted an object like {{"{TEXT_FIELD}": "..."}}')
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(f"{path} needs pyarrow: pip install 'scone-serve[corpus]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if TEXT_FIELD not in file.schema_arrow.names:
                raise CorpusError(
                    f"{path} has no column {TEXT_FIELD!r}; it has {', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[TEXT_FIELD]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise CorpusError(
                            f"{path}: column {TEXT_FIELD!r} holds {type(text).__name__}, wanted str"
                        )
                    yield text or ""
    except pyarrow.ArrowException as error:
        raise CorpusError(f"cannot read {path}: {error}") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise CorpusError(f"{path} needs zstandard: pip install 'scone-serve[corpus]'") from None
        return io.BufferedReader(_ZstdStream(path, zstandard.ZstdDecompressor(), zstandard.ZstdError))
    return open(path, "rb")


class _ZstdStream(io.RawIOBase):
    """The unpacked bytes of a .zst file of one or more frames.

    zstandard's own readers take a file that is cut short for a complete one; this one raises EOFError.
    """

    def __init__(self, path: Path, decompressor: Any, zstd_error: type[Exception]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._decompressor, self._zstd_error = decompressor, zstd_error
        self._frame = decompressor.decompressobj()
        self._unpacked = memoryview(b"")
        self._packed = b""
        self._in_frame = True  # an empty file is no .zst file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(1 << 20)
            if not self._packed:
                if self._in_frame:
                    raise EOFError("the compressed file ended before the end-of-stream marker was reached")
                return 0
            self._unpack()
        taken = self._unpacked[: len(buffer)]
        buffer[: len(taken)] = taken
        self._unpacked = self._unpacked[len(taken) :]
        return len(taken)

    def _unpack(self) -> None:
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstd_error as error:
            raise OSError(str(error)) from None
        self._in_frame = not self._frame.eof
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()

    def close(self) -> None:
        self._file.close()
        super().close()


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
