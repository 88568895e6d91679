"""The cost model follows what was measured, and decides by it."""

from __future__ import annotations

import random

import pytest

from scone.cache.recycle_cost import RETRY_AFTER, HeldState, ReadSpeed, RecycleCost
from scone.cache.recycled_stats import StateTier

BLOCK_BYTES, BLOCK_TOKENS = 737_280, 16


def held(tier: StateTier, number: int, work_seconds: float = 0.0) -> list[HeldState]:
    return [HeldState(tier, BLOCK_BYTES, work_seconds)] * number


def unmeasured() -> RecycleCost:
    return RecycleCost({"ram": ReadSpeed(), "disk": ReadSpeed()})


def measured(disk_seconds: float, token_seconds: float, ram_seconds: float = 0.0001) -> RecycleCost:
    ram, disk = ReadSpeed(), ReadSpeed()
    cost = RecycleCost({"ram": ram, "disk": disk})
    for _ in range(10):
        ram.add(BLOCK_BYTES, ram_seconds)
        disk.add(BLOCK_BYTES, disk_seconds)
        cost.note_computed(256, 256 * token_seconds)
    return cost


def test_nothing_known_is_tried() -> None:
    cost = unmeasured()
    assert cost.num_to_fetch(held("disk", 5), BLOCK_TOKENS) == 5
    assert cost.break_even_bytes_per_second(46_080) is None
    cost.note_computed(100, 1e-6)
    assert cost.num_to_fetch(held("disk", 5), BLOCK_TOKENS) == 5, "reads are not measured yet"
    assert cost.break_even_bytes_per_second(46_080) == pytest.approx(46_080 / 1e-8)


def test_cheap_reads_are_taken_and_dear_ones_refused() -> None:
    assert measured(0.001, 0.002).num_to_fetch(held("disk", 5), BLOCK_TOKENS) == 5
    assert measured(0.100, 0.002).num_to_fetch(held("disk", 5), BLOCK_TOKENS) == 0


def test_work_after_the_read_counts() -> None:
    cost = measured(0.001, 0.002)
    assert cost.num_to_fetch(held("disk", 5, work_seconds=0.02), BLOCK_TOKENS) == 5
    assert cost.num_to_fetch(held("disk", 5, work_seconds=0.04), BLOCK_TOKENS) == 0
    assert cost.break_even_bytes_per_second(46_080, 0.001) == pytest.approx(46_080 / 0.001)
    assert cost.break_even_bytes_per_second(46_080, 0.003) is None, "no bandwidth is enough"


def test_blocks_in_memory_are_taken_up_to_a_slow_disk() -> None:
    cost = measured(0.100, 0.002)
    assert cost.num_to_fetch(held("ram", 2) + held("disk", 2), BLOCK_TOKENS) == 2
    # One dear block is worth it for many cheap ones behind it.
    assert cost.num_to_fetch(held("disk", 1) + held("ram", 20), BLOCK_TOKENS) == 21
    assert cost.num_to_fetch(held("disk", 1) + held("ram", 1) + held("disk", 1), BLOCK_TOKENS) == 0


def test_a_refused_tier_is_tried_again_and_believed() -> None:
    ram, disk = ReadSpeed(), ReadSpeed()
    cost = RecycleCost({"ram": ram, "disk": disk})
    cost.note_computed(16, 0.032)
    for _ in range(10):
        disk.add(BLOCK_BYTES, 0.100)
    answers = [cost.num_to_fetch(held("disk", 3), BLOCK_TOKENS) for _ in range(RETRY_AFTER)]
    assert answers == [0] * (RETRY_AFTER - 1) + [3]
    for _ in range(60):
        disk.add(BLOCK_BYTES, 0.001)
    assert cost.num_to_fetch(held("disk", 3), BLOCK_TOKENS) == 3


def test_latency_and_bandwidth_are_told_apart() -> None:
    rng, speed = random.Random(0), ReadSpeed()
    for _ in range(300):
        num_bytes = rng.randrange(1000, 1_000_000)
        speed.add(num_bytes, (0.002 + num_bytes / 500e6) * rng.uniform(0.97, 1.03))
    assert speed.latency_seconds == pytest.approx(0.002, rel=0.1)
    assert speed.bytes_per_second == pytest.approx(500e6, rel=0.2)
    assert speed.seconds(1_000_000) == pytest.approx(0.004, rel=0.1)


def test_one_size_gives_a_bandwidth_without_a_latency() -> None:
    speed = ReadSpeed()
    for _ in range(5):
        speed.add(1_000_000, 0.01)
    assert speed.latency_seconds == 0
    assert speed.bytes_per_second == pytest.approx(100e6)


def test_the_newest_measurements_count_most() -> None:
    cost = measured(0.001, 0.002)
    for _ in range(50):
        cost.note_computed(256, 256 * 0.004)
    assert cost.compute_seconds(100) == pytest.approx(0.4, rel=0.02)
