"""A live server on a real socket, over the real engine with a tiny model or over a scripted one.

The scripted engine exists for what a real one cannot be made to do at a wanted moment: stall, die, fail
half-way, be full.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from scone.cache.fgram_table import FGramTable
from scone.cache.recycled_store import RecycledStore
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_set import FGramSet
from scone.model_store.tokenizer import Tokenizer
from scone.server.api.app import create_app
from scone.server.api.config import ApiConfig
from scone.server.api.http_server import HttpServer, listen, new_event_loop
from scone.server.api.state import ServedModel, ServerState
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.observer import StepStats
from scone.server.engine_door import OnDelta
from scone.server.errors import UnavailableError
from scone.server.load_model import served_recycled
from scone.server.metrics import ServerMetrics
from scone.server.recycled_metrics import RecycledCollector
from scone.server.sequence import Delta, GenerationRequest, RequestUsage, TokenLogprob
from scone.server.served_table import ServedTable
from scone.server.table_metrics import TableCollector

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges; 300 ids, as many as the tiny decoder has."""
    pieces = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlu"
    merges = [(a, b) for a in letters for b in letters][: 300 - len(pieces)]
    pieces += [a + b for a, b in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return Tokenizer(backend, bos_id=1, eos_ids=(2,), chat_template=CHAT_TEMPLATE)


@dataclass
class ScriptedStats:
    """Settable."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    last_step_monotonic: float = 0.0
    has_work: bool = False


class ScriptedEngine:
    """Answers each prompt with its own tokens, over and over, when it is let.

    Attributes:
        gate: closed, no token is made.
        step_seconds: pause before each token.
        fail_after: tokens after which every sequence fails.
        room: free places; a batch that needs more is refused.
        finished: reasons of ended sequences, by request id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.gate = threading.Event()
        self.gate.set()
        self.step_seconds = 0.0
        self.fail_after: int | None = None
        self.room = 1000
        self.alive = True
        self.stats_now = ScriptedStats(last_step_monotonic=time.monotonic())
        self.requests: list[GenerationRequest] = []
        self.aborted: set[str] = set()
        self.finished: list[str] = []
        self._after_deliveries: Callable[[], None] = lambda: None

    def after_deliveries(self, call: Callable[[], None]) -> None:
        self._after_deliveries = call

    def submit_batch(self, batch: Sequence[tuple[GenerationRequest, OnDelta]]) -> None:
        if len(batch) > self.room:
            raise UnavailableError("the queue is full", code="queue_full")
        for request, on_delta in batch:
            self.requests.append(request)
            for index in range(request.n):
                threading.Thread(target=self._run, args=(request, index, on_delta), daemon=True).start()

    def swap_table(self, table: FGramTable | None, on_retired: Callable[[], None]) -> None:
        raise AssertionError("this engine has no table")

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    def is_queued(self, request_id: str) -> bool:
        return not self.gate.is_set()

    def is_alive(self) -> bool:
        return self.alive

    def stats(self) -> ScriptedStats:
        return self.stats_now

    def shutdown(self, timeout_seconds: float) -> bool:
        self.gate.set()
        return True

    def _run(self, request: GenerationRequest, index: int, on_delta: OnDelta) -> None:
        sampling = request.sampling
        for i in range(max(1, sampling.max_tokens)):
            while not self.gate.wait(0.01):
                if request.request_id in self.aborted:
                    break
            time.sleep(self.step_seconds)
            is_aborted = request.request_id in self.aborted
            is_failed = self.fail_after is not None and i >= self.fail_after
            is_last = is_aborted or is_failed or i + 1 >= sampling.max_tokens
            token_id = request.input_ids[i % len(request.input_ids)]
            reason: Any = "abort" if is_aborted else "error" if is_failed else "length" if is_last else None
            if reason is not None:
                self.finished.append(reason)
            is_token = not (is_aborted or is_failed or sampling.max_tokens == 0)
            on_delta(
                Delta(
                    index=index,
                    text=self.tokenizer.decode([token_id]) if is_token else "",
                    token_ids=(token_id,) if is_token else (),
                    logprobs=(self._logprob(token_id),)
                    if is_token and sampling.logprobs is not None
                    else None,
                    prompt_logprobs=(None, *map(self._logprob, request.input_ids[1:]))
                    if i == 0 and sampling.prompt_logprobs is not None
                    else None,
                    finish_reason=reason,
                    usage=RequestUsage(
                        num_prompt_tokens=len(request.input_ids), num_generated_tokens=i + is_token
                    )
                    if is_last
                    else None,
                    error="row 7 could not be read from /data/rows.bin" if is_failed else None,
                )
            )
            self._after_deliveries()
            if is_last:
                return

    def _logprob(self, token_id: int) -> TokenLogprob:
        return TokenLogprob(token_id, -0.5, top=((token_id, -0.5), (5, float("-inf"))))


class PacedMetrics(ServerMetrics):
    """Makes every step of the engine last at least so long, so that a request is surely still under way."""

    def __init__(self, step_seconds: float) -> None:
        super().__init__()
        self._seconds = step_seconds

    def on_step(self, stats: StepStats) -> None:
        super().on_step(stats)
        time.sleep(self._seconds)


@dataclass
class LiveServer:
    """A running server."""

    url: str
    state: ServerState
    http: HttpServer
    loop: asyncio.AbstractEventLoop
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, **body: Any) -> Any:
        """The JSON of a completion that must succeed."""
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[str]:
        """The data of every event of a stream that must begin well."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = list(response.iter_lines())
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics; KeyError-like failure if it is not exported."""
        value = self.state.metrics.registry.get_sample_value(name, labels)
        assert value is not None, f"{name}{labels} is not exported"
        return value


