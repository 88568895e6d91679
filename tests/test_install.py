"""The package as others install it: as a wheel, with a C++ compiler and without one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "model_store", "cache", "server")


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
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
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
