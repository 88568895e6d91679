"""A small world for the engine: byte tokenizer, table in a dict, slow reads on demand, a naive oracle."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.cache.device_rows import DeviceRows
from scone.cache.errors import RowReadError
from scone.cache.recycle_cost import RecycleCost
from scone.cache.recycled_store import RecycledStore
from scone.cache.sim_device import SimDevice
from scone.cache.staging_ring import SlotState
from scone.kernels.row_target import IdTarget, RowTarget
from scone.model_store.decoder import CausalAttention, Decoder
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.engine_core import EngineCore
from scone.server.engine.generation import RequestRun
from scone.server.engine.input_rows import InputRows
from scone.server.engine.layer_range import LayerRange
from scone.server.engine.model_runner import ALL_LAYERS, ModelRunner
from scone.server.engine.observer import SilentObserver
from scone.server.engine.scheduler import Chunk
from scone.server.sequence import Delta, GenerationRequest, PoolingParams, SamplingParams

from .restarts import Restarts

NUM_SPECIALS = 3
"""Ids 0, 1, 2 are special (2 ends a generation); then the 256 bytes; the head has some ids more."""


class DictTable:
    """Longest match by trying; rows in memory or `slow`, as on a disk.

    Attributes:
        broken: rows that cannot be read.
        slow: rows that are read ahead; None: all of them.
        held: rows whose read does not end; None: none of them may.
    """

    def __init__(self, rows: dict[tuple[int, ...], Tensor], dim: int, max_n: int = 5) -> None:
        self.dim, self.max_n = dim, max_n
        self.device_rows: DeviceRows | None = None
        self._ids = {fgram: row_id for row_id, fgram in enumerate(rows)}
        self._rows = torch.stack(list(rows.values())) if rows else torch.empty(0, dim)
        self.broken: set[int] = set()
        self.slow: set[int] | None = None
        self.held: set[int] | None = set()
        self.num_read = 0
        self.num_looked_up = 0
        self.num_gathered = 0
        self.num_cancelled = 0
        self.waits: list[float] = []

    @property
    def never_waits(self) -> bool:
        return self.slow is not None and not self.slow

    @property
    def is_held(self) -> bool:
        return self.held is None

    @is_held.setter
    def is_held(self, value: bool) -> None:
        self.held = None if value else set()

    def longest(self, window: Sequence[int]) -> int:
        for n in range(min(self.max_n, len(window)), 1, -1):
            row_id = self._ids.get(tuple(window[-n:]))
            if row_id is not None:
                return row_id
        return -1

    def match(self, input_ids: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        ids = input_ids.tolist()
        return np.array([self.longest(ids[: i + 1]) for i in range(len(ids))], dtype=np.int64), None

    def match_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        out: IdTarget,
    ) -> int:
        num_wanted = 0
        for i, (tokens, its_row_ids) in enumerate(zip(sequences, row_ids, strict=True)):
            its_row_ids.append(self.longest(tokens))
            if its_row_ids[-1] >= 0:
                out.row_ids[num_wanted], out.places[num_wanted] = its_row_ids[-1], i
                num_wanted += 1
        return num_wanted

    def look_up_newest(
        self,
        sequences: list[list[int]],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> int | None:
        ends = [(len(tokens) - 1, len(ids)) for tokens, ids in zip(sequences, row_ids, strict=True)]
        if not self.never_waits or self.broken or ends != [(p, p) for p in positions]:
            return None
        num_wanted = self.match_newest(sequences, row_ids, out)
        rows = torch.empty(num_wanted, self.dim)
        self.read_into(out.row_ids[:num_wanted], rows)
        out.put(rows)
        self.num_looked_up += num_wanted
        return num_wanted

    def tier_of(self, row_ids: np.ndarray[Any, Any]) -> Any:
        return np.where(row_ids % 2 == 0, "ram", "disk")

    def count_device_rows(self, num_rows: int) -> None:
        raise AssertionError("there are none")

    def fgrams(self) -> list[tuple[int, ...]]:
        return list(self._ids)

    def row(self, row_id: int) -> Tensor:
        return self._rows[row_id]

    def read_into(self, row_ids: np.ndarray[Any, Any], out: Tensor) -> None:
        for i, row_id in enumerate(row_ids.tolist()):
            if row_id in self.broken:
                raise RowReadError(f"row {row_id} cannot be read")
            if row_id >= 0:
                assert self.slow is not None, "a row that is read ahead was not waited for"
                assert row_id not in self.slow, "a row that is read ahead was not waited for"
                out[i] = self.row(row_id)
                self.num_read += 1

    def submit(self, row_ids: np.ndarray[Any, Any]) -> DictRead | None:
        read = self.submit_apart(row_ids)
        return read if read.num_under_way() or (read.row_ids >= 0).any() else None

    def submit_apart(self, row_ids: np.ndarray[Any, Any]) -> DictRead:
        is_slow = [self.slow is None or row_id in self.slow for row_id in row_ids.tolist()]
        return DictRead(self, np.where(is_slow, row_ids, -1))


class DictRead:
    def __init__(self, table: DictTable, row_ids: np.ndarray[Any, Any]) -> None:
        self.table, self.row_ids = table, row_ids

    def num_under_way(self) -> int:
        return sum(not self.ready(i, i + 1) for i in range(len(self.row_ids)) if self.row_ids[i] >= 0)

    def ready(self, begin: int, end: int) -> bool:
        held = self.table.held
        return held is not None and held.isdisjoint(self.row_ids[begin:end].tolist())

    def wait(self, begin: int, end: int, timeout: float) -> bool:
        self.table.waits.append(timeout)
        return self.ready(begin, end)

    def error(self, begin: int, end: int) -> RowReadError | None:
        broken = self.table.broken & set(self.row_ids[begin:end].tolist())
        return RowReadError(f"row {min(broken)} cannot be read") if broken else None

    def copy_into(self, picks: np.ndarray[Any, Any], out: Tensor) -> None:
        for i, pick in enumerate(picks.tolist()):
            if pick >= 0:
                assert self.ready(pick, pick + 1), "the engine would block on a read that is not ready"
                assert self.row_ids[pick] >= 0
                out[i] = self.table.row(self.row_ids[pick])
                self.table.num_read += 1

    def gather_newest(
        self,
        ids: np.ndarray[Any, Any],
        places: np.ndarray[Any, Any],
        row_ids: list[list[int]],
        positions: list[int],
        out: RowTarget,
    ) -> bool:
        newest = [[i, its[-1]] for i, its in enumerate(row_ids) if its[-1] >= 0]
        if newest != np.stack((places, ids), 1).tolist() or positions != [len(its) - 1 for its in row_ids]:
            return False
        if self.num_under_way() or not self.table.broken.isdisjoint(ids.tolist()):
            return False
        rows = torch.empty(len(ids), self.table.dim)
        self.table.read_into(np.where(self.row_ids < 0, ids, -1), rows)
        self.copy_into(np.where(self.row_ids < 0, -1, np.arange(len(ids))), rows)
        out.row_ids[: len(ids)], out.places[: len(ids)] = ids, places
        out.put(rows)
        self.table.num_gathered += len(ids)
        return True

    def cancel(self, begin: int, end: int) -> None:
        self.table.num_cancelled += 1


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
            self.core.recycle(
                store, RecycleCost(store.read_speeds), runner, runner.num_layers, self.commands.append
            )
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
            assert self.core.recycler.restorer.landings.num_in_use == 0

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
