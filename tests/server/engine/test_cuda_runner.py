"""The CUDA runner, but for CUDA: its inputs on a simulated device, its kernels interpreted.

`make test-triton` runs the second part; what needs a GPU is in test_cuda_engine.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.cache.device import CpuDevice, Device
from scone.cache.sim_device import SimDevice
from scone.model_store.decoder import Decoder
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine import model_runner
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.scheduler import Chunk
from scone.server.engine.scheduler import Sequence as Seq
from scone.server.engine.step_graphs import StepShape, StepShapes, decode_sizes, mixed_sizes
from scone.server.engine.step_inputs import Step, StepInputs
from tests.conftest import Forgetful
from tests.kernels.interpreted import OneValue

from .conftest import World, random_prompt
from .dict_table import DictTable

BLOCK_SIZE = 4


def make_inputs(device: Device) -> StepInputs:
    config = EngineConfig(
        max_num_batched_tokens=40, max_num_seqs=8, max_model_len=10 * BLOCK_SIZE, block_size=BLOCK_SIZE
    )
    return StepInputs(device, config, queries_per_tile=3)


def chunk(start: int, num_tokens: int, block_ids: list[int], first_token: int = 100) -> Chunk:
    seq = Seq(0, 0, [first_token + i for i in range(start + num_tokens)])
    seq.block_ids = block_ids
    return Chunk(seq, start, num_tokens)


def as_lists(step: Step) -> list[list[int]]:
    tiles = step.batch.tiles
    assert tiles is not None
    return [x.tolist() for x in (step.input_ids, step.positions, step.batch.slots, *tiles)]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 16, 17, 32, 100, 128, 1000])
def test_decode_sizes_rise_to_the_most(max_num_seqs: int) -> None:
    sizes = decode_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    assert all(min(size, max_num_seqs) in sizes for size in (1, 2, 4, 8, 16, 32, 64, 128))
    assert len(sizes) < 24
    for num_seqs in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= num_seqs)
        assert num_seqs <= size < 2 * num_seqs or num_seqs == 1 == size
        assert num_seqs < 64 or size < 1.5 * num_seqs


@pytest.mark.parametrize("max_num_tokens", [1, 15, 16, 24, 100, 512, 600, 2048])
def test_mixed_sizes_add_a_quarter_at_most(max_num_tokens: int) -> None:
    sizes = mixed_sizes(max_num_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_tokens
    assert len(sizes) <= 24
    for num_tokens in range(1, max_num_tokens + 1):
        size = next(size for size in sizes if size >= num_tokens)
        assert size < num_tokens + max(16, num_tokens / 4)


def test_a_shape_holds_what_is_padded_to_it() -> None:
    """Any chunks of any step: they take no more tiles than their shape has, and there is a graph for it."""
    generator = np.random.default_rng(0)
    for max_num_seqs, max_num_tokens, queries in ((8, 40, 3), (1, 40, 16), (32, 32, 16), (20, 3000, 21)):
        shapes = StepShapes(max_num_seqs, max_num_tokens, queries)
        known = set(shapes.all())
        assert all(shape.num_tokens <= max_num_tokens >= shape.num_tiles for shape in known)
        for _ in range(300):
            sizes: list[int] = []
            while len(sizes) < generator.integers(1, max_num_seqs + 1) and sum(sizes) < max_num_tokens:
                most = min(generator.choice([1, 2 * queries, max_num_tokens]), max_num_tokens - sum(sizes))
                sizes.append(int(generator.integers(1, most + 1)))
            shape = shapes.padded([chunk(0, size, [0]) for size in sizes])
            if shape is None:
                assert sum(sizes) > 2048
                continue
            assert shape in known
            assert shape.num_tokens >= sum(sizes)
            assert shape.num_tiles >= sum(-(-size // queries) for size in sizes)
            assert shape.decodes == (set(sizes) == {1})


def test_chunks_become_tokens_and_tiles() -> None:
    chunks = [chunk(6, 4, [7, 2, 5]), chunk(0, 3, [1]), chunk(9, 1, [0, 3, 8])]
    step = make_inputs(CpuDevice()).put(chunks)
    ids, positions, slots, tile_seqs, begins, counts = as_lists(step)
    assert ids == [106, 107, 108, 109, 100, 101, 102, 109]
    assert positions == [6, 7, 8, 9, 0, 1, 2, 9]
    assert slots == [2 * 4 + 2, 2 * 4 + 3, 5 * 4, 5 * 4 + 1, 4, 5, 6, 8 * 4 + 1]
    assert tile_seqs == [0, 0, 1, 2]
    assert begins == [0, 3, 4, 7]
    assert counts == [3, 1, 3, 1]
    assert step.batch.block_tables[:3, :3].tolist() == [
        [7, 2, 5],
        [1, *step.batch.block_tables[1, 1:3].tolist()],
        [0, 3, 8],
    ]
    assert not step.batch.one_query_a_tile


def test_a_mixed_step_is_padded_with_tokens_and_tiles_that_do_nothing() -> None:
    chunks = [chunk(6, 4, [7, 2, 5]), chunk(0, 3, [1]), chunk(9, 1, [0, 3, 8])]
    inputs = make_inputs(CpuDevice())
    exact = as_lists(inputs.put(chunks))
    shape = StepShape(11, 6, False)
    inputs.put([chunk(0, 30, list(range(8)))])  # leaves its values behind
    padded = inputs.put(chunks, shape)
    nothing = [[0] * 3, [0] * 3, [-1] * 3, [0] * 2, [0] * 2, [0] * 2]
    assert as_lists(padded) == [a + b for a, b in zip(exact, nothing, strict=True)]
    for a, b in zip(padded[:2], inputs.step(shape)[:2], strict=True):
        assert a.data_ptr() == b.data_ptr()


def test_decoding_is_padded_with_tokens_that_do_nothing() -> None:
    chunks = [chunk(6, 1, [7, 2]), chunk(3, 1, [1])]
    inputs = make_inputs(CpuDevice())
    step = inputs.put(chunks, StepShape(4, 4, True))
    assert step.batch.one_query_a_tile
    assert as_lists(step) == [
        [106, 103, 0, 0],
        [6, 3, 0, 0],
        [10, 7, -1, -1],
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 1, 0, 0],
    ]
    assert as_lists(inputs.put(chunks)) == [[106, 103], [6, 3], [10, 7], [0, 1], [0, 1], [1, 1]]


def test_tables_follow_their_sequences() -> None:
    """Also where a sequence comes back to its row with other blocks, or another one takes it."""
    inputs = make_inputs(CpuDevice())
    generator = np.random.default_rng(0)
    seqs = [chunk(0, 1, [], 10 * i).seq for i in range(6)]
    for _ in range(300):
        chosen = [seqs[i] for i in sorted(generator.permutation(6)[: generator.integers(1, 7)])]
        for seq in chosen:
            if generator.random() < 0.1 or len(seq.block_ids) > 9:
                seq.block_ids = generator.integers(0, 99, generator.integers(1, 4)).tolist()  # preempted
            elif not seq.block_ids or generator.random() < 0.3:
                seq.block_ids.append(int(generator.integers(0, 99)))
        step = inputs.put([Chunk(seq, 0, 1) for seq in chosen])
        for row, seq in zip(step.batch.block_tables, chosen, strict=False):
            assert row[: len(seq.block_ids)].tolist() == seq.block_ids


def run_on(device: SimDevice) -> list[list[int]]:
    """Ids that a late device sees in each of many steps."""
    inputs = make_inputs(device)
    seen = []
    for number in range(40):
        step = inputs.put([chunk(number % 30, 1 + number % 4, list(range(10)), 100 * number)])
        out = torch.zeros(4, dtype=torch.int32)
        device.launch(partial(out[: len(step.input_ids)].copy_, step.input_ids))
        seen.append(out)
    device.drain()
    return [out.tolist() for out in seen]


def test_a_late_device_sees_each_step_as_it_was() -> None:
    expected = [[100 * n + n % 30 + i if i < 1 + n % 4 else 0 for i in range(4)] for n in range(40)]
    for seed in range(20):
        assert run_on(SimDevice(seed)) == expected
    # the one synchronisation is needed
    num_wrong = sum(run_on(Forgetful(seed, "host waits for copied")) != expected for seed in range(20))
    assert num_wrong > 10


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels work on a CPU."""
    pytest.importorskip("triton", reason="run by `make test-triton`")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1")
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "int", OneValue, raising=False)


