"""What a step tells the device besides rows: token ids, positions, slots, tiles, block tables.

One pinned buffer and one asynchronous copy a step, to addresses that a CUDA graph may hold. The copy is
queued in the model's own order of work, so that it overwrites nothing that an earlier step still reads;
before the host writes a buffer again it waits until the copy from it has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.cache.device import Device, Event, Stream
from scone.kernels.paged_attention import PagedBatch
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.scheduler import Chunk
from scone.server.engine.step_graphs import StepShape

NUM_BUFFERS = 2
"""One is written while the copy from the other may still be to come."""

_NO_LENGTHS = torch.empty(0, dtype=torch.int32)
_Values = TypeVar("_Values", Tensor, NDArray[np.int32])


class Step(NamedTuple):
    """One step's inputs on the device.

    Attributes:
        input_ids, positions: (num_tokens,) int32.
        batch: with tiles, and without lengths on the host.
    """

    input_ids: Tensor
    positions: Tensor
    batch: PagedBatch


class _Buffer:
    """Host memory of one step: the values of tokens and tiles, which end where the block tables begin."""

    def __init__(self, host: Tensor, num_values: int, table_shape: tuple[int, int], copied: Event) -> None:
        self.host, self.copied = host, copied
        self.values = host.numpy()[:num_values]
        self.tables = host.numpy()[num_values:].reshape(table_shape)
        # What each row was written from, and how much: a sequence's table grows by a block now and then.
        self._written: list[tuple[list[int], int]] = [([], 0)] * table_shape[0]

    def write_tables(self, chunks: Sequence[Chunk]) -> None:
        """Row i becomes the block table of chunk i's sequence."""
        for i, chunk in enumerate(chunks):
            block_ids = chunk.seq.block_ids
            known, num_known = self._written[i]
            # A list that is still the same one has only grown: preemption gives a sequence another list.
            begin = num_known if known is block_ids else 0
            if begin < len(block_ids):
                self.tables[i, begin : len(block_ids)] = block_ids[begin:]
                self._written[i] = (block_ids, len(block_ids))


