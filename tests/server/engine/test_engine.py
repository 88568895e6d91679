"""The engine behind its door: threads, admission, shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scone.cache.fgram_table import FGramTable
from scone.model_store.decoder import Decoder
from scone.model_store.fgram_set import FGramSet
from scone.model_store.table_writer import TableWriter
from scone.model_store.tokenizer import Tokenizer
from scone.server.engine.engine import Engine
from scone.server.engine.engine_config import EngineConfig
from scone.server.engine.input_rows import InputRows
from scone.server.errors import InvalidRequestError, UnavailableError
from scone.server.sequence import Delta, GenerationRequest, SamplingParams

from .conftest import Outcome, naive_greedy, random_prompt
from .dict_table import DictTable

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tiny_decoder: Decoder, byte_tokenizer: Tokenizer) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(table: DictTable | None = None, **config: Any) -> Engine:
        defaults = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 8}
        engine = Engine(
            EngineConfig(**{**defaults, **config}),
            tiny_decoder,
            byte_tokenizer,
            None,
            "model",
        )
        if table is not None:
            engine.swap_rows(InputRows(table, table, "dict"), on_retired=lambda: None)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.shutdown(timeout_seconds=0)


def request(name: str, input_ids: list[int], **params: Any) -> GenerationRequest:
    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **params})
    return GenerationRequest(request_id=name, input_ids=tuple(input_ids), sampling=sampling)


class Waiter(Outcome):
    """An outcome that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()
        self.begun = threading.Event()

    def __call__(self, delta: Delta) -> None:
        super().__call__(delta)
        self.begun.set()
        if delta.finish_reason is not None:
            self.done.set()

    def wait(self) -> None:
        assert self.done.wait(120)


def settled(engine: Engine) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = engine.stats()
        if not stats.has_work and stats.num_running == stats.num_waiting == stats.num_queued_tokens == 0:
            return stats.kv_cache_usage == 0
        time.sleep(0.005)
    return False


def test_many_threads_get_their_own_answers(
    make_engine: MakeEngine, tiny_decoder: Decoder, dict_table: DictTable
) -> None:
    engine = make_engine(dict_table)
    waiters = [Waiter() for _ in range(12)]
    prompts = [random_prompt(i, 5 + 3 * i) for i in range(12)]

    def submit(i: int) -> None:
        engine.submit(request(str(i), prompts[i]), waiters[i])

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for waiter, prompt in zip(waiters, prompts, strict=True):
        waiter.wait()
        assert waiter.tokens() == naive_greedy(tiny_decoder, prompt, 8, dict_table)
    for thread in threads:
        thread.join()
    assert settled(engine)


def test_two_hundred_abandoned_requests_leave_nothing(make_engine: MakeEngine, dict_table: DictTable) -> None:
    engine = make_engine(dict_table)
    waiters = [Waiter() for _ in range(200)]
    for i, waiter in enumerate(waiters):
        engine.submit(request(str(i), random_prompt(i, 30), max_tokens=90), waiter)
    for i in range(200):
        engine.abort(str(i))
    last = Waiter()
    engine.submit(request("last", [5, 6], max_tokens=2), last)
    last.wait()
    for waiter in waiters:
        waiter.wait()
    assert {w.last().finish_reason for w in waiters} <= {"abort", "length"}
    assert settled(engine)


def test_a_batch_is_admitted_whole_or_not_at_all(make_engine: MakeEngine, dict_table: DictTable) -> None:
    dict_table.is_held = True  # nothing can start
    engine = make_engine(dict_table, max_num_queued_reqs=4, max_num_queued_tokens=100)
    prompt = random_prompt(1, 20)
    assert dict_table.match(np.array(prompt))[0].max() >= 0
    waiters = [Waiter() for _ in range(3)]
    engine.submit_batch([(request(str(i), prompt), w) for i, w in enumerate(waiters)])
    with pytest.raises(UnavailableError, match="max_num_queued_reqs") as refused:
        engine.submit_batch([(request(f"x{i}", prompt), Waiter()) for i in range(2)])
    assert refused.value.code == "queue_full"
    with pytest.raises(UnavailableError, match="max_num_queued_tokens"):
        engine.submit(request("y", prompt * 3), Waiter())
    with pytest.raises(InvalidRequestError, match="under way"):
        engine.submit(request("0", [4]), Waiter())
    dict_table.is_held = False
    for waiter in waiters:
        waiter.wait()
    assert settled(engine)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (request("a", []), "the prompt is empty"),
        (request("a", [1, 300]), "token id is 300, wanted 0 <= id < 300"),
        (request("a", [-1]), "token id is -1"),
        (request("a", [5] * 128), "the longest context here is 128"),
        (request("a", [5], logit_bias={300: 1.0}), "logit_bias holds token id 300"),
        (request("a", [5], stop_token_ids=(999,)), "stop_token_ids holds token id 999"),
        (request("a", [5], allowed_token_ids=(-4,)), "allowed_token_ids holds token id -4"),
        (
            request("a", [5], allowed_token_ids=(7,), stop_token_ids=(7,), min_tokens=2),
            "min_tokens is 2, but every token of allowed_token_ids ends the answer",
        ),
    ],
)
def test_what_can_never_be_served_is_refused(
    make_engine: MakeEngine, wrong: GenerationRequest, sentence: str
) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=sentence):
        engine.submit_batch([(request("good", [5]), Waiter()), (wrong, Waiter())])
    assert settled(engine)


