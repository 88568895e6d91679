"""The store of recycled states: what is written is read, by anybody, or it is a miss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_record import state_key
from scone.cache.recycled_store import RecycledStore
from tests.cache.damage import flip_bit

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


def test_a_flipped_bit_on_disk_is_a_miss_and_a_counter(tmp_path: Path) -> None:
    with RecycledStore.open(tmp_path, CONFIG, MemoryBudget(0)) as store:
        store.write("blocks", key(0), IDS, payload(0), cost_seconds=1)
        assert store.flush(10)
        assert flip_bit(tmp_path, payload(0)[100:164].tobytes())
        assert store.read("blocks", key(0), IDS) is None
        assert store.stats.damaged["blocks", "checksum"] == 1
        assert store.stats.misses["blocks"] == 1
        assert store.find("blocks", [key(0)]) == 0, "it is gone, and can be written again"
        assert store.write("blocks", key(0), IDS, payload(0), cost_seconds=1)
        assert store.flush(10)
        assert store.read("blocks", key(0), IDS) is not None


def test_a_flipped_bit_in_memory_is_noticed_and_the_disk_helps(tmp_path: Path) -> None:
    with RecycledStore.open(tmp_path, CONFIG, MemoryBudget(1 << 20)) as store:
        store.write("blocks", key(0), IDS, payload(0), cost_seconds=1)
        assert store.flush(10)
        assert store.locate("blocks", [key(0)]) == ["ram"]
        held = next(iter(store._ram._entries.values())).record.payload
        held.setflags(write=True)
        held[7] ^= 64
        found = store.read("blocks", key(0), IDS)
        assert found is not None
        assert (found == payload(0)).all()
        assert store.stats.damaged["blocks", "checksum"] == 1
        assert store.stats.hits["blocks", "disk"] == 1


def test_a_full_queue_drops_and_ends_each_write_once() -> None:
    config = RecycledConfig(queue_length=4)
    with RecycledStore.open(None, config, MemoryBudget(8 << 20)) as store:
        under_way, go_on = threading.Event(), threading.Event()
        ended: list[int] = []

        def slow() -> np.ndarray:
            under_way.set()
            assert go_on.wait(10)
            return payload(0)

        def write(number: int, what: Callable[[], np.ndarray]) -> bool:
            return store.write(
                "blocks", key(number), IDS, what, cost_seconds=1, on_done=lambda: ended.append(number)
            )

        assert write(0, slow)
        assert under_way.wait(10)
        began = time.monotonic()
        taken = [write(number, lambda: payload(1)) for number in range(1, 8)]
        assert time.monotonic() - began < 1, "nobody waits"
        assert taken == [True] * 4 + [False] * 3
        assert sorted(ended) == [5, 6, 7], "those dropped are over, those that wait are not"
        go_on.set()
        assert store.flush(10)
        assert sorted(ended) == list(range(8))
        assert store.stats.writes["blocks", "dropped"] == 3
        assert store.find("blocks", [key(number) for number in range(8)]) == 5


def test_payloads_are_asked_for_only_where_wanted_and_may_fail() -> None:
    with RecycledStore.open(None, CONFIG, MemoryBudget(8 << 20)) as store:
        ended: list[str] = []

        def never() -> np.ndarray:
            raise AssertionError("the state is held already")

        def broken() -> np.ndarray:
            raise RuntimeError("the device is gone")

        store.write("results", key(0), IDS, payload(0), cost_seconds=1, on_done=lambda: ended.append("a"))
        assert store.flush(10)
        store.write("results", key(0), IDS, never, cost_seconds=1, on_done=lambda: ended.append("b"))
        store.write("results", key(1), IDS, broken, cost_seconds=1, on_done=lambda: ended.append("c"))
        store.write("results", key(2), IDS, payload(2), cost_seconds=1, on_done=lambda: ended.append("d"))
        assert store.flush(10)
        assert ended == ["a", "b", "c", "d"]
        assert store.stats.writes["results", "held"] == 1
        assert store.stats.writes["results", "failed"] == 1
        assert store.find("results", [key(2)]) == 1


def test_closing_ends_what_waits() -> None:
    store = RecycledStore.open(None, CONFIG, MemoryBudget(8 << 20))
    go_on, ended = threading.Event(), list[int]()
    for number in range(3):
        store.write(
            "blocks",
            key(number),
            IDS,
            lambda: (go_on.wait(10), payload(0))[1],
            cost_seconds=1,
            on_done=lambda number=number: ended.append(number),  # type: ignore[misc]
        )
    threading.Timer(0.2, go_on.set).start()
    store.close()
    assert sorted(ended) == [0, 1, 2]
    assert not store.write("blocks", key(9), IDS, payload(9), cost_seconds=1)


def test_states_used_often_stay_on_disk(tmp_path: Path) -> None:
    """Uses are noted on disk by the writer's thread, also those that memory served."""
    now = [1e9]
    memory = MemoryBudget(64 << 20)
    with RecycledStore.open(tmp_path, CONFIG, memory, lambda: now[0]) as store:
        for number in range(60):
            store.write("blocks", key(number), IDS, payload(number, 500_000), cost_seconds=1)
            assert store.flush(10)
        for _ in range(5):
            assert store.read("blocks", key(3), IDS) is not None
        now[0] += 10
        time.sleep(0.5)  # the writer's round
        for number in range(60, 220):
            now[0] += 1
            store.write("blocks", key(number), IDS, payload(number, 500_000), cost_seconds=1)
            assert store.flush(10)
        assert store._disk is not None
        assert store.stats.evictions["blocks", "disk"] > 50
        held = store._disk.held([state_key("blocks", key(number)) for number in range(6)])
        assert held == [False, False, False, True, False, False]
