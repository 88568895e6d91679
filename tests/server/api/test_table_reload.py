"""POST /admin/tables/reload: another generation in the table's place, while requests run."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scone.model_store.fgram_set import FGramSet
from scone.model_store.tokenizer import Tokenizer
from scone.server.served_table import ServedTable
from scone.server.table_generation import TableGeneration

from .test_faults import wait_until

PROMPTS = ["abc", "zabcd", "xyab", "bcbcbc", "no f-gram"]
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Tables:
    """Two tables of the same f-grams with other rows, and a path that leads to the first."""

    def __init__(self, folder: Path, write: Callable[[Path, list[str]], Path]) -> None:
        self.first = write(folder / "first", ["ab", "bc", "abc", "xy", "abcd"])
        self.second = write(folder / "second", ["abcd", "xy", "q", "ab", "bc", "abc"])
        self.path = folder / "current"
        self.point_to(self.first)

    def point_to(self, target: Path) -> None:
        new = self.path.with_name("new-link")
        new.symlink_to(target.name)
        new.replace(self.path)


@pytest.fixture
def write(
    tokenizer: Tokenizer, fgram_set: Callable[..., FGramSet], write_table: Callable[..., Path]
) -> Callable[..., Path]:
    def write(out: Path, texts: list[str], **options: Any) -> Path:
        counts = Counter({tuple(tokenizer.encode(text)): 20 - i for i, text in enumerate(texts)})
        fgrams = fgram_set({k: n for k, n in counts.items() if len(k) > 1})
        fgrams = replace(fgrams, tokenizer_hash=options.get("tokenizer_hash", fgrams.tokenizer_hash))
        return write_table(out, fgrams, **options)

    return write


@pytest.fixture
def tables(write: Callable[..., Path], tmp_path: Path) -> Tables:
    return Tables(tmp_path, write)


@pytest.fixture
def reloadable(serve_real: Any, tables: Tables) -> Iterator[Any]:
    served = ServedTable(tables.path)
    with serve_real(table=served) as server:
        yield server
    served.close()


def answers(server: Any) -> list[list[int]]:
    return [c["token_ids"] for c in server.complete(prompt=PROMPTS, **GREEDY)["choices"]]


def reload(server: Any) -> Any:
    response = server.client.post("/admin/tables/reload")
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def expected(serve_real: Any, tables: Tables) -> list[list[list[int]]]:
    """What each of the two tables answers, by servers that never had another."""
    found = []
    for folder in (tables.first, tables.second):
        served = ServedTable(folder)
        with serve_real(table=served) as server:
            found.append(answers(server))
        served.close()
    assert all(a != b for a, b in zip(found[0][:4], found[1][:4], strict=True)), "the tables must differ"
    assert found[0][4] == found[1][4]
    return found


def test_another_target_of_the_link(reloadable: Any, tables: Tables, expected: Any) -> None:
    assert reload(reloadable) == {
        "changed": False,
        "table": reloadable.client.get("/v1/tables").json()["data"][0],
    }
    assert answers(reloadable) == expected[0]
    lookups = reloadable.metric("scone_fgram_lookups_total", n="1")
    tables.point_to(tables.second)
    assert answers(reloadable) == expected[0], "nothing changes by itself"
    done = reload(reloadable)
    assert done["changed"]
    assert (done["table"]["name"], done["table"]["generation"], done["table"]["num_fgrams"]) == (
        "second",
        2,
        5,
    )
    assert reloadable.client.get("/v1/tables").json()["data"] == [done["table"]]
    assert answers(reloadable) == expected[1], "cached prefixes of the first table are not taken"
    tables.point_to(tables.first)
    assert reload(reloadable)["table"]["generation"] == 3
    assert answers(reloadable) == expected[0]
    assert reloadable.metric("scone_table_reloads_total", result="switched") == 2
    assert reloadable.metric("scone_table_reloads_total", result="unchanged") == 1
    assert reloadable.metric("scone_fgram_lookups_total", n="1") > lookups, "counters go on"
    page = reloadable.client.get("/metrics").text
    [info] = [line for line in page.splitlines() if line.startswith("scone_table_info{")]
    assert 'generation="3"' in info
    assert f'table_id="{done["table"]["table_id"]}"' not in info


def test_a_folder_in_the_place_of_another(
    serve_real: Any, tables: Tables, expected: Any, tmp_path: Path
) -> None:
    """The first is removed: whoever has its files open goes on with them."""
    path = tables.first
    served = ServedTable(path)
    with serve_real(table=served) as server:
        assert answers(server) == expected[0]
        path.rename(tmp_path / "former")
        tables.second.rename(path)
        shutil.rmtree(tmp_path / "former")
        matched = server.post("/v1/fgrams/match", prompt="zabcd").json()["tokens"]
        assert [t["count"] for t in matched] == [None, None, 20, 18, 16], "still the first one's"
        assert reload(server)["table"]["generation"] == 2
        matched = server.post("/v1/fgrams/match", prompt="zabcd").json()["tokens"]
        assert [t["count"] for t in matched] == [None, None, 17, 15, 20]
        assert answers(server) == expected[1]
    served.close()


def test_running_requests_keep_their_table(
    serve_real: Any, tables: Tables, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reloaded back and forth under load: each answer is of one table, earlier streams of the former."""
    closed: list[int] = []
    close = TableGeneration.close

    def note_closed(generation: TableGeneration) -> None:
        closed.append(generation.number)
        close(generation)

    monkeypatch.setattr(TableGeneration, "close", note_closed)
    served = ServedTable(tables.path)
    ended = threading.Event()
    seen: list[list[list[int]]] = []
    with serve_real(table=served, step_seconds=0.005) as server:

        def ask() -> None:
            while not ended.is_set():
                seen.append(answers(server))

        with ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(ask) for _ in range(6)]
            for target in (tables.second, tables.first, tables.second):
                with server.client.stream(
                    "POST", "/v1/completions", json={"prompt": PROMPTS[0], "stream": True, **GREEDY}
                ) as stream:
                    tables.point_to(target)
                    before = expected[served.current.number % 2 == 0][0]
                    assert reload(server)["changed"]
                    tokens = [i for event in events(stream) for i in event["choices"][0]["token_ids"]]
                    assert tokens == before
                assert answers(server) == expected[target is tables.second]
            ended.set()
            for client in clients:
                client.result()
    for answer in seen:
        for i, tokens in enumerate(answer):
            assert tokens in (expected[0][i], expected[1][i])
    for choices in expected:
        assert choices in seen
    wait_until(lambda: sorted(closed) == [1, 2, 3])  # each once its last request has ended
    served.close()


