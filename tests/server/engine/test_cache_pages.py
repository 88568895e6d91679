"""The pages of a tensor's memory, given before they are used."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch

from scone.server.engine.cache_pages import CachePages


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_pages_are_there_before_their_use_and_keep_what_is_in_them() -> None:
    memory = torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8)  # never memory that was used before
    memory[5_000_000] = 7
    before = resident_bytes()
    pages = CachePages(memory[3:])
    pages.start()
    assert pages.wait(60)
    assert resident_bytes() - before > 50 << 20
    assert int(memory[5_000_000]) == int(memory.sum()) == 7
    pages.stop()


def test_stopping_ends_it_at_once() -> None:
    pages = CachePages(torch.from_numpy(np.zeros(1 << 30, np.uint8)))
    pages.stop()  # before it began
    before = resident_bytes()
    pages.start()
    pages.stop()
    assert resident_bytes() - before < 64 << 20
