"""Lays the f-gram rows of a step over its token embeddings, wherever the model's memory is.

Host gathers, copy stream copies, compute stream lays: between them stands the staging ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from scone.cache.cuda_device import CudaDevice
from scone.cache.device import CpuDevice, Device
from scone.cache.staging_ring import StagingRing
from scone.server.engine.input_rows import InputRows, Part


class RowOverlay:
    """The engine's one way from rows to the model; holds all memory for it from the start."""

    def __init__(self, device: Device, max_num_inputs: int, dim: int, dtype: torch.dtype) -> None:
        """For steps of up to `max_num_inputs` inputs, with embeddings (n, dim) of `dtype`."""
        self.device = device
        self.ring = StagingRing(device, max_num_inputs, dim, dtype)

    def lay(self, source: InputRows, parts: Sequence[Part], embeddings: Tensor) -> None:
        """Replaces the embeddings of inputs that have a row; done when work launched later runs.

        Args:
            parts: the whole step; their rows must be ready and without error.
            embeddings: (num_inputs, dim) on the device, the parts' inputs one after the other.

        Raises:
            RowReadError: a row in memory is damaged or gone; nothing was laid.
        """
        row_ids = source.row_ids(parts)
        places = np.flatnonzero(row_ids >= 0)
        if not len(places):
            return
        wanted = row_ids[places]
        slot = self.ring.fill(wanted, places, partial(source.gather, parts, wanted, places))
        assert slot is not None, "each step gives its slot back"
        try:
            rows, device_places = self.ring.use(slot, wanted)
            self.device.launch(partial(embeddings.index_copy_, 0, device_places, rows))
        finally:
            self.ring.release(slot)


def staging_device(device: torch.device) -> Device:
    """What brings rows to a model on `device`."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
