"""Staging on a GPU: rows arrive whole whichever stream is late, and no synchronisation is idle.

`make test-cuda` runs this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache import FGramTable, TableConfig
from scone.cache.cuda_device import CudaDevice
from scone.cache.device import Event, Stream
from scone.cache.staging_ring import StagingRing
from scone.kernels.row_codec import CODECS
from scone.model_store.fgram_set import FGramSet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUM_ROWS, DIM = 512, 576
LATE_CYCLES = 30_000_000  # some 15 ms: a busy host must not be later
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class LateCuda(CudaDevice):
    """One stream lags behind by milliseconds; one kind of synchronisation does nothing, as if deleted."""

    def __init__(self, late: Stream | None, forgotten: str = "") -> None:
        super().__init__(torch.device("cuda", 0))
        self._late, self._forgotten = late, forgotten

    def copy_to_device(self, target: Tensor, source: Tensor) -> None:
        if self._late is Stream.COPY:
            with torch.cuda.stream(self._copy_stream):
                torch.cuda._sleep(LATE_CYCLES)  # type: ignore[no-untyped-call]
        super().copy_to_device(target, source)

    def launch(self, kernel: Callable[[], object]) -> None:
        if self._late is Stream.COMPUTE:
            torch.cuda._sleep(LATE_CYCLES)  # type: ignore[no-untyped-call]
        super().launch(kernel)

    def synchronize(self, event: Event) -> None:
        if self._forgotten != "host waits for copied":
            super().synchronize(event)

    def wait(self, stream: Stream, event: Event) -> None:
        if self._forgotten != f"{stream.value} stream waits":
            super().wait(stream, event)


def read_rows(row_ids: NDArray[np.int64], out: Tensor) -> None:
    """Row r is r everywhere."""
    out.copy_(torch.from_numpy(row_ids).float()[:, None].expand(-1, DIM))


def look_at(rows: Tensor, places: Tensor, out: Tensor) -> None:
    """The model: a row and its place belong together."""
    out.copy_(torch.where(places[: len(rows), None] == 10 * rows, rows, torch.nan))


def num_wrong_steps(device: CudaDevice, num_steps: int, ahead: int = 2) -> int:
    """Fills two steps ahead of the model, slots poisoned after use; steps that saw other rows than theirs."""
    ring = StagingRing(device, NUM_ROWS, DIM, torch.float32)
    wanted = [np.arange(step, step + NUM_ROWS - step % 5) for step in range(num_steps)]
    seen = [torch.empty(len(ids), DIM, device="cuda") for ids in wanted]
    torch.cuda.synchronize()
    filled = []
    for step in range(num_steps + ahead):
        if step < num_steps:
            slot = ring.fill(wanted[step], wanted[step] * 10, partial(read_rows, wanted[step]))
            assert slot is not None
            filled.append(slot)
        if step >= ahead:
            slot = filled[step - ahead]
            rows, places = ring.use(slot, wanted[step - ahead])
            device.launch(partial(look_at, rows, places, seen[step - ahead]))
            device.launch(partial(rows.fill_, torch.nan))
            ring.release(slot)
    torch.cuda.synchronize()
    assert ring.num_in_use == 0
    expected = [torch.from_numpy(ids).float()[:, None].expand(-1, DIM) for ids in wanted]
    return sum(not torch.equal(a.cpu(), b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("late", [None, Stream.COPY, Stream.COMPUTE])
def test_the_model_sees_its_rows_whichever_stream_is_late(late: Stream | None) -> None:
    device = LateCuda(late)
    assert num_wrong_steps(device, 400 if late is None else 60) == 0
    assert device.usage.pinned_bytes == device.usage.staging_bytes > 3 * NUM_ROWS * DIM * 4


@pytest.mark.parametrize(
    ("forgotten", "late"),
    [
        ("host waits for copied", Stream.COPY),  # I1
        ("copy stream waits", Stream.COMPUTE),  # I2
        ("compute stream waits", Stream.COPY),  # I3
    ],
)
def test_without_any_one_synchronisation_steps_see_wrong_rows(forgotten: str, late: Stream) -> None:
    assert num_wrong_steps(LateCuda(late, forgotten), 30) > 10


def test_a_copy_runs_beside_the_model() -> None:
    """From pinned memory on a stream of its own: it is there long before a late step ends."""
    device = LateCuda(Stream.COMPUTE)
    ring = StagingRing(device, NUM_ROWS, DIM, torch.float32)
    device.launch(lambda: torch.cuda._sleep(100_000_000))  # type: ignore[no-untyped-call]
    step = torch.cuda.Event()  # type: ignore[no-untyped-call]
    step.record()
    ids = np.arange(NUM_ROWS)
    slot = ring.fill(ids, ids, partial(read_rows, ids))
    assert slot is not None
    device.synchronize(slot.copied)
    assert not step.query()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "config",
    [
        TableConfig(ram_bytes=1 << 30),
        TableConfig(ram_bytes=0),
        TableConfig(ram_bytes=0, disk_reader="direct"),
        TableConfig(ram_bytes=0, device_bytes=1 << 30),
    ],
    ids=["ram", "mmap", "direct", "device"],
)
@pytest.mark.parametrize("out_dtype", BITS)
@pytest.mark.parametrize("codec", CODECS)
def test_rows_on_the_gpu_are_the_oracles(
    codec: str,
    out_dtype: torch.dtype,
    config: TableConfig,
    zipf_fgrams: FGramSet,
    write_table: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Reader, ring, GPU; or, for the device tier, gathered and decoded there: the same bits."""
    dim = 96
    path = write_table(tmp_path / "table", zipf_fgrams, dim=dim, codec=codec)
    device = CudaDevice(torch.device("cuda", 0))
    row_ids = np.random.default_rng(0).permutation(len(zipf_fgrams))[:700].astype(np.int64)
    with FGramTable.open(path, config) as table:
        table.load_device_rows(device)
        out = torch.zeros(len(row_ids) + 5, dim, dtype=out_dtype, device="cuda")
        places = np.random.default_rng(1).permutation(len(out))[: len(row_ids)].astype(np.int64)
        if table.device_rows is not None:
            ids, at = (torch.from_numpy(x).cuda() for x in (row_ids, places))
            table.device_rows.lay(ids, at, out)
        else:
            ring = StagingRing(device, len(row_ids), dim, out_dtype)
            slot = ring.fill(row_ids, places, partial(table.read_into, row_ids))
            assert slot is not None
            rows, indices = ring.use(slot, row_ids)
            out.index_copy_(0, indices[: len(row_ids)], rows)
            ring.release(slot)
        expected = torch.zeros(out.shape, dtype=out_dtype)
        expected[torch.from_numpy(places)] = oracle(table, row_ids).to(out_dtype)
    assert torch.equal(out.cpu().view(BITS[out_dtype]), expected.view(BITS[out_dtype]))


def oracle(table: FGramTable, row_ids: NDArray[np.int64]) -> Tensor:
    """Rows decoded in plain torch from the table's bytes."""
    codec = table.manifest.row_codec
    files: Any = table._files
    stored = torch.from_numpy(files.read_pages(0, len(files.page_sums))).flatten()
    stored = stored[: table.num_fgrams * codec.row_bytes].view(-1, codec.row_bytes)
    return codec.decode_reference(stored[torch.from_numpy(row_ids)])
