"""Which form blocks are kept in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scone.cache.device import CpuDevice
from scone.cache.disk_speed import probe_disk
from scone.cache.sim_device import SimDevice
from scone.model_store.decoder import Decoder
from scone.server.engine.block_forms import BlockForms, open_forms
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.model_runner import ModelRunner
from scone.server.errors import SettingError

BLOCK_SIZE = 8


def choose(decoder: Decoder, setting: Any, speed: float | None, **options: Any) -> BlockForms:
    config = EngineConfig(
        max_model_len=128, max_num_seqs=4, block_size=BLOCK_SIZE, **options.pop("config", {})
    )
    runner = ModelRunner(decoder, config)
    pool = BlockPool(runner.num_blocks, BLOCK_SIZE)
    return open_forms(setting, runner, options.get("device", CpuDevice()), pool, lambda: speed)


def test_what_is_restored_sooner_is_kept(multi_head: Decoder) -> None:
    names = {
        speed: [form.name for form in choose(multi_head, "auto", speed).kept] for speed in (1e3, 1e15, None)
    }
    assert names == {1e3: ["hidden", "kv"], 1e15: ["kv"], None: ["kv"]}
    slow, fast = (choose(multi_head, "auto", speed).reason for speed in (1e3, 1e15))
    for reason in (slow, fast):
        assert "a token takes 1,536 bytes as keys and values in float32, 768 as hidden states" in reason
    assert slow.endswith("hidden states are kept")
    assert fast.endswith("keys and values are kept")
    assert "not known" in choose(multi_head, "auto", None).reason
    assert [form.name for form in choose(multi_head, "auto", 1e15).readable] == ["kv", "hidden"]


def test_a_setting_decides_without_measuring_the_disk(multi_head: Decoder) -> None:
    for setting, kept in (("kv", ["kv"]), ("hidden", ["hidden", "kv"])):
        forms = choose(multi_head, setting, None)
        assert [form.name for form in forms.kept] == kept
        assert "as recycled_blocks says" in forms.reason


@pytest.mark.parametrize(
    ("num_kv_heads", "options", "why"),
    [
        (2, {}, "768 as hidden states: keys"),
        (4, {"config": {"backend": "torch"}}, "this is torch"),
        (4, {"device": SimDevice(0)}, "only the native CPU backend restores"),
    ],
)
def test_where_hidden_states_are_of_no_use(
    random_decoder: Callable[..., Decoder], num_kv_heads: int, options: dict[str, Any], why: str
) -> None:
    decoder = random_decoder(num_kv_heads=num_kv_heads)
    forms = choose(decoder, "auto", 1e3, **options)
    assert [form.name for form in forms.readable] == ["kv"]
    assert why in forms.reason
    with pytest.raises(SettingError, match="recycled_blocks is hidden, but a token takes"):
        choose(decoder, "hidden", 1e3, **options)


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    speed = probe_disk(tmp_path)
    assert speed is None or speed > 1e6
    assert not list(tmp_path.iterdir())
    assert probe_disk(tmp_path / "missing") is None
