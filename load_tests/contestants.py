"""The servers that `load_tests.rivals` compares: how each is started, asked, paused and ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_tests.client import get_text, post_json
from load_tests.http_response import ResponseError

START_SECONDS = 200
SETTLE_SECONDS = 3
"""Servers may still be preparing in the background when they say that they are ready."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server that has not been started.

    Attributes:
        command: with `{port}` where the port goes.
        ready_path: answers 200 once the server can generate.
        fields: what its requests carry besides prompt, max_tokens and temperature.
        streams: whether answers are read as streams, one request a sequence; else all sequences go as
            one request with a list of prompts and the answer comes whole.
    """

    name: str
    command: tuple[str, ...]
    ready_path: str
    fields: dict[str, Any]
    streams: bool = True


def ours(
    name: str, quantization: str, model: str, table: str | None = None, device: str = "cpu"
) -> Contestant:
    command = [sys.executable, "-m", "scone.server.cli", "serve", "--model", model, "--device", device]
    command += ["--quantization", quantization, "--port", "{port}"]
    if table is not None:
        command += ["--table", table]
    return Contestant(name, tuple(command), "/ready", {"ignore_eos": True})


def transformers(folder: str, library: str = "transformers", device: str = "cpu") -> Contestant:
    """`library` is a name that batch_server.py knows."""
    script = str(Path(__file__).with_name("batch_server.py"))
    command = (sys.executable, script, library, folder, "--port", "{port}", "--device", device)
    return Contestant(library, command, "/", {}, streams=False)


def llama_cpp(python: str, model: str) -> Contestant:
    """llama.cpp through its batch interface: faster than its Python server, which takes turns."""
    script = str(Path(__file__).with_name("batch_server.py"))
    command = (python, script, "llama.cpp", model, "--port", "{port}")
    return Contestant("llama.cpp batches", command, "/", {}, streams=False)


def llama_cpp_server(python: str, model: str) -> Contestant:
    threads = str(os.cpu_count() or 1)
    command = [python, "-m", "llama_cpp.server", "--model", model, "--port", "{port}", "--n_ctx", "2048"]
    command += ["--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "False"]
    # It has no ignore_eos: the end tokens are ruled out instead.
    fields = {"logit_bias": {"0": -100, "2": -100}}
    return Contestant("llama.cpp server", tuple(command), "/v1/models", fields)


def vllm(python: str, folder: str) -> Contestant:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", "{port}"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--gpu-memory-utilization", "0.25"]
    # By default it keeps a core free for its other processes, which of two cores is half the machine.
    cores = f"VLLM_CPU_OMP_THREADS_BIND=0-{(os.cpu_count() or 1) - 1}"
    return Contestant("vLLM", ("env", cores, *command), "/health", {"ignore_eos": True})


class RunningServer:
    """A contestant's process group; stopped (SIGSTOP) while others are measured."""

    def __init__(self, contestant: Contestant, port: int, log: Path) -> None:
        self.contestant = contestant
        self.url = f"http://127.0.0.1:{port}"
        command = [part.format(port=port) for part in contestant.command]
        threads = str(os.cpu_count() or 1)
        # The rivals' compilers are found beside their interpreter.
        folders = [str(Path(part).parent) for part in command if part.endswith("/python")]
        path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PATH": path},
            )
        self._log = log

    async def wait_until_ready(self) -> None:
        """Raises RuntimeError if the server ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                await get_text(self.url, self.contestant.ready_path)
                return
            except (OSError, ResponseError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.contestant.name} did not start, see {self._log}") from None
            await asyncio.sleep(0.5)

    async def ask_batch(self, prompts: list[str], max_tokens: int) -> dict[str, int]:
        """All prompts as one request that is answered whole; returns its usage."""
        prompt = prompts[0] if len(prompts) == 1 else prompts
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **self.contestant.fields}
        usage: dict[str, int] = (await post_json(self.url, "/v1/completions", body))["usage"]
        return usage

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Ends the whole group at once: it may be paused."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
