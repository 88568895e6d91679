"""POST /v1/embeddings over a real socket."""

from __future__ import annotations

import base64
import socket
from typing import Any

import numpy as np
import openai
import pytest
import torch

from scone.model_store.decoder import CausalAttention, Decoder

from .test_faults import raw_post, wait_until


def embed(server: Any, **body: Any) -> Any:
    response = server.post("/v1/embeddings", **body)
    assert response.status_code == 200, response.text
    return response.json()


def vectors(answer: Any) -> Any:
    return np.array([item["embedding"] for item in answer["data"]], dtype=np.float32)


def test_all_input_forms_agree(server: Any, tokenizer: Any) -> None:
    texts = ["abc", "xyz €"]
    ids = [tokenizer.encode(text) for text in texts]
    answer = embed(server, input=texts, model="tiny")
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    num_tokens = sum(map(len, ids))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == num_tokens
    assert "completion_tokens" not in answer["usage"]
    assert answer["usage"]["fgram"]["matched_tokens"] >= 3
    assert vectors(answer).shape == (2, 64)
    assert (vectors(answer) == vectors(embed(server, input=ids))).all()
    for i in range(2):
        for form in (texts[i], ids[i]):
            assert (vectors(embed(server, input=form))[0] == vectors(answer)[i]).all()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [None, 0, 2, 3])
def test_rows_of_the_table_are_in_the_inputs(
    server: Any, tiny_decoder: Decoder, tokenizer: Any, served_table: Any, pooling: str, layer: int | None
) -> None:
    text = "zabcdxy"
    ids = torch.tensor(tokenizer.encode(text))
    row_ids, _ = served_table.table.match(ids)
    assert (row_ids >= 0).sum() >= 4
    with torch.inference_mode():
        inputs = tiny_decoder.embed(ids)
        inputs[torch.from_numpy(row_ids >= 0)] = served_table.table.rows(row_ids[row_ids >= 0]).float()
        hidden = tiny_decoder(inputs[None], torch.arange(len(ids))[None], CausalAttention(), layer)[0]
    expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
    answer = embed(server, input=text, pooling=pooling, layer=layer)
    np.testing.assert_allclose(vectors(answer)[0], expected.numpy(), atol=2e-5)


def test_base64_is_the_same_bits(server: Any) -> None:
    as_floats = embed(server, input=["abc", "q"], encoding_format="float")
    as_text = embed(server, input=["abc", "q"], encoding_format="base64")
    for floats, text in zip(vectors(as_floats), as_text["data"], strict=True):
        assert np.frombuffer(base64.b64decode(text["embedding"]), "<f4").tolist() == floats.tolist()


def test_a_prompt_may_fill_the_context(server: Any) -> None:
    assert embed(server, input=[70] * 256)["usage"]["prompt_tokens"] == 256


def test_dimensions_of_the_model_are_accepted(server: Any) -> None:
    assert vectors(embed(server, input="abc", dimensions=64, user="someone", normalize=False)).shape == (
        1,
        64,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [70] * 257}, "input"),
        ({"input": ["a"] * 129}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 32}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"layer": 4}, "layer"),
        ({"layer": -1}, "layer"),
        ({"layer": "1"}, "layer"),
        ({"normalize": True}, "normalize"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
def test_bad_field(server: Any, fields: dict[str, Any], param: str) -> None:
    response = server.post("/v1/embeddings", **({"input": "a"} if fields else {}) | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].split(".")[0] == param
    assert server.state.in_flight == set()


def test_other_errors(server: Any) -> None:
    error = server.post("/v1/embeddings", input=[70] * 257).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "answer" not in error["message"]
    missing = server.post("/v1/embeddings", input="a", model="other")
    assert missing.status_code == 404
    before = server.metric("scone_unknown_parameters_total")
    embed(server, input="a", no_such_embedding_field=1)
    assert server.metric("scone_unknown_parameters_total") == before + 1


def test_full_queue_refuses_all_of_it(scripted_server: Any, scripted: Any) -> None:
    scripted.room = 1
    response = scripted_server.post("/v1/embeddings", input=["a", "b"])
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert scripted.requests == []


def test_disconnect_aborts(scripted_server: Any, scripted: Any) -> None:
    scripted.gate.clear()
    address = scripted_server.client.base_url
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(raw_post({"input": ["ab", "cd"]}, "/v1/embeddings"))
        wait_until(lambda: len(scripted.requests) == 2)
    wait_until(lambda: len(scripted.aborted) == 2)
    wait_until(lambda: not scripted_server.state.in_flight)


def test_it_shares_the_batch_and_the_counters(serve_real: Any) -> None:
    """Completions under way are not held up, and the engine counts an embedding as a request."""
    with serve_real(step_seconds=0.02) as server:
        body = {"prompt": "ab", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body):
            with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
                answer = client.embeddings.create(model="tiny", input=["abc", "xyz"])  # asks for base64
            assert len(answer.data[1].embedding) == 64
            assert server.metric("scone_num_requests_running") == 1, "it was answered meanwhile"
        assert server.metric("scone_request_success_total", finished_reason="stop") == 2
        assert server.metric("scone_prompt_tokens_total") == 2 + 3 + 3
        assert server.metric("scone_time_to_first_token_seconds_count") == 1
        wait_until(lambda: server.metric("scone_kv_cache_usage_perc") == 0)