Serve = Callable[..., AbstractContextManager[LiveServer]]


@pytest.fixture(scope="session")
def serve() -> Serve:
    """`with serve(model or None, **ApiConfig fields) as server`: runs it in a thread."""

    @contextmanager
    def run(
        model: ServedModel | None, metrics: ServerMetrics | None = None, **config: Any
    ) -> Iterator[LiveServer]:
        state = ServerState(ApiConfig(**config), metrics or ServerMetrics())
        if model is not None:
            state.serve(model)
        listener = listen("127.0.0.1", 0)
        http_server = HttpServer(create_app(state), state, listener)
        loop = new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(http_server.run_until_stopped(),))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=120) as client:
            try:
                yield LiveServer(url, state, http_server, loop, client)
            finally:
                http_server.should_exit = http_server.force_exit = True
                thread.join(60)
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
                assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def served_table(
    tokenizer: Tokenizer,
    fgram_set: Callable[..., FGramSet],
    write_table: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServedTable]:
    """A table of a few f-grams, rows of the tiny decoder's width."""
    counts = Counter(
        {tuple(tokenizer.encode(text)): 9 - i for i, text in enumerate(["ab", "bc", "abc", "xy", "abcd"])}
    )
    served = ServedTable(write_table(tmp_path_factory.mktemp("tables") / "letters", fgram_set(counts)))
    yield served
    served.close()


@pytest.fixture(scope="session")
def serve_real(serve: Serve, tiny_decoder: Decoder, tokenizer: Tokenizer, served_table: ServedTable) -> Serve:
    """`with serve_real(engine_config, **ApiConfig fields) as server`: real engine, tiny random model."""

    @contextmanager
    def run(
        engine_config: EngineConfig | None = None,
        step_seconds: float = 0.0,
        table: ServedTable = served_table,
        store: RecycledStore | None = None,
        **config: Any,
    ) -> Iterator[LiveServer]:
        metrics = PacedMetrics(step_seconds)
        engine = Engine(
            engine_config or EngineConfig(max_model_len=256, kv_cache_bytes=1 << 23),
            tiny_decoder,
            tokenizer,
            table.table,
            "tiny",
            observer=metrics,
            recycled=store,
        )
        engine.start()
        metrics.watch_engine(engine.stats)
        metrics.watch(TableCollector(table))
        model = ServedModel(
            name="tiny",
            engine=engine,
            tokenizer=tokenizer,
            table=table,
            max_model_len=engine.config.max_model_len,
            dim=tiny_decoder.config.dim,
            num_layers=tiny_decoder.config.num_layers,
            recycled=None if store is None else served_recycled("store", store, engine),
        )
        if store is not None:
            metrics.watch(RecycledCollector(store))
        try:
            with serve(model, metrics, **config) as server:
                yield server
        finally:
            engine.shutdown(timeout_seconds=0)

    return run


@pytest.fixture(scope="session")
def server(serve_real: Serve) -> Iterator[LiveServer]:
    """One for all tests that leave nothing behind."""
    with serve_real() as server:
        yield server


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def scripted_model(scripted: ScriptedEngine, tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name="tiny", engine=scripted, tokenizer=tokenizer, table=None, max_model_len=512, dim=64, num_layers=3
    )


@pytest.fixture
def scripted_server(serve: Serve, scripted_model: ServedModel) -> Iterator[LiveServer]:
    with serve(scripted_model) as server:
        yield server
