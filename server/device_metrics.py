"""What staging rows to the model's device takes, for Prometheus; all zero where the model runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scone.server.engine.row_overlay import RowOverlay


class DeviceCollector(Collector):
    """Exports one engine's staging."""

    def __init__(self, overlay: RowOverlay) -> None:
        self._overlay = overlay

    def collect(self) -> Iterator[Metric]:
        usage = self._overlay.device.usage
        yield GaugeMetricFamily(
            "scone_staging_slots_in_use",
            "Slots of the staging ring that host or device need.",
            value=self._overlay.ring.num_in_use,
        )
        yield CounterMetricFamily(
            "scone_h2d_bytes", "Bytes of rows copied to the device.", value=usage.copied_bytes
        )
        yield GaugeMetricFamily(
            "scone_pinned_bytes", "Host memory pinned for copies.", value=usage.pinned_bytes
        )
        memory = GaugeMetricFamily(
            "scone_device_memory_bytes", "Device memory that the table takes, by use.", labels=["what"]
        )
        memory.add_metric(["staging"], usage.staging_bytes)
        memory.add_metric(["table"], usage.table_bytes)
        yield memory
