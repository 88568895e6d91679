"""What clients see when things go wrong: in the engine, in the queue, on the connection, in time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from scone.server.engine.engine_config import EngineConfig


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def raw_post(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A request as bytes, for connections that are closed before the answer."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


def test_failure_before_the_first_token_has_its_status(scripted_server: Any, scripted: Any) -> None:
    scripted.fail_after = 0
    for stream in (False, True):
        response = scripted_server.post("/v1/completions", prompt="abc", stream=stream)
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"]["code"] == "generation_failed"
        assert "/data" not in response.text
    wait_until(lambda: not scripted_server.state.in_flight)


def test_failure_in_a_stream_is_an_event_then_done(scripted_server: Any, scripted: Any) -> None:
    scripted.fail_after = 3
    events = scripted_server.stream(prompt="abc", max_tokens=9)
    assert events.count("[DONE]") == 1
    assert events[-1] == "[DONE]"
    error = json.loads(events[-2])["error"]
    assert error["code"] == "generation_failed"
    assert sum(len(json.loads(e)["choices"]) for e in events[:-2]) == 3


def test_full_queue_is_503_with_retry_after(scripted_server: Any, scripted: Any) -> None:
    scripted.room = 1
    response = scripted_server.post("/v1/completions", prompt=["a", "b"], stream=True)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "queue_full"
    assert scripted.requests == []
    assert scripted_server.metric("scone_admission_rejections_total", reason="queue_full") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_generating", [False, True])
def test_disconnect_aborts(scripted_server: Any, scripted: Any, stream: bool, is_generating: bool) -> None:
    scripted.step_seconds = 0.05  # 20 s to its end
    if not is_generating:
        scripted.gate.clear()
    sent = raw_post({"prompt": ["ab", "cd"], "n": 2, "max_tokens": 400, "stream": stream})
    address = scripted_server.client.base_url
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(sent)
        wait_until(lambda: len(scripted.requests) == 2)
        if is_generating and stream:
            assert connection.recv(100)
    wait_until(lambda: len(scripted.aborted) == 2)
    wait_until(lambda: not scripted_server.state.in_flight)
    scripted.gate.set()
    wait_until(lambda: scripted.finished == ["abort"] * 4)


def test_silent_stream_gets_comments(serve: Any, scripted_model: Any, scripted: Any) -> None:
    scripted.gate.clear()
    with (
        serve(scripted_model, keep_alive_interval=0.05) as server,
        server.client.stream(
            "POST", "/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 1}
        ) as r,
    ):
        lines = r.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
        scripted.gate.set()
        rest = [line for line in lines if line.startswith("data: ")]
    assert len(rest) == 2
    assert rest[-1] == "data: [DONE]"


def test_request_timeout(serve: Any, scripted_model: Any, scripted: Any) -> None:
    scripted.step_seconds = 0.02
    with serve(scripted_model, request_timeout=1.5) as server:  # longer than the first token takes
        response = server.post("/v1/completions", prompt="a", max_tokens=400)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        *_, error, done = server.stream(prompt="a", max_tokens=400)
        assert done == "[DONE]"
        assert json.loads(error)["error"]["code"] == "timeout"
        wait_until(lambda: len(scripted.aborted) == 2)


def test_queue_timeout(serve: Any, scripted_model: Any, scripted: Any) -> None:
    with serve(scripted_model, queue_timeout=0.1) as server:
        scripted.step_seconds = 0.02
        assert server.complete(prompt="a", max_tokens=16)["usage"]["completion_tokens"] == 16
        scripted.gate.clear()
        response = server.post("/v1/completions", prompt="a")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "queue_timeout"
        assert int(response.headers["retry-after"]) >= 1
        assert server.metric("scone_admission_rejections_total", reason="queue_timeout") == 1
        wait_until(lambda: len(scripted.aborted) == 1)


def test_queue_timeout_of_the_real_engine(serve_real: Any) -> None:
    """Two requests that need the one place: the second is refused, the first goes on."""
    one_at_a_time = EngineConfig(max_model_len=512, kv_cache_bytes=1 << 20, max_num_seqs=1)
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with (
        serve_real(one_at_a_time, step_seconds=0.02, queue_timeout=1.0) as server,
        server.client.stream("POST", "/v1/completions", json=body) as first,
    ):
        second = httpx.post(server.url + "/v1/completions", json={"prompt": "b"}, timeout=60)
        assert second.json()["error"]["code"] == "queue_timeout"
        assert list(first.iter_lines())[-2] == "data: [DONE]"


def test_loading(serve: Any, scripted_model: Any) -> None:
    with serve(None) as server:
        assert server.client.get("/health").json() == {"status": "loading"}
        for response in (
            server.client.get("/ready"),
            server.client.get("/v1/models"),
            server.post("/v1/completions", prompt="a"),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_loading"
            assert int(response.headers["retry-after"]) >= 1
        server.loop.call_soon_threadsafe(server.state.serve, scripted_model)
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        assert server.complete(prompt="a", max_tokens=1)


def test_stall_fails_health(scripted_server: Any, scripted: Any) -> None:
    scripted.stats_now.last_step_monotonic = time.monotonic() - 1000
    assert scripted_server.client.get("/health").status_code == 200, "an idle engine makes no steps"
    scripted.stats_now.has_work = True
    for path in ("/health", "/ready"):
        response = scripted_server.client.get(path)
        assert response.status_code == 503
        assert "no step" in response.json()["error"]["message"]


def test_dead_engine_ends_requests(scripted_server: Any, scripted: Any) -> None:
    scripted.gate.clear()
    scripted.alive = False
    response = scripted_server.post("/v1/completions", prompt="a")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_dead"
    assert scripted_server.client.get("/health").status_code == 503


def test_phases_of_a_drain(serve: Any, scripted_model: Any, scripted: Any) -> None:
    """Admitted work is finished; /ready says no at once; new work is refused after the delay."""
    delay = 1.0
    with serve(scripted_model, drain_delay=delay, drain_timeout=600) as server:
        body = {"prompt": "ab", "max_tokens": 250, "stream": True}
        scripted.step_seconds = 0.001
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            scripted.gate.clear()  # it stays in flight until all has been looked at
            began = time.monotonic()
            server.loop.call_soon_threadsafe(server.http.stop)
            wait_until(lambda: server.state.phase != "ready")
            assert httpx.get(server.url + "/ready", timeout=60).status_code == 503
            wait_until(lambda: server.state.phase == "draining")
            assert time.monotonic() - began >= delay
            refused = httpx.post(server.url + "/v1/completions", json={"prompt": "a"}, timeout=60)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert httpx.get(server.url + "/health", timeout=60).status_code == 200
            scripted.gate.set()
            events = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert len(events) == 251
        assert events[-1] == "data: [DONE]"
        wait_until(lambda: server.http.should_exit)


def test_requests_are_taken_while_leaving(scripted_server: Any) -> None:
    scripted_server.state.phase = "leaving"
    assert scripted_server.client.get("/ready").status_code == 503
    assert scripted_server.complete(prompt="a")["choices"]


def test_drain_timeout_ends_with_error_and_done(serve: Any, scripted_model: Any, scripted: Any) -> None:
    with serve(scripted_model, drain_timeout=0.2) as server:
        scripted.step_seconds = 0.02
        with server.client.stream(
            "POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 400, "stream": True}
        ) as r:
            server.loop.call_soon_threadsafe(server.http.stop)
            events = [line.removeprefix("data: ") for line in r.iter_lines() if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "shutting_down"
        wait_until(lambda: server.http.should_exit)


def test_many_abandoned_requests_leave_nothing(scripted_server: Any, scripted: Any) -> None:
    scripted.gate.clear()
    address = scripted_server.client.base_url
    sent = raw_post({"prompt": "ab", "max_tokens": 400})
    connections = []
    for _ in range(50):
        connections.append(socket.create_connection((address.host, address.port)))
        connections[-1].sendall(sent)
    wait_until(lambda: len(scripted_server.state.in_flight) == 50)
    for connection in connections:
        connection.close()
    wait_until(lambda: not scripted_server.state.in_flight)
    assert len(scripted.aborted) == 50


def test_200_abandoned_requests_then_one_answers_at_once(serve_real: Any) -> None:
    """With the real engine: half streamed, half not, none read; afterwards every gauge is back at 0."""
    with serve_real(EngineConfig(max_model_len=256, kv_cache_bytes=1 << 23)) as server:
        address = (server.client.base_url.host, server.client.base_url.port)
        connections = []
        for i in range(200):
            body = {"prompt": f"abc {i}", "max_tokens": 250, "ignore_eos": True, "stream": i % 2 == 0}
            connections.append(socket.create_connection(address))
            connections[-1].sendall(raw_post(body))
        wait_until(lambda: server.metric("scone_prompt_tokens_total") > 0)
        for connection in connections:
            connection.close()
        answer = server.complete(prompt="abc", max_tokens=2)
        assert answer["choices"]
        wait_until(lambda: not server.state.in_flight, 30)
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            wait_until(lambda gauge=gauge: server.metric(f"scone_{gauge}") == 0)  # type: ignore[misc]
        aborted = server.metric("scone_request_success_total", finished_reason="abort")
        ended = sum(
            server.metric("scone_request_success_total", finished_reason=reason)
            for reason in ("stop", "length", "abort", "error")
        )
        assert aborted > 0
        assert server.metric("scone_request_success_total", finished_reason="error") == 0
        assert ended <= 201
