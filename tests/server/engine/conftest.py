"""A small world for the engine: byte tokenizer, table in a dict, slow reads on demand, a naive oracle."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scone.cache.recycle_cost import RecycleCost
from scone.cache.recycled_store import RecycledStore
from scone.cache.sim_device import SimDevice
from scone.cache.staging_ring import SlotState
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.engine_core import EngineCore
from scone.server.engine.generation import RequestRun
from scone.server.engine.hidden_form import HiddenForm
from scone.server.engine.input_rows import InputRows
from scone.server.engine.layer_range import ALL_LAYERS, LayerRange
from scone.server.engine.model_runner import ModelRunner
from scone.server.engine.observer import SilentObserver
from scone.server.engine.scheduler import Chunk
from scone.server.sequence import Delta, GenerationRequest, PoolingParams, SamplingParams

from .dict_table import DictTable
from .instruction_sets import use_instruction_set
from .restarts import Restarts

NUM_SPECIALS = 3
"""Ids 0, 1, 2 are special (2 ends a generation); then the 256 bytes; the head has some ids more."""


def naive_logits(decoder: Decoder, input_ids: Sequence[int], table: DictTable | None = None) -> Tensor:
    """Logits (n, vocab) of a whole sequence computed at once, with rows laid in one by one."""
    with torch.inference_mode():
        embeddings = decoder.embed(torch.tensor(list(input_ids)))
        if table is not None:
            for i in range(len(input_ids)):
                row_id = table.longest(input_ids[: i + 1])
                if row_id >= 0:
                    embeddings[i] = table.row(row_id)
        positions = torch.arange(len(input_ids))
        hidden = decoder(embeddings[None], positions[None], CausalAttention())
        return decoder.logits(hidden[0])


def naive_greedy(
    decoder: Decoder, input_ids: Sequence[int], num_tokens: int, table: DictTable | None = None
) -> list[int]:
    """Greedy continuation by computing everything anew for each token; ignores the end token."""
    ids = list(input_ids)
    for _ in range(num_tokens):
        ids.append(int(naive_logits(decoder, ids, table)[-1].argmax()))
    return ids[len(input_ids) :]


@dataclass
class Outcome:
    """All deltas of one request, by sequence."""

    deltas: dict[int, list[Delta]] = field(default_factory=dict)

    def __call__(self, delta: Delta) -> None:
        seen = self.deltas.setdefault(delta.index, [])
        assert not seen or seen[-1].finish_reason is None, "a delta after the last one"
        seen.append(delta)

    def tokens(self, index: int = 0) -> list[int]:
        return [t for d in self.deltas.get(index, []) for t in d.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(d.text for d in self.deltas.get(index, []))

    def last(self, index: int = 0) -> Delta:
        return self.deltas[index][-1]

    def logprobs(self, index: int = 0) -> list[float]:
        return [p.logprob for d in self.deltas[index] for p in d.logprobs or ()]


class LateRunner(ModelRunner):
    """A model on a simulated device: it runs when the device runs it, at the latest when asked for logits."""

    def __init__(self, decoder: Decoder, config: EngineConfig, device: SimDevice) -> None:
        super().__init__(decoder, config)
        self.is_asynchronous = True
        self._device = device

    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        return self._late(super().embed(chunks))

    def forward(self, chunks: Sequence[Chunk], embeddings: Tensor, layers: LayerRange = ALL_LAYERS) -> Tensor:
        hidden = torch.full_like(embeddings, torch.nan)
        # what the host prepares is as of now
        positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.num_tokens)])
        batch = self._paged_batch(chunks)

        def run() -> None:
            k_cache, v_cache = self._kv_cache
            states = self._forward.forward(
                embeddings, positions.int(), batch, k_cache, v_cache, layers.end, layers.first
            )
            hidden.copy_(states)

        self._device.launch(run)
        if any(chunk.reaches_end for chunk in chunks):  # the host is going to sample
            self._device.drain()
        return hidden

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._device.drain()
        super().copy_blocks(pairs)

    def _late(self, result: Tensor) -> Tensor:
        out = torch.full_like(result, torch.nan)
        self._device.launch(lambda: out.copy_(result))
        return out


class World:
    """An engine core and what is needed to feed it."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        table: DictTable | None = None,
        device: SimDevice | None = None,
        store: RecycledStore | None = None,
        make_runner: Callable[[Decoder, EngineConfig], ModelRunner] = ModelRunner,
        **config: Any,
    ) -> None:
        """With `device` the model runs on it, else where its weights are; with `store` it recycles states."""
        defaults = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 8}
        self.config = EngineConfig(**{**defaults, **config})
        runner = (
            make_runner(decoder, self.config) if device is None else LateRunner(decoder, self.config, device)
        )
        self.runner = runner
        self.core = EngineCore(self.config, runner, tokenizer, "model", SilentObserver(), device)
        self._device = device
        self.commands: deque[Callable[[], None]] = deque()
        if store is not None:
            self.core.recycle(store, RecycleCost(store.read_speeds), runner, self.commands.append)
        self.input_rows = None if table is None else InputRows(table, table, "dict")
        self.runs: list[RequestRun] = []

    def add(
        self,
        input_ids: Sequence[int],
        n: int = 1,
        salt: str | None = None,
        pooling: PoolingParams | None = None,
        **params: Any,
    ) -> Outcome:
        outcome = Outcome()
        request = GenerationRequest(
            request_id=str(len(self.runs)),
            input_ids=tuple(input_ids),
            n=n,
            cache_salt=salt,
            pooling=pooling,
            sampling=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params}),
        )
        run = RequestRun(request, outcome, len(self.runs), 0.0, self.input_rows)
        self.runs.append(run)
        self.core.add(run)
        return outcome

    def step(self) -> bool:
        """One round of the engine's loop."""
        while self.commands:
            self.commands.popleft()()
        return self.core.step()

    def run(self, max_steps: int = 2000) -> None:
        """Steps until all is done; afterwards no block may be held."""
        deadline = time.monotonic() + 60
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            while not self.step() and self.core.recycler is not None and time.monotonic() < deadline:
                if not self.core.has_work:
                    break
                self._pass_time()
        assert not self.core.has_work, "requests did not end"
        self.settle()
        pool = self.core.state.pool
        assert pool.num_free == pool.num_blocks
        assert not self.core.state.waiting
        assert not self.core.state.running
        assert all(slot.state is SlotState.FREE for slot in self.core.overlay.ring._slots)
        if self.core.recycler is not None:
            if isinstance(self.core.overlay.device, SimDevice):
                self.core.overlay.device.drain()
            assert num_landings(self) == 0

    def settle(self) -> None:
        """Waits until the store has what it was given, and workers have ended."""
        recycler = self.core.recycler
        if recycler is None:
            return
        deadline = time.monotonic() + 60
        while recycler.is_busy or recycler.saver.num_held:
            assert time.monotonic() < deadline, "workers do not end"
            while self.commands:
                self.commands.popleft()()
            self.core.step()
            self._pass_time()

    def _pass_time(self) -> None:
        """While the engine can do nothing, workers and the device go on."""
        time.sleep(0.0002)
        if self._device is not None:
            with torch.inference_mode():
                self._device.step()


