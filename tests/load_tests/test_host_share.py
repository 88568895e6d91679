"""What a host adds to a device's steps, measured on a server whose device takes a set time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from load_tests import host_share
from load_tests.host_share import per_step
from scone.server.engine.step_clock import PHASES


def test_a_step_is_split_into_its_phases() -> None:
    growth = {"scone_step_seconds_count": 10.0, "process_cpu_seconds_total": 0.5}
    for phase in PHASES:
        growth[f'scone_step_phase_seconds_total{{phase="{phase}"}}'] = 0.02
        growth[f'scone_step_phase_cpu_seconds_total{{phase="{phase}"}}'] = 0.01
    times = per_step(growth, client_seconds=0.2)
    assert {f"{phase}_ms" for phase in PHASES} <= times.keys()
    assert times["step_ms"] == pytest.approx(2.0 * len(PHASES))
    assert times["schedule_ms"] == 2.0
    assert times["of_it_for_the_lock_ms"] == pytest.approx(1.0 * (len(PHASES) - 2))
    assert times["engine_cpu_ms"] == pytest.approx(1.0 * len(PHASES))
    assert times["other_threads_cpu_ms"] == pytest.approx(50 - len(PHASES))
    assert times["client_cpu_ms"] == 20.0


@pytest.mark.heavy
@pytest.mark.parametrize("order", [[], ["--in-order"]])
def test_a_paced_server_is_measured(
    order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "share.jsonl"
    command = ["--streams", "2", "--rounds", "1", "--max-tokens", "50", "--step-ms", "5", "--rows", "device"]
    command += ["--work", str(tmp_path / "work"), "--out", str(out), "--port", "8459", *order]
    monkeypatch.setattr(sys, "argv", ["host_share", *command])
    assert host_share.main() == 0
    (line,) = out.read_text().splitlines()
    figures = json.loads(line)["by_streams"]["2"]
    assert 100 < figures["tokens_per_second"] < 400, "two tokens in a step of at least 5 ms"
    assert 5 <= figures["step_ms"] < 20
    assert figures["device_ms"] > 2
