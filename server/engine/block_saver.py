"""Blocks of the KV cache that are kept in a store, behind the steps.

The blocks of prompts are kept, once each. A block of an answer is kept when a later prompt begins with it:
until then nothing says that it will be wanted, and to write every token generated would wear a disk out for
little. The store's writer copies a block on its own thread, while a reference keeps it from being reused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scone.cache.device import Device, Stream
from scone.cache.recycled_store import RecycledStore
from scone.server.engine import scheduler
from scone.server.engine.block_restorer import Post
from scone.server.engine.model_runner import BlockMemory
from scone.server.engine.scheduler import SchedulerState

MOST_HELD = 0.25
"""Share of the pool that may be held for the writer; beyond it, blocks are dropped."""


class BlockSaver:
    """Saves blocks for one engine; for its thread."""

    def __init__(
        self, store: RecycledStore, memory: BlockMemory, device: Device, state: SchedulerState, post: Post
    ) -> None:
        self._store, self._memory, self._device, self._state = store, memory, device, state
        self._post = post
        self._computed = device.event()
        self._kept: dict[int, bytes] = {}  # by block id: the name of what was last queued or fetched
        self.num_held = 0

    def note_kept(self, seq: scheduler.Sequence, begin: int, end: int) -> None:
        """Blocks [begin, end) of a sequence come from the store."""
        for block in range(begin, end):
            self._kept[seq.block_ids[block]] = seq.block_hashes[block]

    def save(self, seq: scheduler.Sequence, begin: int, end: int, block_seconds: float) -> None:
        """Queues blocks [begin, end) of a running sequence, all of them computed; never waits.

        Args:
            block_seconds: what computing one block takes.
        """
        pool = self._state.pool
        self._device.record(self._computed, Stream.COMPUTE)
        for block in range(begin, end):
            block_id, name = seq.block_ids[block], seq.block_hashes[block]
            # Where another block has the name, that one was saved, or will be.
            if self._kept.get(block_id) == name or pool.find([name]) != [block_id]:
                continue
            if self.num_held >= MOST_HELD * pool.num_blocks:
                self._store.stats.add_write("blocks", "dropped")
                continue
            pool.share(block_id)
            self.num_held += 1
            is_queued = self._store.write(
                "blocks",
                name,
                np.array(seq.token_ids[block * pool.block_size : (block + 1) * pool.block_size], np.int32),
                partial(self._payload, block_id),
                cost_seconds=block_seconds,
                depth=block,
                on_done=partial(self._post, partial(self._release, block_id)),
            )
            if is_queued:
                self._kept[block_id] = name

    def _payload(self, block_id: int) -> NDArray[np.uint8]:
        """On the writer's thread: the block's bytes, which nobody changes while it is held."""
        copy = self._device.copy_to_host(self._memory.block(block_id), self._computed)
        if not _is_finite(copy.numpy(), self._memory.dtype):
            raise ValueError(f"block {block_id} holds values that are not finite: it is not kept")
        return copy.numpy()

    def _release(self, block_id: int) -> None:
        self.num_held -= 1
        self._state.pool.release([block_id])


def _is_finite(values: NDArray[np.uint8], dtype: torch.dtype) -> bool:
    """Whether the bytes hold no infinity and no NaN. In NumPy: torch would start threads of its own."""
    if dtype is torch.bfloat16:  # unknown to NumPy: all bits of the exponent are set
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    floats: NDArray[Any] = values.view({torch.float32: np.float32, torch.float16: np.float16}[dtype])
    return bool(np.isfinite(floats).all())
