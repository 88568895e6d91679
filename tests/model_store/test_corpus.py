"""Every kind of corpus file gives the same documents; every kind of damage one clear error."""

import gzip
import io
import json
import os
import re
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from scone.model_store.corpus import find_files, read_documents
from scone.model_store.errors import CorpusError

DOCUMENTS = ["first\ndocument", "zweites: äöü €", "第三 🙂", "x" * 3_000_000]


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": d, "id": 1}, ensure_ascii=False) + "\n" for d in documents).encode()


def parquet(documents: list[str | None]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(documents)), "text": documents}), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(DOCUMENTS)),
        ("a.jsonl", json_lines(DOCUMENTS).replace(b"\n", b"\r\n\n")),
        ("a.jsonl.gz", gzip.compress(json_lines(DOCUMENTS))),
        ("a.jsonl.zst", zstandard.compress(json_lines(DOCUMENTS))),
        # as `cat a.zst b.zst` or pzstd write them
        ("a.jsonl.zst", b"".join(zstandard.compress(json_lines([d])) for d in DOCUMENTS)),
        ("a.parquet", parquet([*DOCUMENTS, None, ""])),
    ],
)
def test_one_file_of_documents(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents([tmp_path / name])) == DOCUMENTS


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_one_text_file_is_one_document(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    path = tmp_path / f"a.md{suffix}"
    path.write_bytes(pack("line\r\nline €".encode()))
    assert list(read_documents([str(path)])) == ["line\r\nline €"]
    path.write_bytes(pack("\ufeffwith a mark".encode()))
    assert list(read_documents([path])) == ["with a mark"]


def test_folders_and_globs_are_read_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c.py", ".git/config", "b/.hidden", "b/__pycache__/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.txt").touch()
    assert list(read_documents([tmp_path])) == ["a.txt", "b/1.txt", "b/2.txt", "c.py"]
    assert list(read_documents([tmp_path / "c.py", tmp_path / "b"])) == ["c.py", "b/1.txt", "b/2.txt"]
    assert list(read_documents([tmp_path / "**/[1a].txt"])) == ["a.txt", "b/1.txt"]
    assert list(read_documents([f"{tmp_path}/*.txt"])) == ["a.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("here")
    assert find_files([tmp_path / "a[1].txt"]) == [tmp_path / "a[1].txt"]


def test_the_standard_library_is_a_corpus() -> None:
    stdlib = sysconfig.get_path("stdlib")
    documents = list(read_documents([f"{stdlib}/json/*.py", f"{stdlib}/os.py"]))
    assert documents[-1] == Path(os.__file__).read_text(encoding="utf-8")
    assert len(documents) > 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", "a.txt is not UTF-8: invalid start byte at byte 3"),
        ("a.jsonl", json_lines(["good"]) + b'{"text": "\xe4"}\n', "a.jsonl:2 is not UTF-8"),
        ("a.jsonl", json_lines(["good"]) + b"{broken\n", "a.jsonl:2 is no JSON"),
        ("a.jsonl", b'{"content": "x"}\n', 'a.jsonl:1 has no text: wanted an object like {"text": "..."}'),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1 has no text"),
        ("a.jsonl", b"[]\n", "a.jsonl:1 has no text"),
        ("a.jsonl", b"", "holds no documents"),
        ("a.txt", b"", "holds no documents"),
        ("a.jsonl.gz", gzip.compress(json_lines(["x"]))[:-9], "a.jsonl.gz: Compressed file ended"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: Not a gzipped file"),
        ("a.txt.zst", b"plain", "a.txt.zst: zstd"),
        ("a.txt.zst", b"", "a.txt.zst: the compressed file ended"),
        ("a.jsonl.zst", zstandard.compress(json_lines(["x"]))[:-3], "a.jsonl.zst: the compressed file ended"),
        ("a.parquet", b"PAR1", "cannot read"),
    ],
)
def test_damage_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)):
        list(read_documents([tmp_path / name]))


def test_parquet_without_a_text_column_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(CorpusError, match="no column 'text'; it has body, id"):
        list(read_documents([path]))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(CorpusError, match="column 'text' holds int"):
        list(read_documents([path]))


def test_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nothing\.txt does not exist"):
        list(read_documents([tmp_path / "nothing.txt"]))
    with pytest.raises(CorpusError, match=r"\*\.txt holds no files"):
        list(read_documents([tmp_path / "*.txt"]))
    with pytest.raises(CorpusError, match="holds no files"):
        list(read_documents([tmp_path]))
