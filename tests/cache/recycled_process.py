"""Other processes that use a store: `python recycled_process.py FOLDER SEED SECONDS DISK_BYTES [shrink]`.

Writes states whose bytes follow from their number, reads those of others, and fails if one is wrong. With
`crash`, SECONDS is the number of rounds: in each, three children do so and are killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_store import RecycledStore

NUM_STATES = 600
NUM_DISK_HITS = 21
"""However slow the machine is, at least so many states are read from the disk before the end."""
_BYTES = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)


def state(number: int) -> tuple[bytes, NDArray[np.int32], NDArray[np.uint8]]:
    """Key, token ids and payload of a state; sizes as of results and blocks."""
    rng = random.Random(number)
    num_bytes = rng.choice((300, 2304, 20_000, 250_000, 500_000))
    begin = rng.randrange(4096)
    key = number.to_bytes(4, "big") * 8
    return key, np.arange(number, number + 16, dtype=np.int32), _BYTES[begin : begin + num_bytes]


def check(store: RecycledStore, number: int) -> bool:
    """Whether the state was there; raises AssertionError if it was wrong."""
    key, token_ids, payload = state(number)
    found = store.read("blocks", key, token_ids)
    assert found is None or np.array_equal(found, payload), f"state {number} has wrong bytes"
    return found is not None


def crash(folder: str, seed: str, rounds: str, disk_bytes: str) -> None:
    """Kills children at random moments: while they open the store, write, read, shrink or clear it."""
    rng = random.Random(int(seed))
    for _ in range(int(rounds)):
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                run(folder, str(rng.random()), "60", disk_bytes, "shrink")
                os._exit(1)
            children.append(child)
            rng.random()
        time.sleep(rng.uniform(0.02, 0.5))
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "a child ended by itself"
            assert os.WTERMSIG(status) == signal.SIGKILL


def run(folder: str, seed: str, seconds: str, disk_bytes: str, *words: str) -> None:
    rng = random.Random(seed)
    config = RecycledConfig(disk_bytes=int(disk_bytes))
    end = time.monotonic() + float(seconds)
    num_hits = 0
    with RecycledStore.open(Path(folder), config, MemoryBudget(2 << 20)) as store:
        print("open", flush=True)
        while time.monotonic() < end or store.stats.hits["blocks", "disk"] < NUM_DISK_HITS:
            key, token_ids, payload = state(rng.randrange(NUM_STATES))
            store.write("blocks", key, token_ids, payload, cost_seconds=rng.random())
            num_hits += check(store, rng.randrange(NUM_STATES))
            if "shrink" in words and rng.random() < 0.01:
                store.set_budgets(disk_bytes=int(int(disk_bytes) * rng.choice((0.7, 1.0))))
                if rng.random() < 0.1:
                    store.clear()
        assert store.flush(60)
        damaged = sum(store.stats.damaged.values()) + store.stats.damaged_files
        disk_hits = store.stats.hits["blocks", "disk"]
        failed = store.stats.writes["blocks", "failed"]
    print(f"hits {num_hits} disk {disk_hits} damaged {damaged} failed {failed}")


if __name__ == "__main__":
    if sys.argv[-1] == "crash":
        crash(*sys.argv[1:-1])
    else:
        run(*sys.argv[1:])
