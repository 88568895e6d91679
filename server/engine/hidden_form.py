"""Blocks kept as the inputs of all layers, from which their keys and values are computed when restored.

Half the bytes of keys and values where attention is multi-head. A step writes the inputs of blocks that are
to be kept to slots of memory beside the KV cache (`batch.states`); restored ones are read to other slots, and
the same kernels make the same bits of keys and values from them. Only on a CPU, by the native kernels.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scone.server.engine import scheduler
from scone.server.engine.block_form import FormName, Held, Landing
from scone.server.engine.block_landing import MOST_UNDER_WAY, UNDER_WAY_BYTES
from scone.server.engine.finite import is_finite
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.kv_form import MOST_HELD
from scone.server.engine.model_runner import StateMemory

LAID_TOGETHER = 16
"""Blocks that are computed in one call: more would only keep commands waiting longer."""

MEASURED_BLOCKS = 6
"""What the speed is measured by at the start: as many rows as the kernels take together."""

_WEIGHT = 0.2
"""Of the newest measurement; those before it keep the rest."""


class HiddenForm:
    """See `BlockForm`."""

    name: FormName = "hidden"
    laid_beside_others = 1
    laying_share = 0.25  # a chunk of a prompt would take a whole step

    def __init__(self, memory: StateMemory, pool: BlockPool) -> None:
        """To restore blocks; `measure` it before use, and `start_keeping` if it is to keep them too."""
        self._memory, self._pool = memory, pool
        self.block_bytes = memory.state_bytes
        num_slots = min(max(3, UNDER_WAY_BYTES // self.block_bytes), MOST_UNDER_WAY)
        self._arriving = _Slots(memory.new_states(min(num_slots, pool.num_blocks)))
        self._computed = _Slots(self._arriving.states[:0])  # none, before `start_keeping`
        self.work_seconds = 0.0
        self._layout = "x".join(map(str, self._arriving.states.shape[1:])).encode()

    def measure(self) -> None:
        """Finds out what laying takes, before the first request; what it writes to the KV cache is finite."""
        ids = list(range(min(MEASURED_BLOCKS, len(self._arriving.states))))
        seconds = []
        for _ in range(3):  # the first time touches memory, and others may be at work
            began = time.perf_counter()
            self._memory.restore_blocks(self._arriving.states, ids, ids, [0] * len(ids))
            seconds.append(time.perf_counter() - began)
        self.work_seconds = min(seconds) / len(ids)

    def start_keeping(self) -> None:
        """From now on steps keep what `expect` asks for."""
        num_slots = max(1, int(MOST_HELD * self._pool.num_blocks))
        self._computed = _Slots(self._memory.new_states(num_slots))
        self._memory.keep_states_in(self._computed.states)

    @property
    def staging_bytes(self) -> int:
        return self._arriving.num_bytes + self._computed.num_bytes

    @property
    def num_landings(self) -> int:
        return self._arriving.num_in_use

    def key(self, block_hash: bytes) -> bytes:
        return hashlib.sha256(b"hidden:" + self._layout + b":" + block_hash).digest()

    # -- from the store ------------------------------------------------------------------------

    def reserve(self, block_id: int, first_position: int) -> Landing | None:
        slot = self._arriving.take()
        return None if slot is None else _StateLanding(self._arriving, slot, block_id, first_position)

    def lay(self, landings: Sequence[Landing]) -> None:
        for begin in range(0, len(landings), LAID_TOGETHER):
            some = cast(Sequence[_StateLanding], landings[begin : begin + LAID_TOGETHER])
            began = time.perf_counter()
            self._memory.restore_blocks(
                self._arriving.states,
                [x.slot for x in some],
                [x.block_id for x in some],
                [x.first_position for x in some],
            )
            newest = (time.perf_counter() - began) / len(some)
            self.work_seconds += _WEIGHT * (newest - self.work_seconds)

    # -- to the store --------------------------------------------------------------------------

    def expect(self, seq: scheduler.Sequence, begin: int, end: int) -> None:
        for block in range(begin, end):
            has_begun = block * self._pool.block_size < seq.num_computed_tokens
            if has_begun or block in seq.state_slots:
                continue
            slot = self._computed.take()
            if slot is None:
                return
            seq.state_slots[block] = slot

    def hold(self, seq: scheduler.Sequence, block: int) -> Held | None:
        slot = seq.state_slots.pop(block, None)
        return None if slot is None else _HeldStates(self._computed, slot)

    def forget(self, seq: scheduler.Sequence, end: int | None = None) -> None:
        for block in [b for b in seq.state_slots if end is None or b < end]:
            self._computed.give_back(seq.state_slots.pop(block))


class _Slots:
    """Memory for the states of some blocks, (num_slots, num_layers, block_size, dim)."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self._free = list(range(len(states)))  # the last used first: its pages are there

    @property
    def num_bytes(self) -> int:
        return self.states.nbytes

    @property
    def num_in_use(self) -> int:
        return len(self.states) - len(self._free)

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def bytes_of(self, slot: int) -> NDArray[np.uint8]:
        """(1, n) view."""
        return self.states[slot].view(torch.uint8).view(1, -1).numpy()


class _StateLanding:
    def __init__(self, slots: _Slots, slot: int, block_id: int, first_position: int) -> None:
        self._slots = slots
        self.slot, self.block_id, self.first_position = slot, block_id, first_position
        self.out = slots.bytes_of(slot)

    def release(self) -> None:
        self._slots.give_back(self.slot)


class _HeldStates:
    def __init__(self, slots: _Slots, slot: int) -> None:
        self._slots, self._slot = slots, slot

    def payload(self) -> NDArray[np.uint8]:
        values = self._slots.bytes_of(self._slot).reshape(-1)
        if not is_finite(values, self._slots.states.dtype):
            raise ValueError("the inputs of a block's layers are not finite: it is not kept")
        return values

    def release(self) -> None:
        self._slots.give_back(self._slot)
