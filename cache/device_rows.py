"""The device tier: the most frequent rows in the accelerator's own memory, as they are stored.

They need no staging: a step sends their ids, and the device gathers, decodes and lays them itself; on CUDA
with Triton in one kernel (kernels/triton_gather.py), elsewhere with torch. Loaded when the table meets its
device, each page checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from scone.cache.device import Device
from scone.kernels.gather import CHECK_BYTES
from scone.kernels.row_codec import RowCodec
from scone.model_store.table_files import TableFiles

_logger = logging.getLogger(__name__)

GatherRows = Callable[[Tensor, RowCodec, Tensor, Tensor, Tensor], None]
_PAGES_PER_COPY = (8 << 20) // CHECK_BYTES


class DeviceRows:
    """Rows [0, num_rows) of a table on a device."""

    tier = "device"
    name = "device"

    def __init__(self, device: Device, files: TableFiles, num_rows: int) -> None:
        """Reads the rows and copies them; blocks until they are there. Raises OSError or TableError."""
        self.num_rows = num_rows
        self._codec = files.manifest.row_codec
        num_bytes = num_rows * self._codec.row_bytes
        num_pages = -(-num_bytes // CHECK_BYTES)
        memory = device.device_tensor((num_pages * CHECK_BYTES,), torch.uint8)
        for first in range(0, num_pages, _PAGES_PER_COPY):
            data = files.read_pages(first, min(first + _PAGES_PER_COPY, num_pages))
            files.check_pages(first, data)
            begin = first * CHECK_BYTES
            device.upload(memory[begin : begin + len(data)], torch.from_numpy(data))
        self._stored = memory[:num_bytes].view(num_rows, self._codec.row_bytes)
        self._gather_rows = _triton_gather() if memory.is_cuda else None

    def lay(self, row_ids: Tensor, places: Tensor, embeddings: Tensor) -> None:
        """Writes row row_ids[i] to embeddings[places[i]]; all on the device, row_ids below num_rows."""
        if self._gather_rows is not None:
            self._gather_rows(self._stored, self._codec, row_ids, places, embeddings)
            return
        rows = self._codec.decode_reference(self._stored.index_select(0, row_ids))
        embeddings.index_copy_(0, places, rows.to(embeddings.dtype))


def _triton_gather() -> GatherRows | None:
    """The fused kernel, if Triton is installed."""
    try:
        from scone.kernels.triton_gather import gather_rows
    except ImportError as error:
        _logger.info("Triton cannot be used (%s): torch gathers the rows in device memory", error)
        return None
    return gather_rows
