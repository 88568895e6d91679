"""The clock of the steps tells what passed from what was worked, and is exported."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry

from scone.server.engine.step_clock import PHASES, StepClock
from scone.server.step_metrics import StepCollector


def work(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def test_waiting_and_working_are_told_apart() -> None:
    clock = StepClock()
    registry = CollectorRegistry()
    registry.register(StepCollector(clock))

    def exported(name: str) -> dict[str, float]:
        values = {
            p: registry.get_sample_value(f"scone_step_phase_{name}_total", {"phase": p}) for p in PHASES
        }
        return {phase: value for phase, value in values.items() if value is not None}

    assert exported("seconds") == exported("cpu_seconds") == dict.fromkeys(PHASES, 0.0)
    clock.enter("schedule")
    work(0.02)
    clock.enter("device")
    time.sleep(0.05)
    clock.leave()
    time.sleep(0.05)  # between two steps
    clock.leave()
    passed, used = exported("seconds"), exported("cpu_seconds")
    assert passed == clock.seconds
    assert used["schedule"] >= 0.02
    assert passed["schedule"] >= used["schedule"]
    assert 0.05 <= passed["device"] < 0.1
    assert used["device"] < 0.02
    assert passed["accept"] == used["accept"] == 0.0
