"""Where the steps' time goes, for Prometheus: whether the device or its host is what a server waits for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from scone.server.engine.step_clock import StepClock


class StepCollector(Collector):
    """Exports one engine's clock."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        passed = CounterMetricFamily(
            "scone_step_phase_seconds", "Time that steps spent, by phase.", labels=["phase"]
        )
        used = CounterMetricFamily(
            "scone_step_phase_cpu_seconds",
            "Processor time of the engine's own thread in steps, by phase.",
            labels=["phase"],
        )
        for phase, seconds in self._clock.seconds.items():
            passed.add_metric([phase], seconds)
            used.add_metric([phase], self._clock.cpu_seconds[phase])
        yield passed
        yield used
