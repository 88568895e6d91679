"""Blocks that are kept in a store, behind the steps.

The blocks of prompts are kept, once each. A block of an answer is kept when a later prompt begins with it:
until then nothing says that it will be wanted, and to write every token generated would wear a disk out for
little. The store's writer copies a block on its own thread, while it is held in one of its forms.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from scone.cache.recycled_store import RecycledStore
from scone.server.engine import scheduler
from scone.server.engine.block_form import BlockForm, Held
from scone.server.engine.block_forms import BlockForms
from scone.server.engine.block_restorer import Post
from scone.server.engine.scheduler import SchedulerState


class BlockSaver:
    """Saves blocks for one engine; for its thread."""

    def __init__(self, store: RecycledStore, forms: BlockForms, state: SchedulerState, post: Post) -> None:
        self._store, self._forms, self._state, self._post = store, forms, state, post
        self._kept: dict[int, bytes] = {}  # by block id: the name of what was last queued or fetched
        self.num_held = 0

    def note_kept(self, seq: scheduler.Sequence, begin: int, end: int) -> None:
        """Blocks [begin, end) of a sequence are in the store."""
        for block in range(begin, end):
            self._kept[seq.block_ids[block]] = seq.block_hashes[block]

    def expect(self, seq: scheduler.Sequence, begin: int, end: int) -> None:
        """The next step computes (parts of) blocks [begin, end) of a sequence, which are to be saved then."""
        for form in self._forms.kept:
            form.expect(seq, begin, end)

    def forget(self, seq: scheduler.Sequence) -> None:
        """Nothing more of a sequence will be saved, or all of it is computed anew."""
        for form in self._forms.kept:
            form.forget(seq)

    def save(self, seq: scheduler.Sequence, begin: int, end: int, block_seconds: float) -> None:
        """Queues blocks [begin, end) of a running sequence, all of them computed; never waits.

        Args:
            block_seconds: what computing one block takes.
        """
        pool = self._state.pool
        for block in range(begin, end):
            block_id, name = seq.block_ids[block], seq.block_hashes[block]
            # Where another block has the name, that one was saved, or will be.
            if self._kept.get(block_id) == name or pool.find([name]) != [block_id]:
                continue
            for form in self._forms.kept:
                held = form.hold(seq, block)
                if held is not None:
                    if self._queue(seq, block, form, held, block_seconds):
                        self._kept[block_id] = name
                    break
            else:
                self._store.stats.add_write("blocks", "dropped")
        for form in self._forms.kept:
            form.forget(seq, end)

    def _queue(
        self, seq: scheduler.Sequence, block: int, form: BlockForm, held: Held, block_seconds: float
    ) -> bool:
        """Whether the writer has taken the block."""
        self.num_held += 1
        size = self._state.pool.block_size
        return self._store.write(
            "blocks",
            form.key(seq.block_hashes[block]),
            np.array(seq.token_ids[block * size : (block + 1) * size], np.int32),
            held.payload,
            cost_seconds=max(0.0, block_seconds - form.work_seconds),
            depth=block,
            on_done=partial(self._post, partial(self._release, held)),
        )

    def _release(self, held: Held) -> None:
        self.num_held -= 1
        held.release()
