"""GET /v1/tables and POST /v1/fgrams/match over the real table."""

from __future__ import annotations

from typing import Any

import pytest


def test_tables(server: Any, served_table: Any) -> None:
    [card] = server.client.get("/v1/tables").json()["data"]
    assert card["name"] == "letters"
    assert (card["num_fgrams"], card["dim"], card["max_n"], card["generation"]) == (5, 64, 5, 1)
    assert (card["codec"], card["backend"], card["dtype"]) == ("raw", "mmap", "bfloat16")
    assert card["tiers"] == [{"tier": "disk", "rows": 5, "bytes": 5 * 64 * 2}]
    assert card["table_id"] == served_table.table.manifest.table_id


@pytest.mark.parametrize("as_ids", [False, True])
def test_match(server: Any, tokenizer: Any, as_ids: bool) -> None:
    prompt = tokenizer.encode("zabcdx") if as_ids else "zabcdx"
    tokens = server.post("/v1/fgrams/match", prompt=prompt).json()["tokens"]
    assert [t["text"] for t in tokens] == list("zabcdx")
    assert [t["matched_len"] for t in tokens] == [1, 1, 2, 3, 4, 1]
    assert [t["count"] for t in tokens] == [None, None, 9, 7, 5, None]
    assert [t["row_id"] for t in tokens] == [-1, -1, 0, 2, 4, -1]
    assert [t["tier"] for t in tokens] == [None, None, "disk", "disk", "disk", None]


@pytest.mark.parametrize("prompt", ["", [], [300], [-1], [True], ["a"], None, 3])
def test_bad_prompt(server: Any, prompt: Any) -> None:
    response = server.post("/v1/fgrams/match", prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")


def test_without_a_table(scripted_server: Any) -> None:
    assert scripted_server.client.get("/v1/tables").json() == {"object": "list", "data": []}
    response = scripted_server.post("/v1/fgrams/match", prompt="a")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_table"
