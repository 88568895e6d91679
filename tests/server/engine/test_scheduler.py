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


class Simulation:
    """Drives the scheduler as the engine does, and checks its promises after every step.

    `content` stands for the KV cache: what each slot was last given. A computed chunk must find, in its
    own blocks, exactly the tokens that come before it.
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

    def add(self, arrival: int, prompt: list[int], num_tokens: int, n: int, salt: str) -> None:
        seq = Sequence(arrival, 0, list(prompt), StateIdentity(model_hash="m", tokenizer_hash="t").root(salt))
        seq.ready_to = len(prompt)
        self.to_generate[seq] = num_tokens
        self.to_fork[seq] = n - 1
        scheduler.add(self.state, seq)

    def step(self) -> int:
        schedule = scheduler.schedule(self.state)
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
        assert all(s.status is Status.RUNNING for s in state.running)
        assert all(s.status is Status.WAITING and not s.block_ids for s in state.waiting)
        assert {*state.running, *state.waiting} == self.to_generate.keys()
        holders = Counter(b for s in state.running for b in s.block_ids)
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
        )
        for _ in range(data.draw(st.integers(0, 3))):
            live = list(simulation.to_generate)
            action = data.draw(st.sampled_from(["step", "step", "cancel", "hold", "release"]))
            if action == "step":
                simulation.step()
            elif live:
                seq = live[data.draw(st.integers(0, len(live) - 1))]
                if action == "cancel":
                    simulation.end(seq)
                elif action == "hold":
                    seq.ready_to = data.draw(st.integers(0, len(seq.token_ids)))
                else:
                    seq.ready_to = len(seq.token_ids)
    for _ in range(5000):
        for seq in simulation.to_generate:
            seq.ready_to = len(seq.token_ids)
        if not simulation.to_generate:
            break
        assert simulation.step() > 0, "sequences are left but nothing can run"
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


def test_too_small_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="raise kv_cache_bytes or lower max_model_len"):
        SchedulerState(BlockPool(4, 16), 1, 1, max_model_len=65)