class PaddedSteps:
    """In place of `StepGraphs`: does at each replay what a graph was captured for."""

    def __init__(
        self,
        shapes: Sequence[StepShape],
        prepare: Callable[[StepShape], object],
        run: Callable[[StepShape], Tensor],
    ) -> None:
        for shape in shapes[-3:]:
            prepare(shape)
            run(shape)
        self.replay = run


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # what was added by padding is never written
@pytest.mark.parametrize("is_eager", [True, False], ids=["eager", "padded"])
def test_interpreted_it_gives_the_tokens_of_plain_torch(
    interpreted: None,
    tiny_decoder: Decoder,
    byte_tokenizer: Tokenizer,
    dict_table: DictTable,
    monkeypatch: pytest.MonkeyPatch,
    is_eager: bool,
) -> None:
    from scone.server.engine import cuda_runner
    from scone.server.engine.cuda_runner import CudaRunner

    dict_table.slow = set()

    def answers(make_runner: Callable[[Decoder, EngineConfig], ModelRunner], **config: Any) -> list[Any]:
        decoder = deepcopy(tiny_decoder)
        world = World(
            decoder, byte_tokenizer, dict_table, make_runner=make_runner, max_num_batched_tokens=24, **config
        )
        outcomes = [
            world.add(random_prompt(seed, n), max_tokens=4, logprobs=0) for seed, n in ((1, 40), (2, 5))
        ]
        world.run()
        return [(o.tokens(), o.logprobs()) for o in outcomes]

    oracle = answers(ModelRunner, backend="torch")
    monkeypatch.setattr(model_runner, "choose_backend", lambda decoder, config: "triton")
    monkeypatch.setattr(cuda_runner, "StepGraphs", PaddedSteps)
    ours = answers(lambda d, c: CudaRunner(d, c, CpuDevice()), enforce_eager=is_eager)
    for (tokens, logprobs), (expected, expected_logprobs) in zip(ours, oracle, strict=True):
        assert tokens == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
