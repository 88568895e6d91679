"""The package as others install it: as a wheel, and without a C++ compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scone.model_store.fgram_set import FGramSet

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "model_store", "cache", "server")

# Writes a table, matches and reads it, and prints a hash of all bytes that came of it.
LIFE_OF_A_TABLE = """
import hashlib, sys
from pathlib import Path
if sys.argv[1] == "oracles":
    sys.modules["scone.kernels._native"] = None  # what an install without a compiler looks like
import torch
from scone.cache import FGramTable
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_writer import TableWriter

fgrams, out = FGramSet.load(Path(sys.argv[2])), Path(sys.argv[3])
hashes = {"model_hash": "6d" * 32, "tokenizer_hash": fgrams.tokenizer_hash}
writer = TableWriter.create(out, fgrams, dim=64, dtype="bfloat16", codec="int8", **hashes)
writer.append(torch.randn(len(fgrams), 64, generator=torch.Generator().manual_seed(0)))
writer.finish()
digest = hashlib.sha256()
for path in sorted(out.iterdir()):
    digest.update(path.read_bytes())
with FGramTable.open(out) as table:
    row_ids, matched_len = table.match(fgrams.tokens[fgrams.tokens >= 0][:1000])
    assert (matched_len > 1).any()
    for array in (row_ids, matched_len, table.rows(row_ids).float().numpy()[row_ids >= 0]):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


def life_of_a_table(kernels: str, fgrams: Path, out: Path) -> tuple[str, str]:
    """The hash and the log of a process that runs on "native" kernels or on "oracles"."""
    command = [sys.executable, "-c", LIFE_OF_A_TABLE, kernels, str(fgrams), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_without_the_extension_the_same_bytes_and_one_warning(zipf_fgrams: FGramSet, tmp_path: Path) -> None:
    zipf_fgrams.save(tmp_path / "set.fgrams")
    native, silence = life_of_a_table("native", tmp_path / "set.fgrams", tmp_path / "native")
    oracles, warning = life_of_a_table("oracles", tmp_path / "set.fgrams", tmp_path / "oracles")
    assert native == oracles
    assert silence == ""
    assert warning.count("native kernels are not available") == 1


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of this tree, built in isolation."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for floor in FLOORS:
        shutil.copytree(
            ROOT / floor, source / floor, ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo")
        )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    command += [str(folder), str(source)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.heavy
@pytest.mark.parametrize("compiler", ["", "/bin/false"])
def test_wheel(compiler: str, tmp_path: Path) -> None:
    environment = {"CC": compiler, "CXX": compiler} if compiler else {}
    wheel = build_wheel(tmp_path, **environment)
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.endswith(".so")]) == (0 if compiler else 1)
    assert all(name.startswith(("scone/", "scone_serve-")) for name in names)
