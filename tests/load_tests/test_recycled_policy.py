"""The comparison of eviction policies: a real store, small."""

from __future__ import annotations

import random
from pathlib import Path

from load_tests.recycled_policy import State, mixed_states, run


def test_worth_saves_more_than_least_recent_use(tmp_path: Path) -> None:
    """Few dear states among many cheap ones of the same size: worth keeps the dear ones."""
    states = [State("blocks", 1_000_000, 5.0 if n % 8 == 0 else 0.05) for n in range(320)]
    lru, worth = (
        run(tmp_path / policy, "two costs", states, 0.5, policy, 500) for policy in ("lru", "worth")
    )
    assert lru.budget_bytes == worth.budget_bytes == 64 << 20
    assert 0.05 < lru.hit_rate < 0.6
    assert worth.saved_seconds_rate > lru.saved_seconds_rate * 1.3
    assert max(lru.file_bytes, worth.file_bytes) <= lru.budget_bytes
    assert not list(tmp_path.iterdir())


def test_mixed_states_fill_the_working_set() -> None:
    states = mixed_states(20_000_000, random.Random(0))
    assert 20_000_000 <= sum(state.num_bytes for state in states) < 22_500_000
    assert {state.kind for state in states} == {"blocks", "results", "layer_k"}
