"""Every metric moves when what it counts happens."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import pytest

from scone.server.engine.engine_config import EngineConfig


def wait_for(condition: Callable[[], bool]) -> None:
    """The engine counts a step after sending what it made: a client can be ahead of the counters."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def fresh(serve_real: Any) -> Any:
    with serve_real(EngineConfig(max_model_len=512, kv_cache_bytes=1 << 20, max_num_queued_reqs=2)) as server:
        yield server


def test_request_metrics(fresh: Any) -> None:
    fresh.complete(prompt="zzzz", max_tokens=4, ignore_eos=True, n=2)
    fresh.complete(prompt="zzzz", max_tokens=1, ignore_eos=True)
    wait_for(lambda: fresh.metric("scone_iteration_tokens_total_sum") >= 4 + 2 * 3 + 4)
    assert fresh.metric("scone_request_success_total", finished_reason="length") == 3
    assert fresh.metric("scone_generation_tokens_total") == 9
    assert fresh.metric("scone_prompt_tokens_total") == 8
    assert fresh.metric("scone_time_to_first_token_seconds_count") == 3
    assert fresh.metric("scone_inter_token_latency_seconds_count") == 6
    for name in ("e2e_request_latency", "request_queue_time"):
        assert fresh.metric(f"scone_{name}_seconds_count") == 3
        assert fresh.metric(f"scone_{name}_seconds_sum") > 0
    assert fresh.metric("scone_step_seconds_count") >= 5


def test_token_counters_move_while_a_request_runs(serve_real: Any) -> None:
    body = {"prompt": "zzzz", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with serve_real(step_seconds=0.05) as server, server.client.stream("POST", "/v1/completions", json=body):
        assert server.metric("scone_prompt_tokens_total") == 4
        wait_for(lambda: server.metric("scone_generation_tokens_total") >= 5)
        assert server.metric("scone_request_success_total", finished_reason="length") == 0


def test_table_metrics(fresh: Any) -> None:
    def total(name: str, **labels: str) -> float:
        return float(fresh.metric(f"scone_fgram_{name}", **labels))

    n_before = [total("lookups_total", n=str(n)) for n in range(1, 6)]
    rows_before = total("rows_read_total", tier="disk")
    bytes_before = total("bytes_read_total", tier="disk")
    reads_before = total("read_seconds_count", tier="disk")
    fresh.complete(prompt="zabcd", max_tokens=0, echo=True)
    n_after = [total("lookups_total", n=str(n)) for n in range(1, 6)]
    assert [after - before for after, before in zip(n_after, n_before, strict=True)] == [2, 1, 1, 1, 0]
    assert total("rows_read_total", tier="disk") - rows_before == 3
    assert total("bytes_read_total", tier="disk") - bytes_before == 3 * 64 * 2
    assert total("read_seconds_count", tier="disk") > reads_before
    assert total("read_seconds_bucket", tier="disk", le="+Inf") == total("read_seconds_count", tier="disk")
    assert fresh.metric("scone_table_rows", tier="disk") == 5
    assert fresh.metric("scone_table_mapped_bytes") > 0
    assert (
        0 < fresh.metric("scone_table_resident_bytes") <= fresh.metric("scone_table_mapped_bytes") + 8 * 4096
    )


def test_prefix_cache_metrics(fresh: Any) -> None:
    prompt = list(range(10, 80))
    for _ in range(2):
        answer = fresh.complete(prompt=prompt, max_tokens=1)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
    wait_for(lambda: fresh.metric("scone_prefix_cache_queries_total") == 140)
    assert (
        fresh.metric("scone_prefix_cache_hits_total")
        == answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    )


def test_gauges_and_aborts(serve_real: Any) -> None:
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 2}
    with serve_real(step_seconds=0.05) as server:
        with server.client.stream("POST", "/v1/completions", json=body):
            wait_for(lambda: server.metric("scone_num_requests_running") == 2)
            assert server.metric("scone_kv_cache_usage_perc") > 0
        wait_for(lambda: server.metric("scone_request_success_total", finished_reason="abort") == 2)
        wait_for(lambda: server.metric("scone_num_requests_running") == 0)
        assert server.metric("scone_num_requests_waiting") == 0
        assert server.metric("scone_kv_cache_usage_perc") == 0


def test_rejections(fresh: Any) -> None:
    response = fresh.post("/v1/completions", prompt=["a", "b", "c"])
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_full"
    assert fresh.metric("scone_admission_rejections_total", reason="queue_full") == 1
    assert fresh.metric("scone_request_success_total", finished_reason="length") == 0


def test_process_metrics_move(fresh: Any) -> None:
    before = fresh.metric("scone_process_minor_page_faults_total")
    with mmap.mmap(-1, 1 << 24) as pages:  # new memory for certain, and touched
        pages.write(b"x" * len(pages))
    assert fresh.metric("scone_process_minor_page_faults_total") > before
    assert fresh.metric("scone_process_major_page_faults_total") >= 0
    assert fresh.metric("scone_process_resident_bytes", kind="anon") > 1 << 20
    assert fresh.metric("process_resident_memory_bytes") > 1 << 20


def test_page_is_prometheus_text(server: Any) -> None:
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE scone_time_to_first_token_seconds histogram" in response.text
