"""`manifest.json`: what a table holds, which model it belongs to, and how large its files are.

The manifest is read first and believed only if its own hash fits; every other file repeats `table_id` in its
header, so that files of two tables cannot be mixed. Format: FORMAT.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scone.kernels.row_codec import RowCodec
from scone.model_store.errors import TableError
from scone.model_store.row_errors import RowError

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "scone-table"
FORMAT_VERSION = 2
BACKENDS = ("mmap", "lmdb")


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file of a table: its exact size, and its SHA-256 unless its pages have checksums of their own."""

    num_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableManifest:
    """The content of manifest.json.

    Attributes:
        table_id: hex SHA-256 over everything that determines the table's bytes.
        hash_seed: seed of the index's hashes; the builder tries 0, 1, 2, ... until no two f-grams collide.
        num_home_buckets: buckets in which a search can begin; the file has `num_buckets`.
        row_bytes: bytes of one stored row.
        rows_per_block: rows in one value of the LMDB backend; num_fgrams for rows.bin.
        row_error: how far stored rows are from computed ones.
        min_count, max_count: corpus counts of the last and of the first row.
    """

    table_id: str
    num_fgrams: int
    dim: int
    dtype: str
    codec: str
    backend: str
    max_n: int
    closed: bool
    fp_bits: int
    hash_seed: int
    num_home_buckets: int
    num_buckets: int
    row_bytes: int
    rows_per_block: int
    row_error: RowError
    model_hash: str
    fgram_model_hash: str
    tokenizer_hash: str
    fgram_set_hash: str
    min_count: int
    max_count: int
    num_corpus_tokens: int
    files: Mapping[str, TableFile]

    @property
    def row_codec(self) -> RowCodec:
        return RowCodec(self.codec, self.dtype, self.dim)

    @property
    def stream_bytes(self) -> int:
        """Bytes of all stored rows end to end."""
        return self.num_fgrams * self.row_bytes

    def to_json(self) -> str:
        content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "complete": True} | asdict(self)
        content["manifest_sha256"] = _digest(content)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, table: Path) -> TableManifest:
        """Reads and checks the manifest of the table in `table`; raises TableError."""
        path = table / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TableError(_why_missing(table)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"cannot read {path}: {error}") from None
        try:
            content = json.loads(text)
        except ValueError as error:
            raise TableError(f"{path} is damaged: {error}") from None
        return cls._parse(content, path)

    @classmethod
    def _parse(cls, content: Any, path: Path) -> TableManifest:
        if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
            raise TableError(f"{path} is no manifest of a table: `format` is not {FORMAT_NAME!r}")
        if content.get("format_version") != FORMAT_VERSION:
            raise TableError(
                f"{path} has format version {content.get('format_version')}, this program reads"
                f" {FORMAT_VERSION}: build the table again, or use the release that wrote it"
            )
        claimed = content.pop("manifest_sha256", None)
        if claimed != _digest(content):
            raise TableError(f"{path} is damaged: its content does not fit its manifest_sha256")
        if content.get("complete") is not True:
            raise TableError(f"{table_name(path)} is incomplete: finish it with `scone build`")
        names = {field.name for field in fields(cls)}
        missing = sorted(names - content.keys())
        if missing:
            raise TableError(f"{path} lacks {', '.join(missing)}")
        values = {name: content[name] for name in names}
        values["row_error"] = RowError(**content["row_error"])
        values["files"] = {name: TableFile(**entry) for name, entry in content["files"].items()}
        return cls(**values)


def table_name(manifest_path: Path) -> str:
    return f"the table {manifest_path.parent}"


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _why_missing(table: Path) -> str:
    if not table.exists():
        partial = table.with_name(table.name + ".partial")
        if partial.exists():
            return f"the table {table} is incomplete ({partial} exists): run the same `scone build` again"
        return f"there is no table at {table}: build one with `scone build`"
    if not table.is_dir():
        return f"{table} is a file, wanted the directory of a table"
    return f"{table} holds no {MANIFEST_NAME}: it is no table, or its build was interrupted"
