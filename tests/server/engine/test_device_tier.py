"""Rows in device memory: the same tokens, whatever lies there; refused where there is no such memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scone.cache import FGramTable, TableConfig
from scone.cache.device import CpuDevice
from scone.cache.errors import CacheError
from scone.cache.sim_device import SimDevice
from scone.model_store.fgram_set import FGramSet
from scone.server.engine.input_rows import read_ahead

from .conftest import World, random_prompt
from .dict_table import DictTable

MakeWorld = Callable[..., World]


@pytest.fixture(params=["raw", "int8", "int4", "fp8"])
def path(
    request: pytest.FixtureRequest,
    dict_table: DictTable,
    fgram_set: Callable[..., FGramSet],
    write_table: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    fgrams = fgram_set({fgram: 1000 - i for i, fgram in enumerate(dict_table.fgrams())})
    return write_table(tmp_path / "table", fgrams, dim=dict_table.dim, codec=request.param)


def answers(make_world: MakeWorld, path: Path, config: TableConfig, device: SimDevice | None) -> list[object]:
    world = make_world(None, device, max_num_batched_tokens=8, max_num_seqs=6)
    with FGramTable.open(path, config) as table:
        world.input_rows = read_ahead(table, world.core.overlay.device)
        table.wait_loaded()
        allowed = tuple(range(3, 12))  # of which there are f-grams
        wanted: dict[str, Any] = {"max_tokens": 25, "temperature": 1.0, "allowed_token_ids": allowed}
        outcomes = [world.add(random_prompt(seed, 12), seed=seed, **wanted) for seed in range(5)]
        world.run()
        world.input_rows.close()
        num_rows = min(table.num_fgrams, config.device_bytes // table.manifest.row_bytes)
        assert sum(tier.num_rows for tier in table.tiers if tier.name == "device") == num_rows
        assert sum(tier.num_rows for tier in table.tiers) == table.num_fgrams
        assert (table.stats.rows_read["device"] > 0) == (num_rows > 0)
        by_tier: dict[str, int] = {}
        for outcome in outcomes:
            usage = outcome.last().usage
            assert usage is not None
            for tier, count in usage.rows_by_tier.items():
                by_tier[tier] = by_tier.get(tier, 0) + count
        assert by_tier.get("device", 0) == table.stats.rows_read["device"]
    return [outcome.tokens() for outcome in outcomes]


@pytest.mark.parametrize("ram_bytes", [0, 1 << 30], ids=["disk", "ram"])
@pytest.mark.parametrize("device_bytes", [0, 12_000, 1 << 30])
def test_any_budget_gives_the_same_tokens(
    make_world: MakeWorld, path: Path, device_bytes: int, ram_bytes: int
) -> None:
    """Rows of a decode step go a slow way where some are on a disk, a quick one where all are in memory."""
    expected = answers(make_world, path, TableConfig(), None)
    for seed in range(4):
        config = TableConfig(device_bytes=device_bytes, ram_bytes=ram_bytes)
        device = SimDevice(seed)
        assert answers(make_world, path, config, device) == expected
        assert (device.usage.table_bytes > 0) == (device_bytes > 0)


def test_tiers_are_ranges_by_rank(path: Path) -> None:
    with FGramTable.open(path) as table:
        row_bytes = table.manifest.row_bytes
    config = TableConfig(device_bytes=10 * row_bytes, ram_bytes=30 * row_bytes)
    with FGramTable.open(path, config) as table:
        table.wait_loaded()
        table.load_device_rows(SimDevice(0))
        assert [(t.name, t.begin, t.end) for t in table.tiers] == [
            ("device", 0, 10),
            ("ram", 10, 30),
            ("disk", 30, table.num_fgrams),
        ]
        assert table.tier_of([0, 9, 10, 29, 30, -1]).tolist() == ["device"] * 2 + ["ram"] * 2 + ["disk", ""]
        assert not table.may_wait([0, 9, 29]).any()


def test_a_cpu_has_no_device_tier(path: Path) -> None:
    with (
        FGramTable.open(path, TableConfig(device_bytes=1000)) as table,
        pytest.raises(CacheError, match="device_bytes is 1000, but the model runs on the CPU"),
    ):
        table.load_device_rows(CpuDevice())
    with pytest.raises(CacheError, match="device_bytes is -1"):
        TableConfig(device_bytes=-1)
