"""Which tokens of which sequences the next step computes.

Plain functions over `SchedulerState`; no torch, no clock, no threads. Order of arrival is the only
priority. Each step serves decoding sequences first, then prefill chunks of running ones, then admits
waiting ones, within `max_num_batched_tokens`. A sequence whose next rows are not staged is passed
over: a slow read delays nobody else.

A prompt's beginning is taken from blocks in memory if they are there, then from stored ones, and only then
computed. While stored blocks are fetched, a sequence is RESTORING: it has a seat and all its blocks, may be
preempted or finished like a running one, and is passed over until `end_restoring`.

When blocks run out, a sequence may preempt younger ones that the step has not served yet (their
tokens are computed again later); otherwise it keeps what it holds and waits. The oldest sequence can
therefore always go on as long as the pool holds one sequence of full length, which `SchedulerState`
checks, each fetch ends, and others hold blocks (to copy them) only for a while. So every admitted
sequence ends.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from scone.cache.state_identity import extend_block_hashes
from scone.server.engine.kv_blocks import BlockPool


class Status(Enum):
    WAITING = "waiting"
    RESTORING = "restoring"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and its continuation, as the scheduler sees it.

    Attributes:
        arrival, index: order of arrival of the request; place among its `n` sequences.
        token_ids: prompt and generated tokens.
        root_hash: what the hashes of its blocks are chained to.
        reuse_prefix: whether cached blocks may stand in for computing the prompt.
        wants_all_states: whether the hidden states of all tokens are asked for, or only the last one's.
        num_computed_tokens: tokens whose keys and values are in its blocks.
        ready_from, ready_to: tokens in this range have their input rows staged (or need none).
        num_cached_tokens: tokens taken from the prefix cache or the store when it was first started.
        num_stored_blocks: blocks from the first on that are in memory or stored, and worth fetching; None
            while that is not known, and until then it is not started.
        state_slots: by the number of a block: where a step is to keep what goes into the layers.
    """

    arrival: int
    index: int
    token_ids: list[int]
    root_hash: bytes = b""
    reuse_prefix: bool = True
    wants_all_states: bool = True
    num_computed_tokens: int = 0
    ready_from: int = 0
    ready_to: int = 0
    num_cached_tokens: int = 0
    num_stored_blocks: int | None = 0
    num_preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    state_slots: dict[int, int] = field(default_factory=dict)
    status: Status = Status.WAITING

    @property
    def age_key(self) -> tuple[int, int]:
        return (self.arrival, self.index)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def num_runnable_tokens(self) -> int:
        """Tokens that could be computed now if only rows mattered."""
        if self.ready_from > self.num_computed_tokens:
            return 0
        return max(0, min(self.ready_to, len(self.token_ids)) - self.num_computed_tokens)


class Chunk(NamedTuple):
    """Tokens `[start, start + num_tokens)` of a sequence, to be computed in one step."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """Whether the chunk's last token is the sequence's last, so that a next one can be sampled."""
        return self.start + self.num_tokens == len(self.seq.token_ids)

    @property
    def num_wanted(self) -> int:
        """Hidden states of so many of its last tokens are asked for."""
        return self.num_tokens if self.seq.wants_all_states else int(self.reaches_end)


@dataclass(slots=True)
class Schedule:
    """One step's work; `starved` sequences could have run but for rows from their `ready_from` on.

    `restoring` ones begin to: their blocks from `num_computed_tokens` on are to be fetched.
    """

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    starved: list[Sequence] = field(default_factory=list)
    restoring: list[Sequence] = field(default_factory=list)
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0


@dataclass(slots=True)
class SchedulerState:
    """Everything the scheduler knows; `waiting` and `running`, restoring ones included, are sorted by age."""

    pool: BlockPool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        capacity = self.pool.num_blocks * self.pool.block_size
        if capacity < self.max_model_len:
            raise ValueError(
                f"the KV cache holds {capacity} tokens, wanted at least max_model_len "
                f"({self.max_model_len}): raise kv_cache_bytes or lower max_model_len"
            )


def add(state: SchedulerState, seq: Sequence) -> None:
    """Queues a new sequence."""
    assert 0 < len(seq.token_ids) <= state.max_model_len
    bisect.insort(state.waiting, seq, key=lambda s: s.age_key)


def schedule(state: SchedulerState) -> Schedule:
    """Chooses the next step and reserves its blocks; call `commit` for each chunk once computed."""
    result = Schedule()
    budget, block_size = state.max_num_batched_tokens, state.pool.block_size
    served: set[int] = set()
    for seq in _serving_order(state):
        if budget == 0:
            break
        if seq.status is not Status.RUNNING:  # restoring; or preempted by an older one, earlier in this loop
            continue
        num_tokens = min(seq.num_runnable_tokens(), budget)
        if num_tokens == 0:
            result.starved.append(seq)
            continue
        start = seq.num_computed_tokens
        has_blocks = start + num_tokens <= len(seq.block_ids) * block_size
        if not (has_blocks or _reserve(state, seq, num_tokens, served, result)):
            continue
        served.add(id(seq))
        result.chunks.append(Chunk(seq, start, num_tokens))
        budget -= num_tokens
    if not result.preempted:
        _admit(state, budget, result)
    return result


def commit(state: SchedulerState, chunk: Chunk) -> None:
    """Records that a chunk was computed, and makes its full blocks findable."""
    seq, pool = chunk.seq, state.pool
    num_full_before = seq.num_computed_tokens // pool.block_size
    seq.num_computed_tokens = chunk.start + chunk.num_tokens
    num_full = seq.num_computed_tokens // pool.block_size
    if num_full > num_full_before and seq.root_hash:
        extend_block_hashes(seq.block_hashes, seq.root_hash, seq.token_ids, pool.block_size, num_full)
        for block in range(num_full_before, num_full):
            pool.register(seq.block_ids[block], seq.block_hashes[block])


def finish(state: SchedulerState, seq: Sequence, *, forget: bool = False) -> None:
    """Ends a sequence in any state; `forget` drops its blocks' content from the prefix cache."""
    if seq.status is Status.WAITING:
        state.waiting.remove(seq)
    elif seq.status is not Status.FINISHED:
        state.running.remove(seq)
        if forget:
            for block_id in seq.block_ids:
                state.pool.forget(block_id)
        _release(state, seq)
    seq.status = Status.FINISHED


