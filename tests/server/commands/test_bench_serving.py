"""`scone bench prefill` and `decode` run the whole engine and end in one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scone.server.cli import main

SMALL = ["--rows", "3000", "--dim", "64", "--corpus-tokens", "60000", "--repeats", "1"]


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", *words]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_decode(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = measured(capsys, "decode", *SMALL, "--steps", "30", "--work", str(tmp_path))
    assert result["benchmark"] == "decode"
    runs = result["simulated"]["at_gpu_pace"]
    assert set(runs) == {"warm", "cold_mmap", "cold_direct"}
    for run in runs.values():
        assert 0 < run["tokens_per_second"] <= 32 / 0.005, "no faster than the model"
        assert run["rows_read"] > 32 * 30 / 4, "rows were looked up"
    assert runs["warm"]["rows_read_ahead"] == 0
    assert runs["cold_direct"]["rows_read_ahead"] > 0
    cost = result["simulated"]["table_adds_us_per_step"]
    assert cost["with"] > 0
    assert cost["without"] > 0


def test_prefill(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = measured(capsys, "prefill", *SMALL, "--work", str(tmp_path))
    for run in result["simulated"]["at_gpu_pace"].values():
        assert 0 < run["tokens_per_second"] <= 10_000
        assert run["rows_read"] > 8 * 2048 / 4


def test_a_model_needs_its_table_and_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--model", "somewhere"]) == 2
    assert "wanted all three" in capsys.readouterr().err
