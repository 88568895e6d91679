"""Memory that is populated is resident, and holds what it held."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.server.engine.host_pages import populate


def resident_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def zeros(num_bytes: int) -> Tensor:
    return torch.from_numpy(np.zeros(num_bytes, np.uint8))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_are_there_before_they_are_written_to() -> None:
    memory = zeros(64 << 20)
    memory[5 << 20] = 7
    before = resident_bytes()
    if not populate(memory):
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    assert resident_bytes() - before > 50 << 20
    assert memory[5 << 20] == 7
    assert memory.sum() == 7


def test_less_than_a_page() -> None:
    memory = zeros(100)
    populate(memory)
    assert not memory.any()
