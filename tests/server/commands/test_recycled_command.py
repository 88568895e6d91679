"""`scone recycled` beside a server that has the store open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_header import HEADER_NAME
from scone.cache.recycled_stats import Kind
from scone.cache.recycled_store import RecycledStore
from scone.server.cli import main

IDS = np.arange(16, dtype=np.int32)
PAYLOAD = np.zeros(50_000, np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecycledStore]:
    config = RecycledConfig(disk_bytes=64 << 20)
    with RecycledStore.open(tmp_path / "store", config, MemoryBudget(0)) as store:
        for number in range(6):
            kind: Kind = "blocks" if number < 4 else "results"
            store.write(kind, bytes([number]) * 32, IDS, PAYLOAD, cost_seconds=1)
        assert store.flush(30)
        yield store


def scone(*words: str) -> str:
    """In another process, as LMDB wants it."""
    command = [sys.executable, "-m", "scone.server.cli", "recycled", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_stats_and_clear_beside_a_running_server(store: RecycledStore, tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    facts = json.loads(scone("stats", path, "--json"))
    assert facts["blocks"] == {"entries": 4, "payload_bytes": 4 * len(PAYLOAD)}
    assert facts["results"] == {"entries": 2, "payload_bytes": 2 * len(PAYLOAD)}
    assert facts["disk_bytes"] == 64 << 20
    assert 6 * len(PAYLOAD) < facts["file_bytes"] < 4 << 20
    assert scone("clear", path, "--kind", "results").endswith("2 states removed\n")
    assert store.find("results", [bytes([4]) * 32]) == 0
    assert store.find("blocks", [bytes([number]) * 32 for number in range(4)]) == 4
    assert scone("clear", path).endswith("4 states removed\n")
    assert store.read("blocks", bytes(32), IDS) is None
    assert store.write("blocks", bytes(32), IDS, PAYLOAD, cost_seconds=1)
    assert store.flush(30)
    assert store.read("blocks", bytes(32), IDS) is not None
    assert "blocks                1 states" in scone("stats", path)
    assert "of 100,000,000 bytes" in scone("resize", path, "--disk-bytes", "100MB")
    assert store._disk is not None
    assert store._disk.disk_bytes == 100_000_000
    assert store.read("blocks", bytes(32), IDS) is not None


def test_what_is_no_store_is_not_made_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recycled", "stats", str(tmp_path / "nowhere")]) == 1
    assert "there is no store of recycled states" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    RecycledStore.open(tmp_path, RecycledConfig(disk_bytes=64 << 20), MemoryBudget(0)).close()
    assert main(["recycled", "resize", str(tmp_path)]) == 2
    assert "disk_bytes is missing" in capsys.readouterr().err


def test_clear_removes_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "store"
    RecycledStore.open(path, RecycledConfig(disk_bytes=64 << 20), MemoryBudget(0)).close()
    (path / "mine.txt").write_text("stays")
    header = bytearray((path / HEADER_NAME).read_bytes())
    header[16] = 7
    (path / HEADER_NAME).write_bytes(header)
    assert main(["recycled", "stats", str(path)]) == 1
    assert "format version 7" in capsys.readouterr().err
    assert main(["recycled", "clear", str(path)]) == 0
    assert [file.name for file in path.iterdir()] == ["mine.txt"]
