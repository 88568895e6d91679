"""Tables on disk: golden bytes, resumed and killed builds, and every kind of damage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from scone.model_store import lmdb_rows
from scone.model_store.errors import TableError
from scone.model_store.fgram_set import FGramSet
from scone.model_store.manifest import BACKENDS, TableManifest
from scone.model_store.table_files import open_table_files, verify_table_files
from scone.model_store.table_writer import TableWriter

WriteTable = Callable[..., Path]
MakeSet = Callable[..., FGramSet]
HASHES: dict[str, Any] = {"model_hash": "6d" * 32, "tokenizer_hash": "74" * 32}


def digests(table: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(table.iterdir())}


@pytest.fixture(scope="module", params=BACKENDS)
def table(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    zipf_fgrams: FGramSet,
    write_table: WriteTable,
) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / request.param, zipf_fgrams, backend=request.param)


@pytest.fixture
def copy(table: Path, tmp_path: Path) -> Path:
    """A table to damage."""
    return shutil.copytree(table, tmp_path / "copy")


def rows_file(table: Path) -> Path:
    return next(p for p in (table / "rows.bin", table / "rows.lmdb") if p.exists())


def test_a_fresh_table_opens_and_verifies(table: Path, zipf_fgrams: FGramSet) -> None:
    files = open_table_files(table)
    num_bytes: list[int] = []
    verify_table_files(files, num_bytes.append)
    assert sum(num_bytes) > files.manifest.stream_bytes
    assert files.manifest.num_fgrams == len(zipf_fgrams)
    assert files.manifest.closed
    assert not table.with_name(table.name + ".partial").exists()


def test_golden_bytes(tmp_path: Path, fgram_set: MakeSet) -> None:
    """FORMAT.md, byte by byte, for a table of two rows. A change here is a new format version."""
    fgrams = fgram_set({(5, 6): 9, (5, 6, 7): 4}, max_n=3)
    writer = TableWriter.create(
        tmp_path / "t", fgrams, dim=2, dtype="bfloat16", model_hash="6d" * 32, tokenizer_hash="74" * 32
    )
    writer.append(torch.tensor([[1.0, 2.0], [-1.0, 0.5009765625]]))  # the last is rounded to 0.5
    writer.finish()
    manifest = json.loads((tmp_path / "t/manifest.json").read_text())
    table_id = manifest["table_id"]
    rows = (tmp_path / "t/rows.bin").read_bytes()
    assert rows[:16].hex() == b"SCONEROW".hex() + "02000000" + "00100000"
    assert rows[16:48].hex() == table_id
    assert rows[48:88].hex() == "".join(n.to_bytes(8, "little").hex() for n in (2, 4, 2, 0, 1))
    assert rows[88:124] == bytes(36)
    assert rows[128:4096] == bytes(4096 - 128)
    assert rows[4096:].hex() == ("803f0040" + "80bf003f").ljust(2 * 4096, "0")
    index = (tmp_path / "t/index.bin").read_bytes()
    assert index[48:88].hex() == "".join(n.to_bytes(8, "little").hex() for n in (1, 1, 0, 64, 2))
    assert index[4096:].hex() == BUCKET
    sums = (tmp_path / "t/checksums.bin").read_bytes()
    assert sums[48:88].hex() == "".join(n.to_bytes(8, "little").hex() for n in (1, 1, 4096, 0, 0))
    assert sums[4096:].hex() == SUMS
    errors = (tmp_path / "t/row_errors.bin").read_bytes()
    assert errors.hex() == "00000000" + "46e2643a"  # 2^-10 / |(-1, 0.5009765625)|
    assert manifest["row_error"] == {"max": 0.0008731227135285735, "rms": 0.0006173909915440537}


BUCKET = (
    "23b6a80833f20537"
    "56f93444ae6f7a53"
    + "00"
    * 24  # fingerprints of rows 0 and 1, three empty slots
    + "00000000"
    "01000000"
    + "ffffffff" * 3  # rows
    + "00ec5867"  # no flags; check bits
)
SUMS = "bae2421d5a6d8017"  # of the one bucket, of both rows


@pytest.mark.parametrize(
    ("codec", "dtype", "rms"),
    [
        ("raw", "float32", 0.0),
        ("raw", "bfloat16", 0.0017),
        ("int8", "bfloat16", 0.0064),
        ("int4", "bfloat16", 0.097),
        ("fp8", "bfloat16", 0.0265),
    ],
)
def test_the_manifest_states_the_error_of_the_rows(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable, codec: str, dtype: str, rms: float
) -> None:
    """Of normal rows: against the figures that other measurements of these codecs gave."""
    table = write_table(tmp_path / "t", zipf_fgrams, codec=codec, dtype=dtype)
    files = open_table_files(table)
    stated = files.manifest.row_error
    computed = torch.randn(len(zipf_fgrams), 64, generator=torch.Generator().manual_seed(0))
    stored = torch.from_numpy(files.read_pages(0, len(files.page_sums)).reshape(len(zipf_fgrams), -1))
    decoded = files.manifest.row_codec.decode_reference(stored).float()
    errors = (decoded - computed).norm(dim=1) / computed.norm(dim=1)
    assert stated.max == pytest.approx(float(errors.max()), rel=1e-4)
    assert stated.rms == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-4)
    assert stated.rms == pytest.approx(rms, rel=0.1)
    assert np.fromfile(table / "row_errors.bin", "<f4") == pytest.approx(errors.numpy(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_give_same_bytes_however_they_were_appended(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable, backend: str
) -> None:
    whole = write_table(tmp_path / "whole", zipf_fgrams, backend=backend)
    rows = torch.randn(len(zipf_fgrams), 64, generator=torch.Generator().manual_seed(0))
    hashes: dict[str, Any] = {**HASHES}
    for first, last in ((0, 1), (1, 1000), (1000, len(zipf_fgrams))):
        writer = TableWriter.create(
            tmp_path / "parts", zipf_fgrams, dim=64, dtype="bfloat16", backend=backend, **hashes
        )
        assert writer.num_rows_done == first
        writer.append(rows[first:last])
        if last < len(zipf_fgrams):
            writer.close()
    writer.finish()
    assert digests(tmp_path / "parts") == digests(whole)


KILLS = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from scone.model_store.fgram_set import FGramSet
    from scone.model_store import table_writer

    torch.set_num_threads(1)  # so that fork is safe
    table_writer._BYTES_PER_SYNC = 1 << 12
    fgrams, out = FGramSet.load(sys.argv[1]), Path(sys.argv[2])
    rows = torch.randn(len(fgrams), 64, generator=torch.Generator().manual_seed(0))

    def build():
        writer = table_writer.TableWriter.create(
            out, fgrams, dim=64, dtype="bfloat16", backend=sys.argv[3],
            model_hash="6d" * 32, tokenizer_hash="74" * 32,
        )
        for first in range(writer.num_rows_done, len(fgrams), 16):
            writer.append(rows[first : first + 16])
        writer.finish()

    num_kills, seconds = 0, 0.0
    while not out.exists():
        pid = os.fork()
        if pid == 0:
            build()
            os._exit(0)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        num_kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert out.exists() or Path(str(out) + ".partial").exists() or seconds < 0.01
        seconds += 0.007
    print(num_kills)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_at_any_moment_there_is_no_table_or_a_whole_one(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable, backend: str
) -> None:
    """A builder is killed after ever longer times until one run gets through: it resumed all the others."""
    expected = digests(write_table(tmp_path / "whole", zipf_fgrams, backend=backend))
    zipf_fgrams.save(tmp_path / "set.fgrams")
    command = [sys.executable, "-c", textwrap.dedent(KILLS)]
    command += [str(tmp_path / "set.fgrams"), str(tmp_path / "killed"), backend]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=200)
    assert int(done.stdout) >= 3
    assert digests(tmp_path / "killed") == expected


def test_an_unfinished_build_is_no_table(tmp_path: Path, zipf_fgrams: FGramSet) -> None:
    inputs: dict[str, Any] = {"dim": 64, "dtype": "float32", **HASHES}
    with TableWriter.create(tmp_path / "t", zipf_fgrams, **inputs) as writer:
        writer.append(torch.zeros(5, 64))
    with pytest.raises(TableError, match="is incomplete"):
        open_table_files(tmp_path / "t")


def test_killed_between_manifest_and_rename_is_published_by_the_next_run(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable
) -> None:
    expected = digests(write_table(tmp_path / "t", zipf_fgrams))
    (tmp_path / "t").rename(tmp_path / "t.partial")
    (tmp_path / "t.partial/rows_done.json").write_text("{}")
    assert digests(write_table(tmp_path / "t", zipf_fgrams)) == expected


def test_a_build_with_other_inputs_or_a_second_one_is_refused(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable
) -> None:
    inputs: dict[str, Any] = {"dim": 64, **HASHES}
    first = TableWriter.create(tmp_path / "t", zipf_fgrams, dtype="float32", **inputs)
    with pytest.raises(TableError, match="another build"):
        TableWriter.create(tmp_path / "t", zipf_fgrams, dtype="float32", **inputs)
    first.close()
    with pytest.raises(TableError, match="dtype was float32, is bfloat16"):
        TableWriter.create(tmp_path / "t", zipf_fgrams, dtype="bfloat16", **inputs)
    with pytest.raises(TableError, match="counted with tokenizer"):
        TableWriter.create(
            tmp_path / "u", zipf_fgrams, dim=64, dtype="float32", model_hash="6d", tokenizer_hash="75" * 32
        )
    write_table(tmp_path / "v", zipf_fgrams)
    with pytest.raises(TableError, match="exists"):
        write_table(tmp_path / "v", zipf_fgrams)


def test_rows_that_cannot_be_are_refused(tmp_path: Path, fgram_set: MakeSet) -> None:
    inputs: dict[str, Any] = {"dim": 4, "dtype": "float32", **HASHES}
    with pytest.raises(TableError, match="empty"):
        TableWriter.create(tmp_path / "t", fgram_set({}), **inputs)
    with TableWriter.create(tmp_path / "t", fgram_set({(1, 2): 3}), **inputs) as writer:
        with pytest.raises(ValueError, match="wanted"):
            writer.append(torch.zeros(1, 5))
        with pytest.raises(TableError, match="not finite"):
            writer.append(torch.full((1, 4), torch.nan))
        with pytest.raises(TableError, match="has 0 rows, wanted 1"):
            writer.finish()
        with pytest.raises(ValueError, match="for 1 f-grams"):
            writer.append(torch.zeros(2, 4))


def test_any_lmdb_reader_reads_the_rows(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable
) -> None:
    """As FORMAT.md tells others to: big-endian block number, then a place in the block."""
    flat = write_table(tmp_path / "flat", zipf_fgrams)
    table = write_table(tmp_path / "table", zipf_fgrams, backend="lmdb")
    manifest = TableManifest.read(table)
    rows = np.fromfile(flat / "rows.bin", np.uint8, offset=4096)[: manifest.stream_bytes]
    with (
        lmdb.open(str(table / "rows.lmdb"), subdir=False, readonly=True, lock=False) as env,
        env.begin() as txn,
    ):
        for row in (0, 1, manifest.rows_per_block - 1, manifest.rows_per_block, manifest.num_fgrams - 1):
            block, place = divmod(row, manifest.rows_per_block)
            value = txn.get(block.to_bytes(8, "big"))
            assert value is not None
            begin = place * manifest.row_bytes
            stored = value[begin : begin + manifest.row_bytes]
            assert stored == rows[row * manifest.row_bytes :][: manifest.row_bytes].tobytes()


@pytest.mark.parametrize("dim", [576, 2048, 4096])
def test_lmdb_costs_at_most_two_percent(dim: int) -> None:
    """By its page arithmetic, at 16 bits; the file itself is measured below."""
    row_bytes = 2 * dim
    rows = lmdb_rows.rows_per_block(row_bytes, 10**9)
    pages = -(-(rows * row_bytes + 16) // 4096)
    assert (pages * 4096 + 27) / (rows * row_bytes) <= 1.02


@pytest.mark.parametrize("dim", [576, 2048, 4096])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_on_disk_cost_at_most_two_percent(
    tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable, backend: str, dim: int
) -> None:
    """One row of 4096 or 8192 bytes to a key, LMDB would take twice or one and a half times their size."""
    table = write_table(tmp_path / "t", zipf_fgrams, dim=dim, backend=backend)
    manifest = TableManifest.read(table)
    stored = rows_file(table).stat().st_size + (table / "checksums.bin").stat().st_size
    stored += (table / "blocks.bin").stat().st_size if backend == "lmdb" else 0
    assert stored <= 1.02 * manifest.stream_bytes + 64 * 1024


def test_missing_truncated_and_grown_files_are_named(copy: Path) -> None:
    for name in TableManifest.read(copy).files:
        path = copy / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(TableError, match=rf"{name} is missing"):
            open_table_files(copy)
        path.write_bytes(content[:-1])
        with pytest.raises(TableError, match=rf"{name} is truncated"):
            open_table_files(copy)
        path.write_bytes(content + b"\0")
        with pytest.raises(TableError, match=rf"{name} is too long"):
            open_table_files(copy)
        path.write_bytes(content)
    verify_table_files(open_table_files(copy))
    (copy / "manifest.json").unlink()
    with pytest.raises(TableError, match=r"holds no manifest\.json"):
        open_table_files(copy)
    with pytest.raises(TableError, match="there is no table"):
        open_table_files(copy / "nowhere")


def test_a_flipped_bit_anywhere_is_found(copy: Path) -> None:
    """Every file, at its start, its end, and places between; in LMDB's own pages only what leads to rows."""
    manifest = TableManifest.read(copy)
    for name in ["manifest.json", *manifest.files]:
        content = (copy / name).read_bytes()
        used = len(content) if name != "rows.bin" else 4096 + manifest.stream_bytes
        places = np.random.default_rng(3).integers(0, used, 12).tolist()
        if name == "rows.lmdb":
            offsets = open_table_files(copy).block_offsets
            places = [int(o) + p % 1000 for o, p in zip(offsets[:12], places, strict=False)]
        elif name in ("rows.bin", "index.bin", "checksums.bin"):
            # only the first 128 bytes of a header mean something
            places = [p for p in places if p >= 4096] + [0, 8, 17, 50, 124]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            (copy / name).write_bytes(damaged)
            with pytest.raises(TableError):
                verify_table_files(open_table_files(copy))
        (copy / name).write_bytes(content)


