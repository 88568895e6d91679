"""The comparison of eviction policies: a real store, small."""

from __future__ import annotations

import random
from pathlib import Path

from load_tests.recycled_policy import State, compare, mixed_states


def test_worth_saves_more_than_least_recent_use(tmp_path: Path) -> None:
    """Few dear states among many cheap ones of the same size: worth keeps the dear ones."""
    states = [State("blocks", 1_000_000, 5.0 if n % 8 == 0 else 0.05) for n in range(320)]
    lru, worth = compare(tmp_path / "store", "two costs", states, 0.5, 0, 0, 500)
    assert lru.budget_bytes == worth.budget_bytes == 64 << 20
    assert 0.05 < lru.hit_rate < 0.6
    assert worth.saved_seconds_rate > lru.saved_seconds_rate * 1.3
    assert 40 << 20 < worth.payload_bytes < worth.file_bytes <= worth.budget_bytes
    assert not list(tmp_path.iterdir())


def test_what_was_popular_is_forgotten_as_others_become_it(tmp_path: Path) -> None:
    """Equal states, popularity that moves on fast: nearly as good as least recent use."""
    states = [State("blocks", 1_000_000, 0.03)] * 320
    lru, worth = compare(tmp_path / "store", "equal", states, 1.0, 5, 0, 900)
    assert lru.hit_rate > 0.3
    assert worth.hit_rate > lru.hit_rate - 0.1


def test_mixed_states_fill_the_working_set() -> None:
    states = mixed_states(20_000_000, random.Random(0))
    assert 20_000_000 <= sum(state.num_bytes for state in states) < 22_500_000
    assert {state.kind for state in states} == {"blocks", "results", "layer_k"}
