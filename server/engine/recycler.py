"""What the engine fetches from a store of recycled states instead of computing it, and what it keeps there.

Three kinds, asked for in this order: whole-text results (no forward pass at all), states after some layer
(only the layers above are run), blocks of the prefix (only the rest of the prompt is computed). Look-ups and
reads are workers' business; until its look-up has ended a request is not started, and one that takes too long
is given up: then everything is computed, and nothing asked for a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from scone.cache.recycle_cost import HeldState, RecycleCost
from scone.cache.recycled_stats import StateTier
from scone.cache.recycled_store import RecycledStore
from scone.server.engine import scheduler
from scone.server.engine.block_form import BlockForm
from scone.server.engine.block_forms import BlockForms
from scone.server.engine.block_restorer import BlockRestorer, Post
from scone.server.engine.block_saver import BlockSaver
from scone.server.engine.generation import Generation
from scone.server.engine.layer_states import LayerStates, states_name, unpack_states
from scone.server.engine.observer import EngineObserver
from scone.server.engine.recycled_results import Result, pack_result, result_name, unpack_result
from scone.server.engine.scheduler import Chunk, Schedule, SchedulerState
from scone.server.sequence import Delta

logger = logging.getLogger(__name__)

LOOK_UP_PATIENCE_SECONDS = 1.0
RESTORE_PATIENCE = 2.0
"""A store that delivers nothing for so many times what computing the same would take, and
LOOK_UP_PATIENCE_SECONDS more, is given up."""

PAUSE_SECONDS = 10.0
"""How long nothing is asked of a store that did not answer in time."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the store has for a request.

    Attributes:
        result: its whole answer.
        states: (num_tokens, dim) after `layer` layers.
        blocks: the prefix's next blocks.
    """

    result: Result | None = None
    states: Tensor | None = None
    layer: int = 0
    blocks: StoredBlocks | None = None


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """Blocks of one prefix that are in the store, from number `first` on."""

    first: int
    forms: Sequence[BlockForm]
    tiers: Sequence[StateTier]

    @property
    def end(self) -> int:
        """The number of the first one that is not."""
        return self.first + len(self.forms)

    def form(self, block: int) -> BlockForm | None:
        """Of a block; None: it is not known to be there."""
        return self.forms[block - self.first] if self.first <= block < self.end else None

    def before(self, end: int) -> StoredBlocks:
        """Those before number `end`."""
        count = max(0, end - self.first)
        return StoredBlocks(self.first, self.forms[:count], self.tiers[:count])


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of the store for one sequence.

    Attributes:
        layers: states after any of these would do, the first that is held.
        num_cached: blocks of the prefix that are in memory.
        block_names: those that follow.
    """

    root: bytes
    token_ids: tuple[int, ...]
    result_name: bytes | None
    layers: range
    num_cached: int
    block_names: Sequence[bytes]


