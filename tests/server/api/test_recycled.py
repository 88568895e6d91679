"""Recycled states as clients and operators see them: usage, counters, the admin view, emptying."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_store import RecycledStore

from .process import Process

PROMPT = list(range(10, 150))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecycledStore]:
    with RecycledStore.open(
        tmp_path / "store", RecycledConfig(disk_bytes=64 << 20), MemoryBudget(1 << 26)
    ) as store:
        yield store


def answer_without_usage(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in ("id", "created", "usage")}


def cached_tokens(answer: dict[str, Any]) -> int:
    cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def num_computed(server: Any) -> float:
    """Tokens of all steps so far, not none: a step is counted after its answers have gone out."""
    before, computed = -1.0, 0.0
    while computed == 0 or computed != before:
        time.sleep(0.1)
        before, computed = computed, server.metric("scone_iteration_tokens_total_sum")
    return computed


def test_a_restart_restores_blocks_and_says_so(serve_real: Any, store: RecycledStore) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 2}
    with serve_real(store=store) as server:
        cold = server.complete(**body)
        assert store.flush(30)
        assert server.metric("scone_recycled_queries_total", kind="blocks") == 8
        assert server.metric("scone_recycled_hits_total", kind="blocks") == 0
        assert server.metric("scone_recycled_writes_total", kind="blocks", result="stored") == 8
        assert server.metric("scone_recycled_held_bytes", kind="blocks", tier="disk") > 0
    with serve_real(store=store) as server:
        restored = server.complete(**body)
        assert answer_without_usage(restored) == answer_without_usage(cold)
        assert (cached_tokens(cold), cached_tokens(restored)) == (0, 128)
        assert server.metric("scone_recycled_hits_total", kind="blocks") == 8
        assert server.metric("scone_recycled_bytes_total", kind="blocks") == 8 * 16 * 3 * 2 * 2 * 16 * 4
        assert server.metric("scone_recycled_restored_tokens_total") == 128
        assert server.metric("scone_recycled_restore_seconds_count") == 1
        assert server.metric("scone_recycled_read_seconds_total", tier="ram") > 0
        salted = server.complete(**body, cache_salt="mine")
        assert answer_without_usage(salted) == answer_without_usage(cold)
        assert cached_tokens(salted) == 0


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_of_the_same_text_run_no_forward_pass(
    serve_real: Any, store: RecycledStore, max_tokens: int
) -> None:
    """What lm-eval asks for: the log-probabilities of a text."""
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": True}
    with serve_real(store=store) as server:
        first = server.complete(**body)
        assert store.flush(30)
        before = num_computed(server)
        again = server.complete(**body)
        assert answer_without_usage(again) == answer_without_usage(first)
        assert num_computed(server) == before
        assert cached_tokens(again) == len(PROMPT)
        assert server.metric("scone_recycled_hits_total", kind="results") == 1
        assert server.metric("scone_prompt_tokens_total") == 2 * len(PROMPT)
        assert server.metric("scone_generation_tokens_total") == 2 * max_tokens


def test_embeddings_of_a_second_head_use_the_first_ones_layers(serve_real: Any, store: RecycledStore) -> None:
    body = {"input": PROMPT, "encoding_format": "base64"}

    def vector(server: Any, **fields: Any) -> Any:
        response = server.post("/v1/embeddings", **body, **fields)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    with serve_real() as server:
        cold = [vector(server, layer=layer, pooling="last") for layer in (1, 2, 3)]
    with serve_real(store=store) as server:
        assert vector(server, layer=1, pooling="last") == cold[0]
        for layer in (2, 3):
            assert store.flush(30)
            assert vector(server, layer=layer, pooling="last") == cold[layer - 1]
            assert server.metric("scone_recycled_hits_total", kind="layer_k") == layer - 1
        assert store.flush(30)
        before = num_computed(server)
        assert vector(server, layer=3, pooling="last") == cold[2]
        assert num_computed(server) == before


def test_the_admin_view(serve_real: Any, store: RecycledStore) -> None:
    with serve_real(store=store) as server:
        server.complete(prompt=PROMPT, max_tokens=2)
        assert store.flush(30)
        card = server.client.get("/admin/recycled").json()
        assert card["path"] == "store"
        assert "keys and values are kept" in card["block_form"]
        kinds = {kind["kind"]: kind for kind in card["kinds"]}
        assert kinds["blocks"]["queries"] == 8
        tiers = {tier["tier"]: tier for tier in kinds["blocks"]["tiers"]}
        assert tiers["disk"]["entries"] == tiers["ram"]["entries"] == 8
        assert card["memory"]["staging_bytes"] == 0, "blocks are read into the KV cache"
        assert card["disk"]["total_bytes"] == 64 << 20
        assert 8 * 24576 < card["disk"]["used_bytes"] < 8 << 20
        assert card["cost"]["compute_tokens_per_second"] > 0
        assert card["cost"]["break_even_bytes_per_second"] > 0
        assert server.client.delete("/admin/recycled?kind=results").json() == {"num_cleared": 0}
        assert server.client.delete("/admin/recycled").json() == {"num_cleared": 8}
        assert store.usage()[0].num_entries == 0
        assert server.client.delete("/admin/recycled?kind=rows").json()["error"]["code"] is not None


def test_budgets_change_while_requests_run(serve_real: Any, store: RecycledStore) -> None:
    """Down and up again over HTTP: what is beyond is evicted, no answer changes, nothing fails."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 2}

    def resize(server: Any, **budgets: Any) -> httpx.Response:
        return server.client.patch("/admin/recycled", json=budgets)  # type: ignore[no-any-return]

    with serve_real(store=store) as server:
        cold = answer_without_usage(server.complete(**body))
        assert store.flush(30)
        card = resize(server, ram_bytes=0).json()
        tiers = {tier["tier"]: tier["entries"] for tier in card["kinds"][0]["tiers"]}
        assert tiers == {"ram": 0, "disk": 8}
        assert card["memory"]["total_bytes"] == 0
        assert server.metric("scone_recycled_budget_bytes", tier="ram") == 0
        assert resize(server, disk_bytes=96 << 20).json()["disk"]["total_bytes"] == 96 << 20
        assert server.metric("scone_recycled_budget_bytes", tier="disk") == 96 << 20
        assert answer_without_usage(server.complete(**body)) == cold
        assert resize(server, ram_bytes=1 << 26).json()["memory"]["total_bytes"] == 1 << 26
        refused = resize(server, disk_bytes=1000, ram_bytes=5)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_budget")
        assert "disk_bytes is 1000, wanted at least" in refused.json()["error"]["message"]
        assert server.client.get("/admin/recycled").json()["memory"]["total_bytes"] == 1 << 26
        assert resize(server, disk="1GB").status_code == 400
        assert resize(server, ram_bytes=-1).status_code == 400


