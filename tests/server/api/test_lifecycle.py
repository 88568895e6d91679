"""`scone serve` as a process: what it logs, how signals end it."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from scone.model_store.decoder import Decoder
from scone.model_store.hf_folder import save_hf_folder
from scone.model_store.tokenizer import Tokenizer

from .process import Process


@pytest.fixture(scope="module")
def checkpoint(tiny_decoder: Decoder, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_hf_folder(folder, tiny_decoder, tokenizer)
    return folder


@pytest.fixture
def launch() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(*arguments: str, **environ: str) -> Process:
        processes.append(Process(*arguments, **environ))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def test_start_serve_and_drain(launch: Any, checkpoint: Path, tokenizer: Tokenizer) -> None:
    process = launch(
        *("--model", str(checkpoint), "--drain-timeout", "60"),
        *("--kv-cache-dtype", "bfloat16", "--kv-cache-bytes", "16MiB", "--max-model-len", "256"),
        SCONE_API_KEY="secret-key",
    )
    process.wait_for("ready after")
    assert f"curl {process.url}/v1/completions" in process.log
    assert "secret-key" not in process.log
    headers = {"Authorization": "Bearer secret-key"}
    metrics = httpx.get(process.url + "/metrics", headers=headers).text
    [kv_cache_bytes] = re.findall(r'^scone_kv_cache_bytes{dtype="bfloat16"} (.+)$', metrics, re.MULTILINE)
    assert float(kv_cache_bytes) == 32 * 256 * (3 * 2 * 2 * 16) * 2
    body = {
        "prompt": "One, two, three,",
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream(
        "POST", process.url + "/v1/completions", json=body, headers=headers, timeout=60
    ) as stream:
        assert stream.status_code == 200
        process.child.send_signal(signal.SIGTERM)
        events = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert not any("error" in event for event in events)
    assert process.exit_code() == 0
    assert "completion_tokens=40" in process.log
    assert "Traceback" not in process.log


def test_sigterm_while_loading(launch: Any, checkpoint: Path, tmp_path: Path) -> None:
    """A model that never ends to load: reading its config waits for somebody who writes it."""
    folder = tmp_path / "endless"
    shutil.copytree(checkpoint, folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    process = launch("--model", str(folder))
    process.wait_for("opening ")
    assert httpx.get(process.url + "/ready", timeout=60).json()["error"]["code"] == "model_loading"
    process.child.send_signal(signal.SIGTERM)
    assert process.exit_code(60) == 0
    assert "ready after" not in process.log


def test_sigterm_under_load_loses_no_admitted_request(launch: Any, checkpoint: Path) -> None:
    """24 clients ask without pause; after the signal each gets its whole answer, or 503 before any of it."""
    process = launch("--model", str(checkpoint), "--drain-timeout", "120", "--max-num-seqs", "8")
    process.wait_for("ready after")
    outcomes: list[str] = []

    def ask(number: int) -> None:
        body = {"prompt": f"client {number}", "max_tokens": 60, "ignore_eos": True, "stream": number % 2 == 0}
        with httpx.Client(base_url=process.url, timeout=150) as client:
            while True:
                try:
                    response = client.post("/v1/completions", json=body)
                except httpx.TransportError:
                    # Closed in our face. If this one had been admitted, the log would count one more.
                    return outcomes.append("refused")
                if response.status_code == 503:
                    assert response.json()["error"]["code"] == "shutting_down"
                    return outcomes.append("refused")
                assert response.status_code == 200, response.text
                if body["stream"]:
                    assert response.text.endswith("data: [DONE]\n\n")
                    assert response.text.count('"finish_reason":"length"') == 1
                    assert "error" not in response.text
                else:
                    assert response.json()["usage"]["completion_tokens"] == 60
                outcomes.append("answered")

    with ThreadPoolExecutor(24) as pool:
        clients = [pool.submit(ask, i) for i in range(24)]
        process.wait_for("finished ")  # the first answers are there, all the others under way
        process.child.send_signal(signal.SIGTERM)
        for client in clients:
            client.result()
    assert process.exit_code() == 0
    assert outcomes.count("refused") == 24
    num_admitted = len(re.findall(r"finished request_id=\S+ .*finish=(\S+)", process.log))
    assert process.log.count("finish=length") == num_admitted == outcomes.count("answered")


def test_second_signal_ends_at_once(launch: Any, checkpoint: Path) -> None:
    process = launch("--model", str(checkpoint), "--drain-delay", "100")
    process.wait_for("ready after")
    process.child.send_signal(signal.SIGINT)
    process.wait_for("not ready any more")
    process.child.send_signal(signal.SIGTERM)
    assert process.exit_code(60) == 1


def test_bad_model_is_one_line(launch: Any, tmp_path: Path) -> None:
    process = launch("--model", str(tmp_path / "nothing"))
    assert process.exit_code() == 1
    assert process.log.splitlines()[-1].startswith("scone serve: ")
    assert "nothing" in process.log
    assert "Traceback" not in process.log


def test_taken_port_is_one_line(launch: Any, checkpoint: Path) -> None:
    first = launch("--model", str(checkpoint))
    port = first.url.rpartition(":")[2]
    second = launch("--model", str(checkpoint), "--port", port)
    assert second.exit_code() == 1
    assert "--port" in second.log
    assert "Traceback" not in second.log
