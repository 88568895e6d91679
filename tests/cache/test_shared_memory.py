"""One budget for rows, states and fixed parties: never exceeded, given to whoever saves most time with it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.cache import FGramTable, TableConfig
from scone.cache.errors import CacheError
from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_ram import ENTRY_BYTES, RecycledRam
from scone.cache.recycled_record import Record, kind_of, state_key
from scone.cache.recycled_stats import RecycledStats
from scone.cache.recycled_store import RecycledStore
from scone.cache.row_worth import RowWorth
from scone.cache.state_worth import Worth, clock_of_memory, seconds_per_second
from scone.model_store.fgram_set import FGramSet

DIM = 512


class Clock:
    def __init__(self) -> None:
        self.now = 1.7e9

    def __call__(self) -> float:
        return self.now


def record(number: int, num_bytes: int) -> Record:
    name = state_key("blocks", number.to_bytes(4, "big") * 8)
    return Record.make(name, b"ids", np.full(num_bytes, number % 251, np.uint8))


@pytest.fixture(scope="module")
def table_path(
    tmp_path_factory: pytest.TempPathFactory, zipf_fgrams: FGramSet, write_rows: Callable[..., Path]
) -> Path:
    """Some 3,600 rows of 1 KiB."""
    return write_rows(tmp_path_factory.mktemp("shared") / "table", zipf_fgrams, DIM)


class LinearRam:
    """What RecycledRam does, in the plainest way: evict the least score of all, one after the other."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, dict[bytes, tuple[float, int]]()

    def put(self, name: bytes, score: float, num_bytes: int) -> None:
        self.held.pop(name, None)
        if num_bytes > self.total:
            return
        while sum(size for _, size in self.held.values()) + num_bytes > self.total:
            least = min(self.held, key=lambda name: self.held[name][0])
            if self.held[least][0] >= score:
                return
            del self.held[least]
        self.held[name] = (score, num_bytes)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "get", "fixed", "release", "resize", "discard"]),
        st.integers(0, 12),
        st.integers(0, 30_000),
        st.floats(0.001, 10),
    ),
    max_size=60,
)