def events(stream: Any) -> Iterator[Any]:
    for line in stream.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def refuse(server: Any, *words: str) -> None:
    response = server.client.post("/admin/tables/reload")
    assert response.status_code == 409
    error = response.json()["error"]
    assert error["code"] == "table_refused"
    for word in words:
        assert word in error["message"]
    assert "\n" not in error["message"]
    assert server.client.get("/v1/tables").json()["data"][0]["generation"] == 1
    assert server.client.get("/ready").status_code == 200


def test_a_table_that_does_not_fit_is_refused(
    reloadable: Any, tables: Tables, expected: Any, write: Any, tmp_path: Path
) -> None:
    tables.point_to(write(tmp_path / "other-model", ["ab", "abc"], model_hash="ff" * 32))
    refuse(reloadable, "was built for model ffffffffffff")
    tables.point_to(write(tmp_path / "other-tokenizer", ["ab", "abc"], tokenizer_hash="ee" * 32))
    refuse(reloadable, "was built for tokenizer eeeeeeeeeeee")
    tables.point_to(tmp_path / "nothing")
    refuse(reloadable, "there is no table")
    rows = tables.second / "rows.bin"
    rows.write_bytes(rows.read_bytes()[:-4096])
    tables.point_to(tables.second)
    refuse(reloadable, "is truncated")
    assert reloadable.metric("scone_table_reloads_total", result="refused") == 4
    assert answers(reloadable) == expected[0]


def test_without_a_table(scripted_server: Any) -> None:
    response = scripted_server.client.post("/admin/tables/reload")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_table"


def test_loading(serve: Any) -> None:
    with serve(None) as server:
        assert server.client.post("/admin/tables/reload").json()["error"]["code"] == "model_loading"


def test_needs_the_key(serve: Any, scripted_model: Any) -> None:
    with serve(scripted_model, api_keys=("alpha",)) as server:
        assert server.client.post("/admin/tables/reload").status_code == 401
