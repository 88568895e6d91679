"""The store of recycled states: what is written is read, by anybody, or it is a miss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_store import RecycledStore

CONFIG = RecycledConfig(disk_bytes=64 << 20)
IDS = np.arange(16, dtype=np.int32)


def key(number: int) -> bytes:
    return np.random.default_rng(number).bytes(32)


def payload(number: int, num_bytes: int = 5000) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, num_bytes, np.uint8)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_written_is_read(tmp_path: Path, on_disk: bool) -> None:
    with RecycledStore.open(tmp_path / "s" if on_disk else None, CONFIG, MemoryBudget(1 << 20)) as store:
        done = []
        for number in range(3):
            assert store.write(
                "blocks", key(number), IDS, payload(number), cost_seconds=1, on_done=lambda: done.append(1)
            )
        assert store.flush(10)
        assert len(done) == 3
        assert store.find("blocks", [key(0), key(1), key(2), key(3)]) == 3
        assert store.find("blocks", [key(3), key(0)]) == 0
        assert store.find("results", [key(0)]) == 0
        out = np.empty(5000, np.uint8)
        assert store.read("blocks", key(1), IDS, out) is out
        assert (out == payload(1)).all()
        assert store.read("blocks", key(3), IDS) is None
        assert store.read("blocks", key(1), IDS + 1) is None
        assert store.stats.damaged["blocks", "token_ids"] == 1


def test_states_outlive_the_process(tmp_path: Path) -> None:
    with RecycledStore.open(tmp_path, CONFIG, MemoryBudget(1 << 20)) as store:
        store.write("results", key(0), b"text", lambda: payload(0), cost_seconds=1)
        assert store.flush(10)
    with RecycledStore.open(tmp_path, CONFIG, MemoryBudget(0)) as store:
        found = store.read("results", key(0), b"text")
        assert found is not None
        assert (found == payload(0)).all()
        assert store.stats.hits["results", "disk"] == 1