def forget_prefix(state: SchedulerState, seq: Sequence) -> None:
    """Drops from the prefix cache what an ended sequence has made findable."""
    for block_id in state.pool.find(seq.block_hashes):
        state.pool.forget(block_id)


def end_restoring(state: SchedulerState, seq: Sequence, num_fetched: int) -> None:
    """The next `num_fetched` blocks of a restoring sequence have their content: it runs on from there.

    Blocks that it was given for more than that are given back: somebody may still be writing to them, and
    holds them as long.
    """
    assert seq.status is Status.RESTORING
    pool = state.pool
    begin = seq.num_computed_tokens // pool.block_size
    end = begin + num_fetched
    for block in range(begin, end):
        pool.register(seq.block_ids[block], seq.block_hashes[block])
    pool.release(reversed(seq.block_ids[end:]))
    del seq.block_ids[end:]
    seq.num_computed_tokens += num_fetched * pool.block_size
    if seq.num_preemptions == 0:
        seq.num_cached_tokens = seq.num_computed_tokens
    seq.num_stored_blocks = 0  # what could not be fetched is not tried again
    seq.status = Status.RUNNING


def fork(state: SchedulerState, parent: Sequence, child: Sequence) -> list[tuple[int, int]] | None:
    """Starts `child`, a copy of a running `parent`, from the parent's computed tokens.

    Full blocks are shared; returns the (source, target) blocks to copy, at most one: the partial one.
    Returns None if there was no room: then `child` waits and computes its own.
    """
    num_shared, num_partial = divmod(parent.num_computed_tokens, state.pool.block_size)
    if len(state.running) >= state.max_num_seqs or state.pool.num_free < bool(num_partial):
        add(state, child)
        return None
    child.block_ids = parent.block_ids[:num_shared]
    for block_id in child.block_ids:
        state.pool.share(block_id)
    child.block_hashes = parent.block_hashes[:num_shared]
    child.num_computed_tokens = parent.num_computed_tokens
    _start(state, child)
    if not num_partial:
        return []
    child.block_ids.append(state.pool.allocate())
    return [(parent.block_ids[num_shared], child.block_ids[-1])]


def cached_blocks(state: SchedulerState, seq: Sequence) -> list[int]:
    """Blocks of the prefix cache that a waiting sequence would start from; does not hold them.

    At least one token is always left to compute, since its logits are wanted.
    """
    if not (seq.reuse_prefix and seq.root_hash):
        return []
    num_blocks = (len(seq.token_ids) - 1) // state.pool.block_size
    extend_block_hashes(seq.block_hashes, seq.root_hash, seq.token_ids, state.pool.block_size, num_blocks)
    return state.pool.find(seq.block_hashes[:num_blocks])


def _serving_order(state: SchedulerState) -> list[Sequence]:
    """Running sequences: decoding ones first, so that long prompts do not hold them up."""
    decoding = [s for s in state.running if len(s.token_ids) - s.num_computed_tokens == 1]
    if len(decoding) == len(state.running):
        return decoding
    return decoding + [s for s in state.running if s.num_uncomputed_tokens != 1]


