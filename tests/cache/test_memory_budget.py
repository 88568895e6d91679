"""A table far larger than its budget starts at once and stays inside it, under a limit of the kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scone.model_store.fgram_set import FGramSet

SERVE_UNDER_LIMIT = """
import resource, sys, time
import numpy as np
import torch
from scone.cache import FGramTable, TableConfig

path, ram_bytes, disk_reader, room = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
FGramTable.open(path).rows(range(256))  # everything is imported and has run once,
torch.zeros(1 << 22).add_(1)  # and torch's threads have their stacks
data = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
began = time.perf_counter()
table = FGramTable.open(path, TableConfig(ram_bytes=ram_bytes, disk_reader=disk_reader))
first = table.rows([table.num_fgrams - 1])
assert time.perf_counter() - began < 1
assert table.wait_loaded(30)
ids = np.random.default_rng(0).permutation(table.num_fgrams)
for begin in range(0, len(ids), 128):
    part = ids[begin : begin + 128]
    rows = table.rows(part)
    assert torch.equal(rows[:, 0], torch.from_numpy(part % 128).bfloat16())
print("served", {tier.name: tier.num_rows for tier in table.tiers})
"""
ROW_VALUES = 16384
LIMIT = 96 << 20
"""Half of it would do; stacks and arenas of threads count too."""


@pytest.fixture(scope="module")
def path(
    tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_rows: Callable[..., Path]
) -> Path:
    """Some 3,600 rows of 32 KiB: more than 100 MiB."""
    path = write_rows(tmp_path_factory.mktemp("budget") / "table", zipf_fgrams, ROW_VALUES)
    assert (path / "rows.bin").stat().st_size > LIMIT
    return path


def serve(path: Path, ram_bytes: int, disk_reader: str) -> subprocess.CompletedProcess[str]:
    words = [str(path), str(ram_bytes), disk_reader, str(LIMIT)]
    return subprocess.run(
        [sys.executable, "-c", SERVE_UNDER_LIMIT, *words], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("disk_reader", ["mmap", "direct"])
def test_a_table_larger_than_its_budget_is_served_inside_it(path: Path, disk_reader: str) -> None:
    result = serve(path, 4 << 20, disk_reader)
    assert result.returncode == 0, result.stderr
    # room for 128 rows; the index takes that of two
    assert "served {'ram': 126, 'disk'" in result.stdout


def test_the_limit_would_notice(path: Path) -> None:
    result = serve(path, 1 << 40, "mmap")
    assert result.returncode != 0
    assert "Cannot allocate memory" in result.stderr