def num_landings(world: World) -> int:
    """Blocks that the store is reading, or that wait for being laid."""
    assert world.core.recycler is not None
    return sum(form.num_landings for form in world.core.recycler.forms.readable)


def hidden_form(world: World) -> HiddenForm:
    assert world.core.recycler is not None
    (form,) = (f for f in world.core.recycler.forms.readable if isinstance(f, HiddenForm))
    return form


def num_slots_in_use(world: World) -> int:
    form = hidden_form(world)
    return form._arriving.num_in_use + form._computed.num_in_use


@pytest.fixture
def make_world(tiny_decoder: Decoder, byte_tokenizer: Tokenizer) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(table: DictTable | None = None, device: SimDevice | None = None, **config: Any) -> World:
        worlds.append(World(tiny_decoder, byte_tokenizer, table, device, **config))
        return worlds[-1]

    yield make
    for world in worlds:
        if world.core.recycler is not None:
            world.core.recycler.close()


@pytest.fixture(scope="module")
def multi_head(random_decoder: Callable[..., Decoder]) -> Decoder:
    return random_decoder(num_kv_heads=4)


@pytest.fixture
def make_hidden_world(multi_head: Decoder, byte_tokenizer: Tokenizer) -> Iterator[Callable[..., World]]:
    """Of a multi-head model, whose blocks are kept as hidden states; every slot is given back at the end."""
    worlds: list[World] = []

    def make(table: DictTable | None = None, recycled_blocks: str = "hidden", **config: Any) -> World:
        worlds.append(World(multi_head, byte_tokenizer, table, recycled_blocks=recycled_blocks, **config))
        return worlds[-1]

    yield make
    for world in worlds:
        if world.core.recycler is not None:
            world.core.recycler.close()
            assert num_slots_in_use(world) == 0


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    store = Restarts(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def dict_table(tiny_decoder: Decoder) -> DictTable:
    """Random f-grams over ids below 12, so that prompts of such ids match often at every length."""
    generator = torch.Generator().manual_seed(1)
    rows = {}
    for n, num in ((2, 60), (3, 150), (4, 150), (5, 150)):
        for _ in range(num):
            fgram = tuple(torch.randint(3, 12, (n,), generator=generator).tolist())
            rows[fgram] = torch.randn(tiny_decoder.config.dim, generator=generator) * 0.15
    return DictTable(rows, tiny_decoder.config.dim)


def random_prompt(seed: int, length: int, high: int = 12) -> list[int]:
    return torch.randint(3, high, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native models that are made from now on run on it."""
    use_instruction_set(request.param, monkeypatch)
