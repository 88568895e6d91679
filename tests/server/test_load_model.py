"""What loading leaves behind."""

from __future__ import annotations

import ctypes
import re
import threading
from pathlib import Path

import pytest

from scone.server.load_model import return_freed_memory

STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    [kibibytes] = re.findall(r"^RssAnon:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return int(kibibytes) * 1024


@pytest.mark.skipif(
    not STATUS.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not Linux with glibc"
)
def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks of a thread's own, freed in front of one that is still in use."""
    kept: list[bytes] = []

    def allocate_and_free() -> None:
        blocks = [bytes([i % 255 + 1]) * (64 << 10) for i in range(1600)]
        kept.append(blocks[-1])

    thread = threading.Thread(target=allocate_and_free)
    thread.start()
    thread.join()
    held = anonymous_bytes()
    return_freed_memory()
    assert held - anonymous_bytes() > 64 << 20
    assert kept[0][0]
