"""What the kernel may refuse (io_uring, locked memory, huge pages, direct reads): same rows without it."""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scone.cache import FGramTable, TableConfig
from scone.cache.direct_reader import DirectReader
from scone.kernels.disk_read import uring_available
from scone.model_store.fgram_set import FGramSet

WriteTable = Callable[..., Path]

READ = """
    import logging, sys
    import numpy as np
    from scone.cache import FGramTable, TableConfig
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    expected = FGramTable.open(sys.argv[1]).rows(np.arange(3000))
    with FGramTable.open(sys.argv[1], TableConfig(disk_reader="direct")) as table:
        for _ in range(3):
            assert (table.rows(np.arange(3000)) == expected).all()
        print(table._row_tiers.disk.method)
"""

# A seccomp filter as containers have one: io_uring_setup (425 on every architecture) fails with EPERM.
FORBID_IO_URING = """
    import ctypes, struct
    def instruction(code, jump_if, jump_else, k):
        return struct.pack("HBBI", code, jump_if, jump_else, k)
    filter = (instruction(0x20, 0, 0, 0)                # load the number of the system call
              + instruction(0x15, 0, 1, 425)            # is it io_uring_setup?
              + instruction(0x06, 0, 0, 0x00050000 | 1) # yes: EPERM
              + instruction(0x06, 0, 0, 0x7fff0000))    # no: allowed
    code = ctypes.create_string_buffer(filter)
    program = struct.pack("HxxxxxxP", len(filter) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0               # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program) == 0               # PR_SET_SECCOMP, filter
"""

NO_LOCKED_MEMORY = """
    import resource
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_table: WriteTable) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t", zipf_fgrams, dim=97)


def read_after(preparation: str, table: Path) -> tuple[str, str]:
    """How the rows were read in a process of its own, and its log."""
    program = textwrap.dedent(preparation) + textwrap.dedent(READ)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(table)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip(), done.stderr


def test_where_io_uring_is_forbidden_threads_read(table: Path) -> None:
    method, log = read_after(FORBID_IO_URING, table)
    assert method == "pread"
    assert "io_uring is not available" in log


def test_without_locked_memory_rows_are_read_all_the_same(table: Path) -> None:
    method, _ = read_after(NO_LOCKED_MEMORY, table)
    # older kernels charge rings to RLIMIT_MEMLOCK, which root may exceed
    assert method in ("io_uring", "pread")
    if uring_available() and os.geteuid() == 0:
        assert method == "io_uring"


def test_without_huge_pages_the_ram_tier_takes_ordinary_ones(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OrdinaryPages(mmap.mmap):
        def madvise(self, option: int, *rest: int) -> None:
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(22, "Invalid argument")
            super().madvise(option, *rest)

    expected = FGramTable.open(table).rows(np.arange(3000))
    monkeypatch.setattr("scone.cache.huge_pages.mmap.mmap", OrdinaryPages)
    caplog.set_level(logging.INFO)
    with FGramTable.open(table, TableConfig(ram_bytes=1 << 30)) as resident:
        assert resident.wait_loaded(30)
        assert torch.equal(resident.rows(np.arange(3000)), expected)
    assert "no huge pages" in caplog.text


def test_without_direct_reads_the_page_cache_serves(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = FGramTable.open(table).rows(np.arange(3000))
    plain = os.open

    def refuse_direct(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr("scone.cache.direct_reader.os.open", refuse_direct)
    caplog.set_level(logging.INFO)
    with FGramTable.open(table, TableConfig(disk_reader="direct")) as direct:
        assert isinstance(direct._row_tiers.disk, DirectReader)
        assert torch.equal(direct.rows(np.arange(3000)), expected)
    assert "using the page cache" in caplog.text