def test_files_of_another_table_are_refused(
    copy: Path, tmp_path: Path, zipf_fgrams: FGramSet, write_table: WriteTable
) -> None:
    """Same set and shape, another model: sizes agree, identities do not."""
    backend = TableManifest.read(copy).backend
    hashes: dict[str, Any] = {"model_hash": "99" * 32, "tokenizer_hash": "74" * 32}
    writer = TableWriter.create(
        tmp_path / "other", zipf_fgrams, dim=64, dtype="bfloat16", backend=backend, **hashes
    )
    writer.append(torch.ones(len(zipf_fgrams), 64))
    writer.finish()
    for name in ("index.bin", "checksums.bin", rows_file(copy).name):
        content = (copy / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, copy / name)
        with pytest.raises(TableError, match=r"another table|does not fit"):
            open_table_files(copy)
        (copy / name).write_bytes(content)


def test_another_format_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for version in (1, 99):
        (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": version}))
        with pytest.raises(TableError, match=f"format version {version}, .* build the table again"):
            open_table_files(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(TableError, match="no manifest"):
        open_table_files(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(TableError, match="is damaged"):
        open_table_files(copy)


def test_opening_reads_headers_only(table: Path) -> None:
    before = time.perf_counter()
    files = open_table_files(table)
    assert time.perf_counter() - before < 1.0
    assert not files.rows.flags.writeable
