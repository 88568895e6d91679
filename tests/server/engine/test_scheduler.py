"""Random lives of many sequences: blocks are neither leaked nor shared by mistake, and all ends."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.cache.state_identity import StateIdentity
from scone.server.engine import scheduler
from scone.server.engine.kv_blocks import BlockPool
from scone.server.engine.scheduler import Chunk, SchedulerState, Sequence, Status

BLOCK_SIZE = 4


def root(salt: str) -> bytes:
    return StateIdentity(model_hash="m", tokenizer_hash="t").root(salt)


class Simulation:
    """Drives the scheduler as the engine does, and checks its promises after every step.

    `content` stands for the KV cache: what each slot was last given. A computed chunk must find, in its
    own blocks, exactly the tokens that come before it. `stored` blocks can be fetched; `saving` ones are
    held by whoever copies them.
    """

    def __init__(self, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int):
        self.state = SchedulerState(
            BlockPool(num_blocks, BLOCK_SIZE), max_num_seqs, max_num_batched_tokens, max_model_len
        )
        self.content: dict[int, list[tuple[int, ...] | None]] = {
            b: [None] * BLOCK_SIZE for b in range(num_blocks)
        }
        self.to_generate: dict[Sequence, int] = {}
        self.to_fork: dict[Sequence, int] = {}
        self.stored: set[bytes] = set()
        self.saving: list[int] = []

    def add(
        self, arrival: int, prompt: list[int], num_tokens: int, n: int, salt: str, is_looked_up: bool = False
    ) -> None:
        seq = Sequence(arrival, 0, list(prompt), root(salt))
        seq.ready_to = len(prompt)
        if is_looked_up:
            seq.num_stored_blocks = None
        self.to_generate[seq] = num_tokens
        self.to_fork[seq] = n - 1
        scheduler.add(self.state, seq)

    def look_up(self, seq: Sequence) -> None:
        """Says how much of a sequence is in memory or stored, as whoever looks it up does later."""
        cached = scheduler.cached_blocks(self.state, seq)
        hashes = seq.block_hashes[len(cached) : (len(seq.token_ids) - 1) // BLOCK_SIZE]
        num_stored = next((i for i, h in enumerate(hashes) if h not in self.stored), len(hashes))
        seq.num_stored_blocks = len(cached) + num_stored

    def fetch(self, seq: Sequence, num_fetched: int) -> None:
        """What was asked for has come, or the first few blocks of it."""
        begin = seq.num_computed_tokens
        for position in range(begin, begin + num_fetched * BLOCK_SIZE):
            block = seq.block_ids[position // BLOCK_SIZE]
            assert self.state.pool.ref_count(block) == 1, "fetches into a shared block"
            self.content[block][position % BLOCK_SIZE] = tuple(seq.token_ids[: position + 1])
        scheduler.end_restoring(self.state, seq, num_fetched)
        assert seq.num_computed_tokens < len(seq.token_ids)

    def save(self, seq: Sequence) -> None:
        """A full block is held for a while by whoever copies it."""
        num_full = seq.num_computed_tokens // BLOCK_SIZE
        self.stored |= set(seq.block_hashes[:num_full])
        for block in seq.block_ids[: num_full if seq.status is Status.RUNNING else 0][-1:]:
            self.state.pool.share(block)
            self.saving.append(block)

    @property
    def restoring(self) -> list[Sequence]:
        return [s for s in self.state.running if s.status is Status.RESTORING]

    def step(self) -> int:
        schedule = scheduler.schedule(self.state)
        for seq in schedule.restoring:
            for block in seq.block_ids[seq.num_computed_tokens // BLOCK_SIZE :]:
                self.content[block] = [None] * BLOCK_SIZE
        self.check(schedule)
        for chunk in schedule.chunks:
            self.compute(chunk)
        return len(schedule.chunks)

    def compute(self, chunk: Chunk) -> None:
        seq = chunk.seq
        for position in range(chunk.start + chunk.num_tokens):
            block, place = seq.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE
            # A key depends on all tokens up to its own, so that is what stands for it.
            value = tuple(seq.token_ids[: position + 1])
            if position >= chunk.start:
                self.content[block][place] = value
            assert self.content[block][place] == value, "a block was overwritten or wrongly reused"
        scheduler.commit(self.state, chunk)
        if not chunk.reaches_end:
            return
        begun = [seq]
        for index in range(1, self.to_fork.pop(seq, 0) + 1):
            child = Sequence(
                seq.arrival, index, list(seq.token_ids), seq.root_hash, ready_to=len(seq.token_ids)
            )
            self.to_generate[child] = self.to_generate[seq]
            copies = scheduler.fork(self.state, seq, child)
            if copies is not None:
                begun.append(child)
                for source, target in copies:
                    self.content[target] = list(self.content[source])
        for one in begun:
            self.generate(one)

    def generate(self, seq: Sequence) -> None:
        self.to_generate[seq] -= 1
        if self.to_generate[seq] == 0 or len(seq.token_ids) == self.state.max_model_len:
            self.end(seq)
        else:
            seq.token_ids.append(seq.index)
            seq.ready_to = len(seq.token_ids)

    def end(self, seq: Sequence) -> None:
        scheduler.finish(self.state, seq)
        del self.to_generate[seq]

    def check(self, schedule: scheduler.Schedule) -> None:
        state, pool = self.state, self.state.pool
        assert sum(c.num_tokens for c in schedule.chunks) <= state.max_num_batched_tokens
        assert len(state.running) <= state.max_num_seqs
        for group in (state.running, state.waiting):
            assert group == sorted(group, key=lambda s: s.age_key)
        assert all(s.status in (Status.RUNNING, Status.RESTORING) for s in state.running)
        assert all(s.num_stored_blocks is not None for s in schedule.restoring)
        assert all(s.status is Status.RESTORING for s in schedule.restoring)
        fetched = [
            h
            for s in self.restoring
            for h in s.block_hashes[s.num_computed_tokens // BLOCK_SIZE : len(s.block_ids)]
        ]
        assert len(set(fetched)) == len(fetched), "a block is fetched twice at a time"
        assert all(s.status is Status.WAITING and not s.block_ids for s in state.waiting)
        assert {*state.running, *state.waiting} == self.to_generate.keys()
        holders = Counter([*self.saving, *(b for s in state.running for b in s.block_ids)])
        for block in range(pool.num_blocks):
            assert pool.ref_count(block) == holders[block]
        assert pool.num_free == sum(holders[b] == 0 for b in range(pool.num_blocks))
        scheduled = [c.seq for c in schedule.chunks]
        assert len(set(scheduled)) == len(scheduled)
        for chunk in schedule.chunks:
            seq = chunk.seq
            assert seq.status is Status.RUNNING
            assert chunk.start == seq.num_computed_tokens
            assert seq.ready_from <= chunk.start
            assert chunk.start + chunk.num_tokens <= min(seq.ready_to, len(seq.token_ids))
            written = range(chunk.start // BLOCK_SIZE, -(-(chunk.start + chunk.num_tokens) // BLOCK_SIZE))
            assert all(pool.ref_count(seq.block_ids[b]) == 1 for b in written), "writes to a shared block"


ACTIONS = ["cancel", "hold", "release", "look up", "fetch", "save", "saved", "forget"]


def num_missing(seq: Sequence) -> int:
    return len(seq.block_ids) - seq.num_computed_tokens // BLOCK_SIZE


def act(simulation: Simulation, action: str, seq: Sequence, data: st.DataObject) -> None:
    if action == "cancel":
        simulation.end(seq)
    elif action == "hold":
        seq.ready_to = data.draw(st.integers(0, len(seq.token_ids)))
    elif action == "release":
        seq.ready_to = len(seq.token_ids)
    elif action == "look up" and seq.status is Status.WAITING:
        simulation.look_up(seq)
    elif action == "fetch" and seq.status is Status.RESTORING:
        simulation.fetch(seq, data.draw(st.integers(0, num_missing(seq))))
    elif action == "save":
        simulation.save(seq)
    elif action == "saved" and simulation.saving:
        simulation.state.pool.release([simulation.saving.pop(0)])
    elif action == "forget":  # the store drops what it likes
        simulation.stored.clear()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_admitted_sequence_ends_and_no_block_is_lost(data: st.DataObject) -> None:
    max_model_len = data.draw(st.integers(4, 40))
    num_blocks = -(-max_model_len // BLOCK_SIZE) + data.draw(st.integers(0, 12))
    max_num_seqs = data.draw(st.integers(1, 6))
    simulation = Simulation(num_blocks, max_num_seqs, data.draw(st.integers(max_num_seqs, 24)), max_model_len)
    for arrival in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=max_model_len))
        simulation.add(
            arrival,
            prompt,
            data.draw(st.integers(1, 20)),
            data.draw(st.integers(1, 4)),
            data.draw(st.sampled_from("ab")),
            is_looked_up=data.draw(st.booleans()),
        )
        for _ in range(data.draw(st.integers(0, 4))):
            live = list(simulation.to_generate)
            action = data.draw(st.sampled_from(["step", "step", *ACTIONS]))
            if action == "step":
                simulation.step()
            elif live:
                act(simulation, action, live[data.draw(st.integers(0, len(live) - 1))], data)
    for _ in range(5000):
        for seq in list(simulation.to_generate):
            seq.ready_to = len(seq.token_ids)
            if seq.num_stored_blocks is None:
                simulation.look_up(seq)
            if seq.status is Status.RESTORING:
                simulation.fetch(seq, data.draw(st.integers(0, num_missing(seq))))
        simulation.state.pool.release(simulation.saving)
        simulation.saving.clear()
        if not simulation.to_generate:
            break
        num_chunks = simulation.step()
        assert num_chunks or simulation.restoring, "sequences are left but nothing can run"
    assert not simulation.to_generate
    assert simulation.state.pool.num_free == num_blocks


def test_decoding_goes_before_prefill() -> None:
    simulation = Simulation(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=100)
    simulation.add(0, [0] * 60, 5, 1, "")
    simulation.add(1, [1] * 3, 5, 1, "")
    old, young = simulation.to_generate
    old.ready_to = 4
    simulation.step()  # 4 of the old one, all of the young one
    old.ready_to = 60
    schedule = scheduler.schedule(simulation.state)
    assert [(c.seq, c.num_tokens) for c in schedule.chunks] == [(young, 1), (old, 7)]


def test_the_young_are_preempted_for_the_old() -> None:
    simulation = Simulation(num_blocks=5, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=20)
    simulation.add(0, [0] * 8, 12, 1, "")
    simulation.add(1, [1] * 8, 12, 1, "")
    old, young = simulation.to_generate
    simulation.step()
    while not young.num_preemptions:
        simulation.step()
    assert old.num_preemptions == 0
    assert young.status is Status.WAITING


def test_a_starved_sequence_lets_others_pass() -> None:
    simulation = Simulation(num_blocks=16, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=40)
    simulation.add(0, [0] * 8, 2, 1, "")
    simulation.add(1, [1] * 4, 2, 1, "")
    starved, other = simulation.to_generate
    starved.ready_to = 0
    schedule = scheduler.schedule(simulation.state)
    assert [c.seq for c in schedule.chunks] == [other]
    assert schedule.starved == [starved]


def stored_simulation(**limits: int) -> tuple[Simulation, list[int]]:
    """A simulation whose store holds all blocks of a prompt of 17 tokens, and the prompt."""
    simulation = Simulation(**{"num_blocks": 16, "max_num_seqs": 4, "max_num_batched_tokens": 8} | limits)
    prompt = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1]
    known = Sequence(99, 0, prompt, root("a"))
    scheduler.cached_blocks(simulation.state, known)
    simulation.stored = set(known.block_hashes)
    return simulation, prompt


def test_stored_blocks_are_fetched_and_only_the_rest_is_computed() -> None:
    simulation, prompt = stored_simulation(max_model_len=40)
    simulation.add(0, prompt, 2, 1, "a", is_looked_up=True)
    (seq,) = simulation.to_generate
    assert simulation.step() == 0, "nothing is known of it yet"
    simulation.look_up(seq)
    assert seq.num_stored_blocks == 4
    assert simulation.step() == 0
    assert (seq.status, len(seq.block_ids)) == (Status.RESTORING, 4)
    simulation.fetch(seq, 3)
    schedule = scheduler.schedule(simulation.state)
    assert [(c.start, c.num_tokens) for c in schedule.chunks] == [(12, 5)]
    assert seq.num_cached_tokens == 12


def test_a_restoring_sequence_delays_nobody_and_may_be_preempted() -> None:
    simulation, prompt = stored_simulation(num_blocks=10, max_model_len=40)
    simulation.add(0, [1] * 8, 30, 1, "")
    simulation.add(1, prompt, 2, 1, "a", is_looked_up=True)
    old, young = simulation.to_generate
    simulation.look_up(young)
    simulation.step()
    assert young.status is Status.RESTORING
    while not young.num_preemptions:
        assert simulation.step() == 1, "the other one goes on"
    assert (young.status, young.block_ids) == (Status.WAITING, [])
    assert old.num_preemptions == 0


def test_one_prefix_is_fetched_once_at_a_time() -> None:
    simulation, prompt = stored_simulation(max_model_len=40)
    for arrival in range(2):
        simulation.add(arrival, prompt, 2, 1, "a", is_looked_up=True)
    first, second = simulation.to_generate
    simulation.look_up(first)
    simulation.look_up(second)
    simulation.step()
    assert (first.status, second.status) == (Status.RESTORING, Status.WAITING)
    simulation.fetch(first, 4)
    assert simulation.step() == 2
    assert second.num_cached_tokens == 16, "the second found the blocks in memory"


def test_a_restore_that_is_cancelled_gives_its_blocks_back() -> None:
    simulation, prompt = stored_simulation(max_model_len=40)
    simulation.add(0, prompt, 2, 1, "a", is_looked_up=True)
    (seq,) = simulation.to_generate
    simulation.look_up(seq)
    simulation.step()
    simulation.end(seq)
    assert simulation.state.pool.num_free == 16
    assert simulation.state.pool.find(seq.block_hashes) == [], "nothing was fetched, so nothing is known"


def test_too_small_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="raise kv_cache_bytes or lower max_model_len"):
        SchedulerState(BlockPool(4, 16), 1, 1, max_model_len=65)