@given(OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_the_budget_is_never_exceeded(operations: list[tuple[str, int, int, float]]) -> None:
    clock = Clock()
    budget = MemoryBudget(100_000)
    ram = RecycledRam(budget, RecycledStats(), clock)
    fixed = budget.join("fixed")
    for operation, number, num_bytes, seconds in operations:
        clock.now += seconds * 100
        if operation == "put":
            ram.put(
                record(number, num_bytes), Worth.new(seconds, num_bytes, number, clock_of_memory(clock.now))
            )
        elif operation == "get":
            found = ram.get(record(number, 0).name)
            assert found is None or found.fault(b"ids") is None
        elif operation == "fixed":
            before = fixed.used_bytes
            taken = fixed.reserve(num_bytes)
            assert fixed.used_bytes == before + num_bytes * taken
        elif operation == "release":
            fixed.release(min(num_bytes, fixed.used_bytes))
        elif operation == "discard":
            ram.discard(record(number, 0).name)
        else:
            over = budget.resize(num_bytes * 5)
            assert over == max(0, fixed.used_bytes - num_bytes * 5), "all but what is fixed gave way"
        assert budget.used_bytes <= max(budget.total_bytes, fixed.used_bytes)
        held = [e.num_bytes for e in ram._entries.values()]
        assert (
            ram.used_bytes
            == sum(held)
            == sum(n for _, n in ram.usage().values())
            + sum(len(e.record.ids) + ENTRY_BYTES for e in ram._entries.values())
        )


@pytest.mark.parametrize("seed", range(3))
def test_what_is_worth_least_goes_first(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    ram, plain = RecycledRam(MemoryBudget(200_000), RecycledStats(), clock), LinearRam(200_000)
    for number in range(400):
        clock.now += rng.expovariate(0.1)
        num_bytes = rng.choice((500, 5000, 40_000))
        state = record(number, num_bytes)
        worth = Worth.new(rng.lognormvariate(0, 2), num_bytes, 0, clock_of_memory(clock.now))
        ram.put(state, worth)
        plain.put(state.name, worth.score, state.num_bytes + ENTRY_BYTES)
        if ram._entries and rng.random() < 0.3:
            name = rng.choice(sorted(ram._entries))
            ram.get(name)
            plain.held[name] = (ram._entries[name].worth.score, plain.held[name][1])
    assert set(ram._entries) == set(plain.held)
    assert ram._stats.evictions[kind_of(record(0, 0).name), "ram"] > 80


def test_worth_is_time_saved_by_use_of_late() -> None:
    now = 1.7e9
    clock = clock_of_memory(now)
    often = Worth.new(1.0, 1000, 0, clock - 2)
    for _ in range(20):
        often = often.used(clock - 1)
    once = Worth.new(1.0, 1000, 0, clock)
    assert often.score > once.score > Worth.new(1.0, 2000, 0, clock).score
    assert once.score > Worth.new(1.0, 1000, 1, clock).score > Worth.new(0.99, 1000, 0, clock).score
    # 20.5 uses an hour ago weigh 10.25 now; the decayed count over its mean life is the rate.
    uses = seconds_per_second(often.score, now) * 1000 * 3600 / np.log(2)
    assert uses == pytest.approx(20.5 / 2, rel=1e-3)


@pytest.mark.parametrize("cost_seconds", [1e5, 1e-7])
def test_memory_goes_to_whoever_saves_more(table_path: Path, cost_seconds: float) -> None:
    """States that were dear take the rows' memory, cheap ones do not; either way all rows stay right."""
    memory = MemoryBudget(4 << 20)
    with FGramTable.open(table_path, TableConfig(memory=memory)) as table:
        assert table.wait_loaded(30)
        ids = np.arange(table.num_fgrams)
        assert num_ram_rows(table) == len(ids)
        for _ in range(12):
            table.rows(ids)
            time.sleep(0.1)  # RowWorth looks at a second at least
        with RecycledStore.open(None, RecycledConfig(), memory) as store:
            for number in range(40):
                key, payload = number.to_bytes(4, "big") * 8, np.full(100_000, number, np.uint8)
                store.write("blocks", key, b"ids", payload, cost_seconds=cost_seconds)
                assert store.flush(10)
                assert memory.used_bytes <= memory.total_bytes
            num_held = sum(usage.num_entries for usage in store.usage())
        if cost_seconds == 1e5:
            assert num_ram_rows(table) < len(ids) * 0.7
            assert num_held >= 10
        else:
            assert num_ram_rows(table) > len(ids) * 0.8  # the writes on their way took some
            assert num_held <= 6
        assert torch.equal(table.rows(ids)[:, 0], torch.from_numpy(ids % 128).bfloat16())
    assert memory.used_bytes == 0


def num_ram_rows(table: FGramTable) -> int:
    return sum(tier.num_rows for tier in table.tiers if tier.name == "ram")


def test_rows_are_right_while_they_are_given_up(table_path: Path) -> None:
    for _ in range(8):
        memory = MemoryBudget(8 << 20)
        with FGramTable.open(table_path, TableConfig(memory=memory)) as table:
            ids = np.random.default_rng(0).permutation(table.num_fgrams)
            stop = threading.Event()

            def shrink(memory: MemoryBudget = memory, stop: threading.Event = stop) -> None:
                for total in range(5 << 20, 0, -(256 << 10)):
                    memory.resize(total)
                stop.set()

            thread = threading.Thread(target=shrink)
            thread.start()
            while not stop.is_set():
                assert torch.equal(table.rows(ids)[:, 0], torch.from_numpy(ids % 128).bfloat16())
            thread.join()
            assert memory.used_bytes <= memory.total_bytes


def test_a_newer_table_takes_the_rows_memory_of_the_former(table_path: Path) -> None:
    memory = MemoryBudget(4 << 20)
    with FGramTable.open(table_path, TableConfig(memory=memory)) as former:
        assert former.wait_loaded(30)
        with FGramTable.open(table_path, TableConfig(memory=memory)) as newer:
            assert newer.wait_loaded(30)
            assert newer.tiers[0].num_rows == newer.num_fgrams
            assert memory.used_bytes <= memory.total_bytes
            ids = np.arange(former.num_fgrams)
            assert torch.equal(former.rows(ids), newer.rows(ids))


def test_often_read_rows_are_worth_more(table_path: Path) -> None:
    with FGramTable.open(table_path) as table:
        clock = Clock()
        worth = RowWorth(table.manifest, table.stats, clock)
        assert worth.least_value(1000) > 1, "unknown: not to be given up"
        clock.now += 60
        assert worth.least_value(1000) == 0, "nothing was read"
        table.rows(np.arange(1000))
        clock.now += 60
        first = worth.least_value(1000)
        assert first > worth.least_value(3000) > 0
        clock.now += 3600
        assert 0 < worth.least_value(1000) < first / 10
        assert worth.least_value(0) == float("inf")


def test_a_bad_budget() -> None:
    with pytest.raises(CacheError, match="the memory budget is -1 bytes"):
        MemoryBudget(-1)