def test_without_a_store(server: Any) -> None:
    patched = server.client.patch("/admin/recycled", json={"ram_bytes": 1})
    assert (patched.status_code, patched.json()["error"]["code"]) == (400, "no_store")
    assert server.client.get("/admin/recycled").json()["path"] is None
    response = server.client.delete("/admin/recycled")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_store")


@pytest.mark.heavy
def test_a_new_process_restores_what_the_former_kept(smollm2_path: Path, tmp_path: Path) -> None:
    """Two servers, one after the other, on one folder: the same answer, its prefix from the disk."""
    text = "The standard library of Python is documented in the reference. " * 20
    body = {"prompt": text, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    answers = []
    for _ in range(2):
        process = Process(
            *("--model", str(smollm2_path), "--recycled", str(tmp_path / "store")),
            *("--deterministic", "true", "--ram-bytes", "64MiB"),
        )
        try:
            process.wait_for("ready after")
            assert "as keys and values in bfloat16" in process.log
            answers.append(httpx.post(f"{process.url}/v1/completions", json=body, timeout=120).json())
            process.child.terminate()
            assert process.exit_code() == 0
        finally:
            process.close()
    cold, restored = answers
    assert answer_without_usage(restored) == answer_without_usage(cold)
    assert cached_tokens(cold) == 0
    num_prompt = restored["usage"]["prompt_tokens"]
    assert cached_tokens(restored) == (num_prompt - 1) // 16 * 16
