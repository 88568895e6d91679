"""The engine on a GPU answers as on a CPU: `make test-cuda`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from scone.cache import FGramTable, TableConfig
from scone.cache.cuda_device import CudaDevice
from scone.cache.recycled_store import RecycledStore
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_set import FGramSet
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.engine import runner_for
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.input_rows import read_ahead
from scone.server.engine.model_runner import ModelRunner

from .conftest import World, random_prompt
from .dict_table import DictTable
from .recycled_world import counted
from .restarts import Restarts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [
    random_prompt(seed, length) for seed, length in ((1, 60), (2, 5), (3, 47), (4, 1), (5, 90), (6, 33))
]
MakeWorld = Callable[..., World]


@pytest.fixture
def on_cuda(tiny_decoder: Decoder, byte_tokenizer: Tokenizer) -> Iterator[MakeWorld]:
    """A world whose model is on the GPU; `dtype` and settings of the engine as given."""
    pytest.importorskip("triton", reason="pip install 'scone-serve[cuda]'")
    worlds: list[World] = []

    def make(
        table: DictTable | None = None,
        store: RecycledStore | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> World:
        decoder = deepcopy(tiny_decoder).to(dtype).cuda()

        def make_runner(decoder: Decoder, config: EngineConfig) -> ModelRunner:
            return runner_for(decoder, config, CudaDevice(torch.device("cuda", 0)))

        worlds.append(World(decoder, byte_tokenizer, table, store=store, make_runner=make_runner, **config))
        return worlds[-1]

    yield make
    for world in worlds:
        if world.core.recycler is not None:
            world.core.recycler.close()
    worlds.clear()
    gc.collect()


def answers(world: World, **params: Any) -> list[Any]:
    outcomes = [world.add(prompt, **{"max_tokens": 8} | params) for prompt in PROMPTS]
    world.run()
    return [o.tokens(i) for o in outcomes for i in sorted(o.deltas)]


@pytest.mark.parametrize("slow", [set(), None, set(range(0, 510, 3))], ids=["memory", "disk", "both"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enforce_eager": True},
        {"backend": "torch"},
        {"max_num_batched_tokens": 8, "max_num_seqs": 4},
        {"max_num_seqs": 1},
    ],
    ids=["graphs", "eager", "torch", "chunked", "alone"],
)
def test_greedy_tokens_are_the_cpus(
    make_world: MakeWorld,
    on_cuda: MakeWorld,
    dict_table: DictTable,
    config: dict[str, Any],
    slow: set[int] | None,
) -> None:
    dict_table.slow = slow
    expected = answers(make_world(dict_table, backend="torch"))
    world = on_cuda(dict_table, **config)
    assert world.runner.backend == config.get("backend", "triton")
    assert answers(world) == expected
    if world.runner.backend == "triton" and "enforce_eager" not in config:
        assert world.runner.num_replays >= 7  # type: ignore[attr-defined]
    assert answers(world) == expected, "with a warm prefix cache"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_seqs", [1, 2, 4, 8])
def test_a_graphs_states_are_the_eager_ones(
    on_cuda: MakeWorld, dict_table: DictTable, num_seqs: int, dtype: torch.dtype
) -> None:
    """Bit for bit where no step is padded: the same kernels on the same shapes."""
    cuda_runner = pytest.importorskip("scone.server.engine.cuda_runner")
    dict_table.slow = set()

    def logprobs(**config: Any) -> list[list[float]]:
        # the prompts go through in one step, of a graph's size, so that all that follow are full batches
        world = on_cuda(dict_table, dtype=dtype, max_num_batched_tokens=128, **config)
        outcomes = [world.add(random_prompt(seed, 16), max_tokens=12, logprobs=0) for seed in range(num_seqs)]
        world.run()
        assert isinstance(world.runner, cuda_runner.CudaRunner)
        assert world.runner.num_replays == (0 if config else 12)
        return [o.logprobs() for o in outcomes]

    assert logprobs() == logprobs(enforce_eager=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_the_cpus_up_to_rounding(
    make_world: MakeWorld, on_cuda: MakeWorld, dict_table: DictTable, dtype: torch.dtype
) -> None:
    """Of the prompt's own tokens; float32 without TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    dict_table.slow = set()

    def scores(world: World) -> torch.Tensor:
        outcomes = [world.add(p, max_tokens=1, prompt_logprobs=0) for p in PROMPTS if len(p) > 1]
        world.run()
        found = [p.logprob for o in outcomes for p in o.last().prompt_logprobs or () if p is not None]
        return torch.tensor(found)

    expected = scores(make_world(dict_table, backend="torch"))
    ours = scores(on_cuda(dict_table, dtype=dtype))
    assert len(ours) == len(expected) > 200
    error = (ours - expected).abs()
    print(f"{dtype}: log-probabilities differ by {error.mean():.2e} in the mean, {error.max():.2e} at most")
    assert error.max() < (1e-3 if dtype == torch.float32 else 1.0)
    assert error.mean() < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("codec", ["raw", "int8", "int4", "fp8"])