def _admit(state: SchedulerState, budget: int, result: Schedule) -> None:
    """Starts waiting sequences, oldest first, while there are tokens, seats and blocks."""
    fetched = _hashes_being_fetched(state) if state.waiting else set()
    for seq in list(state.waiting):
        if len(state.running) >= state.max_num_seqs:
            return
        if seq.num_stored_blocks is None:
            continue
        cached = cached_blocks(state, seq)
        restores = seq.num_stored_blocks > len(cached) and seq.reuse_prefix
        if restores and seq.block_hashes[len(cached)] in fetched:
            continue  # another one fetches it: soon it is in memory
        if budget == 0 and not restores:
            return
        # Room for the whole prompt, not only its first chunk, or it would soon be preempted.
        num_wanted = _num_blocks(state, len(seq.token_ids)) - len(cached)
        if state.pool.num_free - state.pool.num_free_among(cached) < num_wanted:
            return
        seq.num_computed_tokens = len(cached) * state.pool.block_size
        if restores:
            _begin_restoring(state, seq, cached, result)
            fetched |= _hashes_being_fetched_by(state, seq)
            continue
        num_tokens = min(seq.num_runnable_tokens(), budget)
        if num_tokens == 0:
            result.starved.append(seq)
            continue
        _take(state, seq, cached, result)
        reserved = _reserve(state, seq, num_tokens, set(), result)
        assert reserved, "admission has counted the blocks"
        result.chunks.append(Chunk(seq, seq.num_computed_tokens, num_tokens))
        budget -= num_tokens


def _take(state: SchedulerState, seq: Sequence, cached: list[int], result: Schedule) -> None:
    """Moves a waiting sequence among the running ones, with the cached blocks that it begins with."""
    for block_id in cached:
        state.pool.share(block_id)
    seq.block_ids = cached
    if seq.num_preemptions == 0:
        seq.num_cached_tokens = seq.num_computed_tokens
    state.waiting.remove(seq)
    _start(state, seq)
    result.num_prefix_queries += len(seq.token_ids) if seq.root_hash else 0
    result.num_prefix_hits += seq.num_computed_tokens


def _begin_restoring(state: SchedulerState, seq: Sequence, cached: list[int], result: Schedule) -> None:
    _take(state, seq, cached, result)
    seq.status = Status.RESTORING
    assert seq.num_stored_blocks is not None
    num_fetched = seq.num_stored_blocks - len(cached)
    seq.block_ids = cached + [state.pool.allocate() for _ in range(num_fetched)]
    result.restoring.append(seq)


def _hashes_being_fetched(state: SchedulerState) -> set[bytes]:
    return {h for seq in state.running for h in _hashes_being_fetched_by(state, seq)}


def _hashes_being_fetched_by(state: SchedulerState, seq: Sequence) -> set[bytes]:
    if seq.status is not Status.RESTORING:
        return set()
    begin = seq.num_computed_tokens // state.pool.block_size
    return set(seq.block_hashes[begin : len(seq.block_ids)])


def _start(state: SchedulerState, seq: Sequence) -> None:
    seq.status = Status.RUNNING
    bisect.insort(state.running, seq, key=lambda s: s.age_key)


def _reserve(
    state: SchedulerState, seq: Sequence, num_tokens: int, served: set[int], result: Schedule
) -> bool:
    """Gives `seq` the blocks for `num_tokens` more, preempting younger unserved ones if needed."""
    num_new = _num_blocks(state, seq.num_computed_tokens + num_tokens) - len(seq.block_ids)
    while state.pool.num_free < num_new:
        victim = _youngest_unserved(state, seq, served)
        if victim is None:
            return False
        _preempt(state, victim, result)
    seq.block_ids.extend(state.pool.allocate() for _ in range(num_new))
    return True


def _youngest_unserved(state: SchedulerState, seq: Sequence, served: set[int]) -> Sequence | None:
    """The youngest running sequence that is younger than `seq` and not yet in this step."""
    for other in reversed(state.running):
        if other.age_key <= seq.age_key:
            return None
        if id(other) not in served:
            return other
    return None


def _preempt(state: SchedulerState, seq: Sequence, result: Schedule) -> None:
    state.running.remove(seq)
    _release(state, seq)
    seq.num_computed_tokens = 0
    seq.num_preemptions += 1
    seq.status = Status.WAITING
    bisect.insort(state.waiting, seq, key=lambda s: s.age_key)
    result.preempted.append(seq)


def _release(state: SchedulerState, seq: Sequence) -> None:
    state.pool.release(reversed(seq.block_ids))
    seq.block_ids = []


def _num_blocks(state: SchedulerState, num_tokens: int) -> int:
    return -(-num_tokens // state.pool.block_size)