class Recycler:
    """The store, as one engine uses it; for the engine's thread."""

    def __init__(
        self,
        store: RecycledStore,
        cost: RecycleCost,
        forms: BlockForms,
        state: SchedulerState,
        num_layers: int,
        dtype: torch.dtype,
        post: Post,
        observer: Callable[[], EngineObserver],
        on_found: Callable[[Generation, Found], None],
    ) -> None:
        """Of a model with so many layers, whose states are of `dtype`.

        `on_found` is told what a look-up brought; of blocks worth fetching the scheduler knows by then.
        """
        self._store, self._cost, self._state = store, cost, state
        self.forms = forms
        self._num_layers, self._dtype, self._post = num_layers, dtype, post
        self._observer, self._on_found = observer, on_found
        self.restorer = BlockRestorer(store, state, post, self._restored)
        self.saver = BlockSaver(store, forms, state, post)
        self._stored: dict[scheduler.Sequence, StoredBlocks] = {}
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix="scone-look-up")
        self._asked: dict[Generation, float] = {}  # deadlines
        self._paused_until = 0.0

    def flush(self, timeout_seconds: float) -> bool:
        """Waits until the store has what it was given; whether it has. For any thread."""
        return self._store.flush(timeout_seconds)

    def close(self) -> None:
        """Waits for what workers are doing."""
        self._lookups.shutdown(cancel_futures=True)
        self.restorer.close()

    @property
    def is_busy(self) -> bool:
        """Whether workers read or look up, or what they brought is still to be taken over."""
        return bool(self._asked) or self.restorer.is_busy

    # -- before a sequence runs ----------------------------------------------------------------

    def look_up(self, generation: Generation) -> None:
        """Asks what the store has for a waiting sequence, which is not started before that is known."""
        seq = generation.seq
        now = time.monotonic()
        question = self._question(generation)
        if question is None or now < self._paused_until:
            seq.num_stored_blocks = 0
            return
        seq.num_stored_blocks = None
        self._asked[generation] = now + LOOK_UP_PATIENCE_SECONDS
        self._lookups.submit(self._answer, generation, question)

    def follow(self, schedule: Schedule, generations: dict[scheduler.Sequence, Generation]) -> None:
        """Begins the restores that were scheduled, gives up those that were preempted."""
        for seq in schedule.preempted:
            self._let_go(seq)
            self.look_up(generations[seq])
        for seq in schedule.restoring:
            size = self._state.pool.block_size
            blocks = range(seq.num_computed_tokens // size, len(seq.block_ids))
            seconds = RESTORE_PATIENCE * self._cost.compute_seconds(len(blocks) * size)
            stored, likely = self._stored[seq], self.forms.kept[0]
            # Blocks that were in memory when it was asked for the others, and are no more, may be stored.
            forms = [stored.form(block) or likely for block in blocks]
            self.restorer.begin(seq, forms, LOOK_UP_PATIENCE_SECONDS + seconds)

    def forget(self, generation: Generation) -> None:
        """Its sequence has ended, or is about to."""
        self._asked.pop(generation, None)
        self._let_go(generation.seq)

    def _let_go(self, seq: scheduler.Sequence) -> None:
        self.restorer.cancel(seq)
        self.saver.forget(seq)
        self._stored.pop(seq, None)

    def poll(self, step_seconds: float) -> None:
        """To be called between steps, which take so long: takes over what has come."""
        self.restorer.poll(step_seconds)
        now = time.monotonic()
        for generation, deadline in list(self._asked.items()):
            if now > deadline:
                self._pause("a look-up")
                self._found(generation, Found())

    def _question(self, generation: Generation) -> _Question | None:
        """None: nothing that is stored could help."""
        run, seq = generation.run, generation.seq
        names: Sequence[bytes] = ()
        num_cached = 0
        if seq.reuse_prefix and seq.root_hash:
            num_cached = len(scheduler.cached_blocks(self._state, seq))
            names = seq.block_hashes[num_cached : (len(seq.token_ids) - 1) // self._state.pool.block_size]
        has_begun = run.started_at is not None
        question = _Question(
            root=run.root,
            token_ids=run.request.input_ids,
            result_name=None if has_begun else result_name(run.request, run.root),
            layers=range(0) if has_begun else self._useful_layers(generation),
            num_cached=num_cached,
            block_names=names,
        )
        return question if question.result_name or question.layers or names else None

    def _useful_layers(self, generation: Generation) -> range:
        """The highest first; a completion needs the keys and values of all layers."""
        run = generation.run
        if run.pooler is None:
            return range(0)
        highest = self._num_layers - 1 if run.num_layers is None else run.num_layers
        return range(highest, 0, -1)

    def _answer(self, generation: Generation, question: _Question) -> None:
        """On a worker: looks up."""
        found = Found()
        try:
            found = self._look(question)
        except Exception:
            logger.exception("recycled states cannot be looked up")
        finally:
            self._post(partial(self._found, generation, found))

    def _look(self, question: _Question) -> Found:
        store, token_ids = self._store, np.array(question.token_ids, np.int32)
        if question.result_name is not None:
            payload = store.read("results", question.result_name, token_ids)
            if payload is not None:
                return Found(result=unpack_result(payload))
        for layer in question.layers:
            name = states_name(question.root, layer, question.token_ids)
            if store.find("layer_k", [name]):
                payload = store.read("layer_k", name, token_ids)
                if payload is not None:
                    states = unpack_states(payload, len(token_ids), self._dtype)
                    return Found(states=states, layer=layer)
        return Found(blocks=self._locate(question.num_cached, question.block_names))

    def _locate(self, first: int, names: Sequence[bytes]) -> StoredBlocks:
        """Those of `names` that are held, from the first on, in whichever form each."""
        forms: list[BlockForm] = []
        tiers: list[StateTier] = []
        num_missing = 0  # forms in a row that do not have the next block
        for form in cycle(self.forms.readable):
            if len(tiers) == len(names) or num_missing == len(self.forms.readable):
                break
            keys = [form.key(name) for name in names[len(tiers) :]]
            found = self._store.locate("blocks", keys, again=num_missing > 0)
            forms += [form] * len(found)
            tiers += found
            num_missing = 1 if found else num_missing + 1
        return StoredBlocks(first, forms, tiers)

    def _found(self, generation: Generation, found: Found) -> None:
        if self._asked.pop(generation, None) is None:  # ended meanwhile, or given up
            return
        seq = generation.seq
        seq.num_stored_blocks = 0
        if found.blocks is not None and found.blocks.forms:
            blocks = self._stored[seq] = found.blocks
            held = [
                HeldState(tier, form.block_bytes, form.work_seconds)
                for tier, form in zip(blocks.tiers, blocks.forms, strict=True)
            ]
            num_fetched = self._cost.num_to_fetch(held, self._state.pool.block_size)
            # Counted from where the question began: the cache may hold more of the prefix by now, or less.
            seq.num_stored_blocks = blocks.first + num_fetched
        self._on_found(generation, found)

    def _restored(self, seq: scheduler.Sequence, num_blocks: int, seconds: float, in_time: bool) -> None:
        end = seq.num_computed_tokens // self._state.pool.block_size
        self.saver.note_kept(seq, end - num_blocks, end)
        self._stored[seq] = self._stored[seq].before(end)  # those after it may be damaged: they are kept anew
        self._observer().on_restored(num_blocks * self._state.pool.block_size, seconds)
        if not in_time:
            self._pause("a restore")

    def _pause(self, what: str) -> None:
        """The store does not answer: what waits for it is computed."""
        logger.warning("%s took too long: no recycled states for %.0f s", what, PAUSE_SECONDS)
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        for seq in self._state.waiting:
            if seq.num_stored_blocks is not None:
                seq.num_stored_blocks = 0

    # -- when it runs --------------------------------------------------------------------------

    def expect(self, generations: Sequence[Generation], chunks: Sequence[Chunk]) -> None:
        """Is told of each step before it, so that blocks of prompts are kept as they are computed."""
        size = self._state.pool.block_size
        for generation, chunk in zip(generations, chunks, strict=True):
            seq, num_full = generation.seq, len(generation.run.request.input_ids) // size
            if seq.root_hash and chunk.start < num_full * size:
                stored = self._stored.get(seq)
                num_stored = max(generation.num_kept_blocks, 0 if stored is None else stored.end)
                begin = max(chunk.start // size, num_stored)
                self.saver.expect(seq, begin, min(-(-(chunk.start + chunk.num_tokens) // size), num_full))

    def note_speed(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Tells the cost model what a step of prompts took."""
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        if num_tokens >= 16 * len(chunks):
            self._cost.note_computed(num_tokens, seconds)

    def keep(self, generation: Generation, chunk: Chunk, hidden: Tensor) -> None:
        """Keeps what a prompt's chunk has made worth keeping: `hidden` (num_tokens, dim) and full blocks."""
        run, seq = generation.run, generation.seq
        if seq.root_hash:
            block_size = self._state.pool.block_size
            num_full = min(seq.num_computed_tokens, len(run.request.input_ids)) // block_size
            begin = generation.num_kept_blocks
            if num_full > begin:
                stored = self._stored.get(seq)
                if stored is not None:
                    self.saver.note_kept(seq, max(begin, stored.first), min(num_full, stored.end))
                self.saver.save(seq, begin, num_full, self._cost.compute_seconds(block_size))
                generation.num_kept_blocks = num_full
        if run.num_layers and run.num_layers > run.first_layer:
            if run.layer_states is None:
                run.layer_states = LayerStates()
            run.layer_states.add(chunk.start, hidden)
            if chunk.reaches_end:
                self._keep_states(generation, run.layer_states)

    def _keep_states(self, generation: Generation, states: LayerStates) -> None:
        run = generation.run
        assert run.num_layers is not None
        ids = run.request.input_ids
        self._store.write(
            "layer_k",
            states_name(run.root, run.num_layers, ids),
            np.array(ids, np.int32),
            states.payload,
            cost_seconds=self._cost.compute_seconds(len(ids)) * run.num_layers / self._num_layers,
        )

    def keep_result(self, generation: Generation, delta: Delta) -> None:
        """Keeps the answer of a request that its text determines."""
        run = generation.run
        name = result_name(run.request, run.root)
        if name is None or delta.finish_reason not in ("stop", "length") or run.is_recalled:
            return
        payload = pack_result(delta)
        if payload is not None:
            ids = np.array(run.request.input_ids, np.int32)
            seconds = self._cost.compute_seconds(len(ids))
            self._store.write("results", name, ids, payload, cost_seconds=seconds)