@pytest.mark.parametrize("device_bytes", [0, 4000, 1 << 30])
def test_rows_of_every_tier_give_the_same_tokens(
    make_world: MakeWorld,
    on_cuda: MakeWorld,
    dict_table: DictTable,
    fgram_set: Callable[..., FGramSet],
    write_table: Callable[..., Path],
    tmp_path: Path,
    codec: str,
    device_bytes: int,
) -> None:
    fgrams = fgram_set({fgram: 1000 - i for i, fgram in enumerate(dict_table.fgrams())})
    path = write_table(tmp_path / "table", fgrams, dim=dict_table.dim, codec=codec)

    def run(world: World, config: TableConfig) -> list[Any]:
        with FGramTable.open(path, config) as table:
            world.input_rows = read_ahead(table, world.core.overlay.device)
            result = answers(world)
            assert (table.stats.rows_read["device"] > 0) == (config.device_bytes > 0)
            world.input_rows.close()
        return result

    expected = run(make_world(backend="torch"), TableConfig())
    assert run(on_cuda(), TableConfig(device_bytes=device_bytes, ram_bytes=8000)) == expected
    assert run(on_cuda(enforce_eager=True), TableConfig(device_bytes=device_bytes)) == expected


def test_nothing_is_allocated_by_the_device_while_decoding(on_cuda: MakeWorld, dict_table: DictTable) -> None:
    """No memory is asked of CUDA; of torch's pool, a few tensors a step: logits and what picks tokens."""
    dict_table.slow = set()
    world = on_cuda(dict_table)
    for seed in range(8):
        world.add(random_prompt(seed, 9), max_tokens=100)
    for _ in range(20):
        world.step()
    before = torch.cuda.memory_stats()
    for _ in range(50):
        world.step()
    after = torch.cuda.memory_stats()
    asked = after["segment.all.allocated"] - before["segment.all.allocated"]
    from_pool = (after["allocation.all.allocated"] - before["allocation.all.allocated"]) / 50
    print(f"per decode step: {asked / 50} allocations by CUDA, {from_pool:.1f} from torch's pool")
    assert asked == 0
    assert from_pool <= 24
    assert after["allocated_bytes.all.current"] == before["allocated_bytes.all.current"]
    world.run()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8, 13])
def test_nothing_is_held_after_aborts_and_preemptions(
    make_world: MakeWorld, on_cuda: MakeWorld, dict_table: DictTable, num_steps: int
) -> None:
    dict_table.slow = set(range(0, 510, 2))
    expected = answers(make_world(dict_table, backend="torch"))
    # so few blocks that sequences are preempted
    world = on_cuda(dict_table, max_num_batched_tokens=16, max_num_seqs=4, kv_cache_bytes=220_000)
    doomed = [world.add(prompt, max_tokens=8) for prompt in PROMPTS]
    for _ in range(num_steps):
        world.step()
    for run in world.runs:
        world.core.abort(run)
    assert all(o.last().finish_reason in ("abort", "length") for o in doomed)
    assert answers(world) == expected
    torch.cuda.synchronize()
    assert world.core.overlay.ring.num_in_use == 0


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}], ids=str
)
def test_seeded_draws_are_the_cpus(
    make_world: MakeWorld, on_cuda: MakeWorld, dict_table: DictTable, params: dict[str, Any]
) -> None:
    dict_table.slow = set()
    expected = answers(make_world(dict_table, backend="torch"), seed=5, **params)
    together = answers(on_cuda(dict_table), seed=5, **params)
    alike = sum(a == b for a, b in zip(together, expected, strict=True))
    assert alike >= len(expected) - 1, "a draw at the border of two tokens may fall otherwise"
    assert answers(on_cuda(dict_table, max_num_seqs=1), seed=5, **params) == together


def test_n_answers_share_the_prompts_blocks(
    make_world: MakeWorld, on_cuda: MakeWorld, dict_table: DictTable
) -> None:
    dict_table.slow = set()
    assert answers(on_cuda(dict_table), n=3) == answers(make_world(dict_table, backend="torch"), n=3)


def test_restored_blocks_give_the_same_tokens(
    on_cuda: MakeWorld, make_world: MakeWorld, dict_table: DictTable, restarts: Restarts
) -> None:
    dict_table.slow = set()
    expected = answers(make_world(dict_table, backend="torch"))
    store = restarts.open()
    answers(on_cuda(dict_table, store, max_num_batched_tokens=16), max_tokens=2)
    store.flush(60)
    world = on_cuda(dict_table, store, max_num_batched_tokens=16)
    counting = counted(world)
    assert answers(world) == expected
    assert counting.num_restored >= 64
