"""Lays the f-gram rows of a step over its token embeddings, wherever the model's memory is.

Host gathers, copy stream copies, compute stream lays: between them stands the staging ring. Where the model
computes on the host, the rows of a step that only decodes are written over the embeddings themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scone.cache.cuda_device import CudaDevice
from scone.cache.device import CpuDevice, Device
from scone.cache.device_rows import DeviceRows
from scone.cache.staging_ring import Slot, StagingRing
from scone.kernels.row_target import RowTarget
from scone.server.engine.input_rows import InputRows, Rows, SequenceRows
from scone.server.engine.scheduler import Chunk


class _Batch(NamedTuple):
    """Sequences that decode together with rows of one source.

    Attributes:
        look_up: the source's `look_up_newest`, of the lists that these sequences go on filling.
        match: its `match_newest`, of the same.
    """

    rows: Rows
    source: InputRows
    look_up: Callable[[list[int], RowTarget], int | None]
    match: Callable[[list[int], RowTarget], int | None]


class RowOverlay:
    """The engine's one way from rows to the model; holds all memory for it from the start."""

    def __init__(self, device: Device, max_num_inputs: int, dim: int, dtype: torch.dtype) -> None:
        """For steps of up to `max_num_inputs` inputs, with embeddings (n, dim) of `dtype`."""
        self.device = device
        self.ring = StagingRing(device, max_num_inputs, dim, dtype)
        self._batch: _Batch | None = None
        self._embeddings: RowTarget | None = None  # where the model reads them in the host's memory
        if device.is_host:
            row_ids, places = np.empty((2, max_num_inputs), np.int64)
            self._embeddings = RowTarget(torch.empty(1, dim, dtype=dtype), row_ids, places, by_place=True)

    def lay_newest(self, rows: Rows, chunks: Sequence[Chunk], embeddings: Tensor) -> bool:
        """`lay` in few calls, of sequences that decode, the newest token of each.

        Returns:
            False, and nothing was done, if that is not what they do, or some row is not at hand.
        """
        positions = [chunk.start for chunk in chunks if chunk.num_tokens == 1]
        if len(positions) < len(chunks):
            return False
        batch = self._batch
        if batch is None or batch.rows != rows:
            batch = self._batch = _batch_of(rows, chunks)
            if batch is None:
                return False
        if self._embeddings is not None:  # if it breaks off half-way, `lay` writes the same places
            self._embeddings.move_to(embeddings, len(chunks))
            return batch.look_up(positions, self._embeddings) is not None
        slot = self.ring.reserve(len(chunks))
        assert slot is not None, "each step gives its slot back"
        device_rows = batch.source.table.device_rows
        try:
            if device_rows is not None:
                return self._lay_newest_of_tiers(batch, device_rows, slot, positions, embeddings)
            num_rows = batch.look_up(positions, slot.target)
            if num_rows:
                staged, places = self.ring.hand_over(slot, num_rows)
                self.device.launch(partial(embeddings.index_copy_, 0, places, staged))
            return num_rows is not None
        finally:
            self.ring.release(slot)

    def _lay_newest_of_tiers(
        self, batch: _Batch, device_rows: DeviceRows, slot: Slot, positions: list[int], embeddings: Tensor
    ) -> bool:
        """`lay_newest` where the device holds rows of its own, through a reserved slot."""
        num_rows = batch.match(positions, slot.target)
        if not num_rows:
            return num_rows is not None
        ids, places = slot.row_ids[:num_rows], slot.indices[:num_rows]
        is_staged = ids >= device_rows.num_rows
        num_staged = int(np.count_nonzero(is_staged))
        if num_staged:  # they go first, as the ring has it
            order = np.argsort(~is_staged, kind="stable")
            ids, places = ids[order], places[order]
            slot.row_ids[:num_rows], slot.indices[:num_rows] = ids, places
            batch.source.table.read_into(ids[:num_staged], slot.host_rows[:num_staged])
        slot.indices[num_rows : 2 * num_rows - num_staged] = ids[num_staged:]
        staged, staged_places = self.ring.hand_over(slot, num_staged)
        if num_staged:
            self.device.launch(partial(embeddings.index_copy_, 0, staged_places, staged))
        if num_staged < num_rows:
            indices = slot.views().device_indices
            its_places, its_ids = indices[num_staged:num_rows], indices[num_rows : 2 * num_rows - num_staged]
            self.device.launch(partial(device_rows.lay, its_ids, its_places, embeddings))
            batch.source.table.count_device_rows(num_rows - num_staged)
        return True

    def lay(self, rows: Sequence[SequenceRows | None], chunks: Sequence[Chunk], embeddings: Tensor) -> None:
        """Replaces the embeddings of inputs that have a row; done when work launched later runs.

        The way of every step, for those that `lay_newest` leaves. Tokens generated last may be matched only
        now (`InputRows.wanted`).

        Args:
            rows: of each chunk's sequence; they must be ready and without error.
            embeddings: (num_inputs, dim) on the device, the chunks' inputs one after the other.

        Raises:
            RowReadError: a row in memory is damaged or gone; nothing may have been laid.
        """
        sources = {r.source for r in rows if r is not None}
        for source in sources:
            its_rows = rows
            if len(sources) > 1:  # while a table is swapped
                its_rows = [r if r is not None and r.source is source else None for r in rows]
            self._lay(source, its_rows, chunks, embeddings)

    def forget_batch(self) -> None:
        """Lets go of the sequences of the last step."""
        self._batch = None

    def _lay(self, source: InputRows, rows: Rows, chunks: Sequence[Chunk], embeddings: Tensor) -> None:
        wanted, places = source.wanted(rows, chunks, len(embeddings))
        if not len(places):
            return
        indices = places
        device_rows = source.table.device_rows
        if device_rows is not None:
            on_device = wanted < device_rows.num_rows
            indices = np.concatenate((places[~on_device], places[on_device], wanted[on_device]))
            places, wanted = places[~on_device], wanted[~on_device]
        slot = self.ring.fill(wanted, indices, partial(source.gather, rows, chunks, wanted, places))
        assert slot is not None, "each step gives its slot back"
        try:
            staged, device_indices = self.ring.use(slot, wanted)
            self.device.launch(partial(embeddings.index_copy_, 0, device_indices[: len(wanted)], staged))
            num_on_device = (len(indices) - len(wanted)) // 2
            if device_rows is not None and num_on_device:
                its_places, its_ids = torch.split(device_indices[len(wanted) : len(indices)], num_on_device)
                self.device.launch(partial(device_rows.lay, its_ids, its_places, embeddings))
                source.table.count_device_rows(num_on_device)
        finally:
            self.ring.release(slot)

    def lay_states(
        self, states: Sequence[Tensor | None], chunks: Sequence[Chunk], embeddings: Tensor
    ) -> None:
        """Replaces the embeddings of chunks whose sequence has states (num_tokens, dim), on the host."""
        parts: list[Tensor] = []
        places: list[int] = []
        offset = 0
        for known, chunk in zip(states, chunks, strict=True):
            if known is not None:
                parts.append(known[chunk.start : chunk.start + chunk.num_tokens])
                places += range(offset, offset + chunk.num_tokens)
            offset += chunk.num_tokens
        if not parts:
            return
        ids = np.array(places, np.int64)
        slot = self.ring.fill(ids, ids, lambda out: torch.cat(parts, out=out))
        assert slot is not None, "each step gives its slot back"
        try:
            staged, device_places = self.ring.use(slot, ids)
            self.device.launch(partial(embeddings.index_copy_, 0, device_places[: len(ids)], staged))
        finally:
            self.ring.release(slot)


def _batch_of(rows: Rows, chunks: Sequence[Chunk]) -> _Batch | None:
    """None if not all of them have rows of one source."""
    present = [r for r in rows if r is not None]
    if len(present) < len(rows) or len({r.source for r in present}) != 1:
        return None
    row_ids, token_ids = [r.row_ids for r in present], [chunk.seq.token_ids for chunk in chunks]
    source = present[0].source
    return _Batch(
        rows,
        source,
        partial(source.look_up_newest, rows, row_ids, token_ids),
        partial(source.match_newest, row_ids, token_ids),
    )


def staging_device(device: torch.device) -> Device:
    """What brings rows to a model on `device`."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