class StepInputs:
    """Room for the inputs of steps, on both sides."""

    def __init__(self, device: Device, config: EngineConfig, *, queries_per_tile: int) -> None:
        """For the largest steps that the engine's limits allow."""
        self._device = device
        self._block_size, self._queries_per_tile = config.block_size, queries_per_tile
        # there are at most as many tiles as tokens
        self._num_values = 6 * config.max_num_batched_tokens
        table_shape = (config.max_num_seqs, config.max_blocks_per_seq)
        size = self._num_values + config.max_num_seqs * config.max_blocks_per_seq
        # One more than is written: where host and device share memory, the target is none of the sources.
        memory = device.buffer((1 + NUM_BUFFERS, size), torch.int32)
        self._buffers = [_Buffer(h, self._num_values, table_shape, device.event()) for h in memory.host[1:]]
        self._target = memory.device[0]
        self._tables = self._target[self._num_values :].view(table_shape)

    def put(self, chunks: Sequence[Chunk], shape: StepShape | None = None) -> Step:
        """The chunks' inputs, one after the other; holds for work launched before the next call.

        Args:
            shape: how many tokens and tiles there shall be: those added store nothing and have no queries.
                None adds none.
        """
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        self._device.synchronize(buffer.copied)
        buffer.write_tables(chunks)
        if all([c.num_tokens == 1 for c in chunks]):
            shape = shape or StepShape(len(chunks), len(chunks), True)
            self._write_decode(buffer, chunks, shape)
        else:
            shape = self._write(buffer, chunks, shape)
        begin = self._num_values - 3 * (shape.num_tokens + shape.num_tiles)
        end = self._num_values + len(chunks) * self._tables.shape[1]
        self._device.launch(partial(self._target[begin:end].copy_, buffer.host[begin:end], non_blocking=True))
        self._device.record(buffer.copied, Stream.COMPUTE)
        return self.step(shape)

    def step(self, shape: StepShape) -> Step:
        """Where the device finds the inputs of a step of this shape: always in the same place."""
        of_tokens, of_tiles = _parts(self._target[: self._num_values], shape)
        batch = PagedBatch(
            _NO_LENGTHS,
            _NO_LENGTHS,
            self._tables,
            of_tokens[2],
            of_tiles,
            one_query_a_tile=shape.decodes,
        )
        return Step(of_tokens[0], of_tokens[1], batch)

    def _write_decode(self, buffer: _Buffer, chunks: Sequence[Chunk], shape: StepShape) -> None:
        num = len(chunks)
        of_tokens, of_tiles = _parts(buffer.values, shape)
        starts = np.array([c.start for c in chunks], np.int32)
        of_tokens[0, :num] = [c.seq.token_ids[c.start] for c in chunks]
        of_tokens[1, :num] = starts
        of_tokens[2, :num] = self._slots(buffer, np.arange(num), starts)
        of_tiles[:2, :num] = np.arange(num)
        of_tiles[2, :num] = 1
        _pad(of_tokens, num, of_tiles, num)

    def _write(self, buffer: _Buffer, chunks: Sequence[Chunk], shape: StepShape | None) -> StepShape:
        """Returns the shape, which is that of the chunks where none is given."""
        sizes = np.array([c.num_tokens for c in chunks])
        ends = np.cumsum(sizes)
        num_tiles = -(-sizes // self._queries_per_tile)
        tile_ends = np.cumsum(num_tiles)
        tokens, tiles = int(ends[-1]), int(tile_ends[-1])
        shape = shape or StepShape(tokens, tiles, False)
        of_tokens, of_tiles = _parts(buffer.values, shape)
        seqs, starts = np.arange(len(chunks)), np.array([c.start for c in chunks])
        of_tokens[0, :tokens] = [t for c in chunks for t in c.seq.token_ids[c.start : c.start + c.num_tokens]]
        positions = np.arange(tokens) + np.repeat(starts - (ends - sizes), sizes)
        of_tokens[1, :tokens] = positions
        of_tokens[2, :tokens] = self._slots(buffer, np.repeat(seqs, sizes), positions)
        within = np.arange(tiles) - np.repeat(tile_ends - num_tiles, num_tiles)
        begins = within * self._queries_per_tile
        of_tiles[0, :tiles] = np.repeat(seqs, num_tiles)
        of_tiles[1, :tiles] = np.repeat(ends - sizes, num_tiles) + begins
        of_tiles[2, :tiles] = np.minimum(np.repeat(sizes, num_tiles) - begins, self._queries_per_tile)
        _pad(of_tokens, tokens, of_tiles, tiles)
        return shape

    def _slots(
        self, buffer: _Buffer, seqs: NDArray[np.int64], positions: NDArray[np.integer]
    ) -> NDArray[np.integer]:
        size = self._block_size
        block_ids: NDArray[np.int32] = buffer.tables[seqs, positions // size]
        return block_ids * size + positions % size


def _parts(values: _Values, shape: StepShape) -> tuple[_Values, _Values]:
    """The last values as (3, num_tokens): ids, positions, slots; and (3, num_tiles): `PagedBatch.tiles`."""
    begin = len(values) - 3 * (shape.num_tokens + shape.num_tiles)
    middle = begin + 3 * shape.num_tokens
    return values[begin:middle].reshape(3, -1), values[middle:].reshape(3, -1)


def _pad(of_tokens: NDArray[np.int32], num_tokens: int, of_tiles: NDArray[np.int32], num_tiles: int) -> None:
    """What comes after so many tokens and tiles does nothing."""
    of_tokens[:2, num_tokens:] = 0
    of_tokens[2, num_tokens:] = -1
    of_tiles[:, num_tiles:] = 0
