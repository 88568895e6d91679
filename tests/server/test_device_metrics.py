"""The staging metrics move when rows are staged."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor

from scone.cache.device import CpuDevice, Device
from scone.cache.sim_device import SimDevice
from scone.server.device_metrics import DeviceCollector
from scone.server.engine.row_overlay import RowOverlay

DIM, NUM_ROWS, MAX_ROWS = 8, 3, 16


def metrics(overlay: RowOverlay) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(DeviceCollector(overlay))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def stage(overlay: RowOverlay, device: Device) -> None:
    ids = np.arange(NUM_ROWS)
    slot = overlay.ring.fill(ids, ids, partial(Tensor.fill_, value=1.0))
    assert slot is not None
    rows, _ = overlay.ring.use(slot, ids)
    device.launch(partial(torch.sum, rows))
    overlay.ring.release(slot)


def test_every_metric_moves_on_a_device() -> None:
    device = SimDevice(0)
    overlay = RowOverlay(device, MAX_ROWS, DIM, torch.float32)
    before = metrics(overlay)
    # three slots of two indices and one row of float32 for each input
    assert (
        before["scone_pinned_bytes"] == before['scone_device_memory_bytes{what="staging"}'] == 3 * (256 + 512)
    )
    assert before["scone_staging_slots_in_use"] == before["scone_h2d_bytes_total"] == 0
    assert before['scone_device_memory_bytes{what="table"}'] == 0
    device.device_tensor((100,), torch.uint8)
    device._favourite = None  # nothing runs by itself
    device._random.random = lambda: 1.0  # type: ignore[method-assign]
    stage(overlay, device)
    during = metrics(overlay)
    assert during["scone_staging_slots_in_use"] == 1
    assert during["scone_h2d_bytes_total"] == 256 + NUM_ROWS * DIM * 4
    assert during['scone_device_memory_bytes{what="table"}'] == 100
    device.drain()
    assert metrics(overlay)["scone_staging_slots_in_use"] == 0


def test_on_a_cpu_nothing_is_copied() -> None:
    device = CpuDevice()
    overlay = RowOverlay(device, MAX_ROWS, DIM, torch.float32)
    stage(overlay, device)
    assert set(metrics(overlay).values()) == {0.0}