def test_shutdown_lets_admitted_requests_end(make_engine: MakeEngine) -> None:
    engine = make_engine()
    waiters = [Waiter() for _ in range(20)]
    for i, waiter in enumerate(waiters):
        engine.submit(request(str(i), [5, 6, i + 3], max_tokens=20), waiter)
    assert engine.shutdown(timeout_seconds=30)
    assert all(len(w.tokens()) == 20 for w in waiters)
    assert not engine.is_alive()
    with pytest.raises(UnavailableError, match="shutting down"):
        engine.submit(request("late", [5]), Waiter())


def test_shutdown_aborts_what_takes_too_long(make_engine: MakeEngine, dict_table: DictTable) -> None:
    engine = make_engine(dict_table)
    waiter = Waiter()
    dict_table.is_held = True
    engine.submit(request("slow", random_prompt(1, 20)), waiter)
    assert engine.shutdown(timeout_seconds=0.05) is False
    assert waiter.last().finish_reason == "abort"


def test_a_table_that_raises_fails_the_request(make_engine: MakeEngine, dict_table: DictTable) -> None:
    engine = make_engine(dict_table)
    match, waiter = dict_table.match, Waiter()
    dict_table.match = lambda ids: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    engine.submit(request("a", [5, 6]), waiter)
    waiter.wait()
    assert waiter.last().finish_reason == "error"
    dict_table.match = match  # type: ignore[method-assign]
    again = Waiter()
    engine.submit(request("b", [5, 6]), again)
    again.wait()
    assert len(again.tokens()) == 8


def test_requests_keep_the_table_they_began_with(
    make_engine: MakeEngine, tiny_decoder: Decoder, dict_table: DictTable
) -> None:
    engine = make_engine(dict_table)
    prompt = random_prompt(1, 30)
    retired = threading.Event()
    old, new = Waiter(), Waiter()
    dict_table.is_held = True
    engine.submit(request("old", prompt), old)
    engine.swap_rows(None, on_retired=retired.set)
    engine.submit(request("new", prompt), new)
    new.wait()
    assert not retired.wait(0.05)
    dict_table.is_held = False
    old.wait()
    assert retired.wait(60)
    assert old.tokens() == naive_greedy(tiny_decoder, prompt, 8, dict_table)
    assert new.tokens() == naive_greedy(tiny_decoder, prompt, 8)


@pytest.mark.parametrize("backend", ["mmap", "lmdb"])
def test_a_table_on_disk(
    tiny_decoder: Decoder, byte_tokenizer: Tokenizer, dict_table: DictTable, tmp_path: Path, backend: str
) -> None:
    """The same answers from a real table as from the dict that it was written from."""
    fgrams = sorted(dict_table.fgrams())
    tokens = np.full((len(fgrams), 5), -1, np.int32)
    for i, fgram in enumerate(fgrams):
        tokens[i, : len(fgram)] = fgram
    order = np.lexsort((*tokens.T[::-1], lengths := np.array([len(f) for f in fgrams], np.uint8)))
    tokens, lengths = tokens[order], lengths[order]
    fgram_set = FGramSet(
        tokens=tokens,
        lengths=lengths,
        counts=np.full(len(fgrams), 5, np.int64),
        tokenizer_hash=byte_tokenizer.hash,
        min_count=5,
        num_corpus_tokens=1000,
    )
    writer = TableWriter.create(
        tmp_path / "table",
        fgram_set,
        dim=dict_table.dim,
        dtype="float32",
        codec="raw",
        backend=backend,
        model_hash="model",
        tokenizer_hash=byte_tokenizer.hash,
    )
    writer.append(
        torch.stack(
            [dict_table.row(dict_table.longest([t for t in row if t >= 0])) for row in tokens.tolist()]
        )
    )
    writer.finish()
    prompts = [random_prompt(i, 10 + 13 * i) for i in range(8)]
    config = EngineConfig(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, block_size=8)
    with FGramTable.open(tmp_path / "table") as table:
        engine = Engine(config, tiny_decoder, byte_tokenizer, table, "model")
        engine.start()
        waiters = [Waiter() for _ in prompts]
        for i, (prompt, waiter) in enumerate(zip(prompts, waiters, strict=True)):
            engine.submit(request(str(i), prompt), waiter)
        for prompt, waiter in zip(prompts, waiters, strict=True):
            waiter.wait()
            assert waiter.tokens() == naive_greedy(tiny_decoder, prompt, 8, dict_table)
            usage = waiter.last().usage
            assert usage is not None
            ids = [*prompt, *waiter.tokens()[:-1]]
            matched = sum(dict_table.longest(ids[: i + 1]) >= 0 for i in range(len(ids)))
            assert usage.num_matched_tokens == sum(usage.rows_by_tier.values()) == matched
        assert engine.shutdown(timeout_seconds=10)
