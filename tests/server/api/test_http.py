"""What holds on every route: errors, keys, request ids, body limits, content types, CORS, tokens, health."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest


def assert_nested(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert response.headers["x-request-id"]


def test_unknown_route_and_method(server: Any) -> None:
    assert_nested(server.client.get("/nothing"), 404, "not_found")
    assert_nested(server.client.get("/v1/completions"), 405, "method_not_allowed")
    assert_nested(server.client.get("/v1/completions/"), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/admin/recycled", "DELETE, GET, PATCH"), ("/v1/completions", "POST"), ("/v1/models/any", "GET")],
)
def test_a_refused_method_is_told_which_are_allowed(server: Any, path: str, methods: str) -> None:
    response = server.client.options(path)
    assert_nested(response, 405, "method_not_allowed")
    assert response.headers.get_list("allow") == [methods]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1,", b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}', b"\xff\xfe"],
)
def test_malformed_json(server: Any, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b"[]", b'"x"', b"null"]
)
def test_hostile_json(server: Any, content: bytes) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = server.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert len(response.content) < 1000


def test_infinite_number(server: Any) -> None:
    content = b'{"prompt": "a", "temperature": 1e999}'
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/completions", content=content, headers=headers)
    assert response.json()["error"]["param"] == "temperature"


def test_half_a_surrogate_pair(server: Any) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/tokenize", "/v1/fgrams/match"):
        response = server.client.post(path, content=b'{"prompt": "\\ud800"}', headers=headers)
        assert response.status_code == 400, response.text


def test_wrong_content_type(server: Any) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"}, {}):
        response = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert_nested(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["x" * 100_000, 3]},
        {"prompt": [3, "x" * 100_000]},
        {"prompt": "a", "n": "9" * 100_000},
        {"prompt": "a", "model": "m" * 100_000},
        {"prompt": "a", "x" * 100_000: 1, "n": 0},
        {"prompt": [[]] * 10_000},
        {"prompt": "a", "stop": [""] * 10_000},
    ],
)
def test_errors_do_not_echo_the_request(server: Any, body: dict[str, Any]) -> None:
    response = server.client.post("/v1/completions", json=body)
    assert 400 <= response.status_code < 500
    assert len(response.content) < 4000


@pytest.mark.parametrize(
    ("prompt", "param"), [("", "prompt"), ([], "prompt"), (["a", ""], "prompt.1"), ([[1], []], "prompt.1")]
)
def test_a_wrong_prompt_is_named_as_the_client_sent_it(server: Any, prompt: Any, param: str) -> None:
    error = server.client.post("/v1/completions", json={"prompt": prompt}).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param + ": ")


def test_unexpected_error_is_500_without_details(scripted_server: Any, scripted: Any) -> None:
    def explode(batch: Any) -> None:
        raise RuntimeError("secret detail in /srv/models/weights at 0x7f00deadbeef")

    scripted.submit_batch = explode
    response = scripted_server.post("/v1/completions", prompt="a")
    assert_nested(response, 500, "internal_error")
    assert "secret" not in response.text
    assert scripted_server.state.in_flight == set()


def test_body_limit(serve: Any, scripted_model: Any) -> None:
    with serve(scripted_model, max_body_bytes=1000) as server:
        assert server.complete(prompt="a" * 500)
        declared = server.post("/v1/completions", prompt="a" * 1000)
        assert_nested(declared, 413, "request_too_large")

        def pieces() -> Any:
            yield from [b'{"prompt": "', *[b"a" * 100] * 20, b'"}']

        headers = {"Content-Type": "application/json"}
        chunked = httpx.post(server.url + "/v1/completions", content=pieces(), headers=headers)
        assert_nested(chunked, 413, "request_too_large")


def test_keys(serve: Any, scripted_model: Any) -> None:
    with serve(scripted_model, api_keys=("alpha", "beta")) as server:
        get = server.client.get
        for path in ("/health", "/ready", "/metrics"):
            assert get(path).status_code == 200, path
        for path in (
            "/v1/models",
            "/version",
            "/openapi.json",
            "/docs",
            "/tokenizer_info",
            "/nothing",
            "//health",
        ):
            response = get(path)
            assert_nested(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer gamma", "Bearer", "alpha", "Basic alpha", "Bearer alpha beta", "Bearer álpha"):
            headers = {"Authorization": wrong.encode()}
            assert get("/v1/models", headers=headers).status_code == 401, wrong
        for right in ("Bearer alpha", "bearer beta", "Bearer  alpha"):
            assert get("/v1/models", headers={"Authorization": right}).status_code == 200, right


def test_metrics_can_need_a_key(serve: Any, scripted_model: Any) -> None:
    with serve(scripted_model, api_keys=("alpha",), metrics_need_key=True) as server:
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-1.2_3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a\tb", False),
        ("", False),
    ],
)
def test_request_id(server: Any, given: str, is_kept: bool) -> None:
    echoed = server.client.get("/version", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (echoed == given) is is_kept
    assert echoed


def test_one_log_line_a_request(scripted_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="scone.server.request")
    headers = {"X-Request-Id": "line-1"}
    body = {"prompt": ["ab", "secret text"], "max_tokens": 3}
    scripted_server.client.post("/v1/completions", json=body, headers=headers)
    [record] = [r for r in caplog.records if r.name == "scone.server.request"]
    line = record.getMessage()
    for part in ("request_id=line-1", "prompts=2", "completion_tokens=6", "finish=lengthx2"):
        assert part in line
    assert "secret" not in line


def test_cors_is_off_unless_set(serve: Any, scripted_model: Any, server: Any) -> None:
    origin = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=origin).headers
    with serve(scripted_model, cors_allow_origins=("https://page.example",)) as open_server:
        response = open_server.client.get("/v1/models", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://page.example"


def test_models(server: Any) -> None:
    [card] = server.client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 256)
    assert server.client.get("/v1/models/tiny").json() == card
    assert_nested(server.client.get("/v1/models/org/other"), 404, "model_not_found")


def test_health_and_version(server: Any) -> None:
    assert server.client.get("/health").json() == {"status": "ready"}
    assert server.client.get("/ready").json() == {"status": "ready"}
    assert server.client.get("/version").json()["version"]


@pytest.mark.parametrize("text", ["", "abc", "añ€😀\n\t", "<|im_start|>user", "x" * 20_000])
def test_tokenize_and_back(server: Any, tokenizer: Any, text: str) -> None:
    answer = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_tokenize_messages(server: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "abc"}]
    answer = server.post("/tokenize", messages=messages).json()
    rendered = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": rendered}
    usage = server.post("/v1/chat/completions", messages=messages, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == answer["count"]
    wrong: list[dict[str, Any]] = [{}, {"prompt": "a", "messages": messages}, {"messages": []}]
    for body in wrong:
        assert server.post("/tokenize", **body).status_code == 400


def test_detokenize_checks_ids(server: Any) -> None:
    for tokens in ([300], [-1], ["a"], [True]):
        assert server.post("/detokenize", tokens=tokens).json()["error"]["param"] == "tokens"


def test_tokenizer_info(server: Any) -> None:
    info = server.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == ("<s>", "</s>", 300)
    assert "im_start" in info["chat_template"]


def test_malformed_request_among_good_ones_changes_nothing(server: Any) -> None:
    """31 good requests at once, with and without a bad one among them: the same tokens."""
    good = [{"prompt": f"abc {i}", "max_tokens": 12, "seed": i, "return_token_ids": True} for i in range(31)]
    bad: dict[str, Any] = {"prompt": [300], "logit_bias": {"999": 1}}

    def together(bodies: list[dict[str, Any]]) -> list[Any]:
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: server.post("/v1/completions", **body), bodies))
        return [
            json.loads(a.content)["choices"][0]["token_ids"] if a.status_code == 200 else a.status_code
            for a in answers
        ]

    alone = together(good)
    mixed = together([*good[:15], bad, *good[15:]])
    assert mixed.pop(15) == 400
    assert mixed == alone
