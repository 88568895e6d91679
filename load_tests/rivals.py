"""Our server beside others on the same machine, model and prompts: `python -m load_tests.rivals --help`.

All servers are started first; then, round by round, each is measured while the others are stopped
(SIGSTOP), in an order that turns from round to round. Prompts never repeat. The last line of output is one
JSON object; `--out` saves it. README.md beside this file says what is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from load_tests import contestants, workload
from load_tests.client import complete
from load_tests.contestants import Contestant, RunningServer
from load_tests.http_response import ResponseError

DECODE_CHARS = 80
PREFILL_CHARS = 1600
FIRST_PORT = 8461

Figures = dict[str, float]
"""By test: `prefill` and `1`, `8`, ... sequences in tokens per second, `first_token_ms`; `stolen_percent`:
processor time that the virtual machine wanted and did not get."""

LESS_IS_BETTER = ("first_token_ms", "stolen_percent")

Rounds = dict[str, list[Figures]]
"""By name of the contestant."""


async def decode(server: RunningServer, prompts: list[str], max_tokens: int) -> float:
    """Generated tokens per second of wall time, short prompts included."""
    began = time.monotonic()
    if not server.contestant.streams:
        num_tokens = (await server.ask_batch(prompts, max_tokens))["completion_tokens"]
        return num_tokens / (time.monotonic() - began)
    fields = {"max_tokens": max_tokens, "temperature": 0, **server.contestant.fields}
    records = await asyncio.gather(*(complete(server.url, {"prompt": p, **fields}) for p in prompts))
    wall = max(record.end for record in records) - began
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise RuntimeError(f"{server.contestant.name}: {failed[0]}")
    # A server that does not report usage in a stream sends an event a token.
    return sum(r.num_generated_tokens or len(r.token_times) for r in records) / wall


async def prefill(server: RunningServer, prompt: str) -> tuple[float, float]:
    """Prompt tokens per second, and milliseconds until the one token that is asked for."""
    began = time.monotonic()
    usage = await server.ask_batch([prompt], 1)
    seconds = time.monotonic() - began
    return usage["prompt_tokens"] / seconds, seconds * 1e3


async def measure(server: RunningServer, prompts: dict[str, list[str]], max_tokens: int) -> Figures:
    """One round of one server; `prompts` by test."""
    figures: Figures = {}
    before = cpu_ticks()
    for test, texts in prompts.items():
        if test == "prefill":
            runs = [await prefill(server, text) for text in texts]
            figures["prefill"] = statistics.median(rate for rate, _ in runs)
            figures["first_token_ms"] = statistics.median(ms for _, ms in runs)
        else:
            figures[test] = await decode(server, texts, max_tokens)
    stolen, total = (after - b for after, b in zip(cpu_ticks(), before, strict=True))
    figures["stolen_percent"] = 100 * stolen / max(total, 1)
    return figures


def cpu_ticks() -> tuple[int, int]:
    """Of all processors since boot: ticks that the host gave to other guests, and all ticks (Linux)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[7], sum(ticks)


def round_prompts(sequences: list[int], short: Iterator[str], long: Iterator[str]) -> dict[str, list[str]]:
    tests = {str(n): [next(short) for _ in range(n)] for n in sequences}
    return {"prefill": [next(long) for _ in range(2)], **tests}


async def start(entrant: Contestant, port: int, logs: Path) -> RunningServer:
    """Starts, warms up and pauses; raises RuntimeError or ResponseError."""
    server = RunningServer(entrant, port, logs / f"{entrant.name.replace(' ', '-')}.log")
    try:
        began = time.monotonic()
        await server.wait_until_ready()
        ready_seconds = time.monotonic() - began
        await asyncio.sleep(contestants.SETTLE_SECONDS)
        await server.ask_batch(["Warm up, please. " * 20], 8)
    except BaseException:
        server.end()
        raise
    print(f"{entrant.name}: ready after {ready_seconds:.0f} s", flush=True)
    server.pause()
    return server


async def run_round(
    servers: list[RunningServer], prompts: dict[str, list[str]], max_tokens: int, rounds: Rounds
) -> None:
    for server in servers:
        server.resume()
        await server.ask_batch(["Awake again? " * 4], 2)
        figures = await measure(server, prompts, max_tokens)
        server.pause()
        rounds.setdefault(server.contestant.name, []).append(figures)
        shown = " ".join(f"{test} {value:.1f}" for test, value in figures.items())
        print(f"{server.contestant.name}: {shown}", flush=True)


async def compete(options: argparse.Namespace, logs: Path) -> Rounds:
    """The figures of each round by name; a rival that does not start is named and left out."""
    text = workload.read_library()
    short = workload.prompts(text, DECODE_CHARS, DECODE_CHARS, options.seed)
    long = workload.prompts(text, PREFILL_CHARS, PREFILL_CHARS, options.seed + 1)
    servers: list[RunningServer] = []
    rounds: Rounds = {}
    try:
        for port, entrant in enumerate(entrants(options), FIRST_PORT):
            try:
                servers.append(await start(entrant, port, logs))
            except (RuntimeError, ResponseError) as error:
                print(f"left out: {error}", flush=True)
        for number in range(options.rounds):
            turn = number % len(servers)
            prompts = round_prompts(options.sequences, short, long)
            await run_round(servers[turn:] + servers[:turn], prompts, options.max_tokens, rounds)
    finally:
        for server in servers:
            server.end()
    return rounds


def entrants(options: argparse.Namespace) -> list[Contestant]:
    return on_gpu(options) if options.device != "cpu" else on_cpu(options)


def on_gpu(options: argparse.Namespace) -> list[Contestant]:
    """Ours without and with the table, transformers with padded batches and with its own batching."""
    model, device = options.model, options.device
    ours = [contestants.ours("scone", "auto", model, None, device)]
    if options.table:
        ours.append(contestants.ours("scone, table", "auto", model, options.table, device))
    libraries = ("transformers", "transformers-batches") if options.hf_folder else ()
    return [*ours, *[contestants.transformers(options.hf_folder, name, device) for name in libraries]]


def on_cpu(options: argparse.Namespace) -> list[Contestant]:
    ours = [contestants.ours("scone fp32", "none", options.model)]
    ours += [contestants.ours(f"scone {q}", q, options.model) for q in options.quantization]
    if options.table:
        ours.append(contestants.ours("scone auto, table", "auto", options.model, options.table))
    rivals = []
    if options.hf_folder:
        rivals.append(contestants.transformers(options.hf_folder))
    if options.vllm_python:
        rivals.append(contestants.vllm(options.vllm_python, options.hf_folder))
    if options.llama_python:
        rivals.append(contestants.llama_cpp(options.llama_python, options.model))
        if options.llama_server:
            rivals.append(contestants.llama_cpp_server(options.llama_python, options.model))
    return [*ours, *rivals]


def medians(rounds: Rounds) -> dict[str, Figures]:
    return {
        name: {test: round(statistics.median(f[test] for f in figures), 1) for test in figures[0]}
        for name, figures in rounds.items()
    }


def bests(rounds: Rounds) -> dict[str, Figures]:
    """Each test's best round: what is left of an interrupted machine's figures."""
    return {
        name: {
            test: round((min if test in LESS_IS_BETTER else max)(f[test] for f in figures), 1)
            for test in figures[0]
        }
        for name, figures in rounds.items()
    }


def ratios(middle: dict[str, Figures]) -> dict[str, dict[str, float]]:
    """Each of ours over the best rival of each test; more is better, also for the first token."""
    rivals = [figures for name, figures in middle.items() if not name.startswith("scone")]
    if not rivals:
        return {}
    return {
        name: {
            test: round(
                min(r[test] for r in rivals) / value
                if test in LESS_IS_BETTER
                else value / max(r[test] for r in rivals),
                2,
            )
            for test, value in figures.items()
            if test != "stolen_percent"
        }
        for name, figures in middle.items()
        if name.startswith("scone")
    }


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Markdown; a column a test."""
    tests = list(next(iter(rows.values())))
    lines = [f"| {title} | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[t]:g}" for t in tests) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def machine(device: str) -> str:
    """What the servers run on."""
    parts = [f"{os.cpu_count()} cores", platform.platform(), f"Python {platform.python_version()}"]
    if device != "cpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        parts.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    return ", ".join(parts)


def export_hf(model: str, folder: str) -> None:
    """The GGUF's weights in float32 as a Hugging Face folder, which transformers and vLLM load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(model)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    loaded.hf_quantizer = None  # the weights have been turned into floats
    del loaded.config.quantization_config
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.rivals", description="Measure our server beside others."
    )
    parser.add_argument("--model", required=True, help="the GGUF file")
    parser.add_argument("--table", help="also measure ours with this table")
    parser.add_argument(
        "--quantization", nargs="*", default=["int8", "auto"], help="ours, besides fp32 (default: int8 auto)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cuda: all in bfloat16 on a GPU, ours and transformers"
    )
    parser.add_argument("--hf-folder", help="transformers takes part, with this folder; made if not there")
    parser.add_argument("--vllm-python", help="vLLM takes part (needs --hf-folder): its interpreter")
    parser.add_argument("--llama-python", help="llama.cpp takes part: interpreter with llama-cpp-python")
    parser.add_argument("--llama-server", action="store_true", help="llama.cpp's Python server as well")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    if options.vllm_python and not options.hf_folder:
        parser.error("--vllm-python needs --hf-folder")
    return options


def main() -> int:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers are ended then too
    if options.hf_folder and not Path(options.hf_folder, "config.json").exists():
        export_hf(options.model, options.hf_folder)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    logs = Path(tempfile.mkdtemp(prefix="rivals-"))
    rounds = asyncio.run(compete(options, logs))
    middle, best = medians(rounds), bests(rounds)
    for title, figures in (("median", middle), ("best round", best)):
        print(table(title, figures))
        if ratio := ratios(figures):
            print(table(f"ours / best rival, {title}", ratio))
    line = json.dumps(
        {
            "benchmark": "rivals",
            "date": started,
            "machine": machine(options.device),
            "command": "python -m load_tests.rivals " + " ".join(sys.argv[1:]),
            "max_tokens": options.max_tokens,
            "rounds": rounds,
            "medians": middle,
            "bests": best,
            "ours_over_best_rival": {"medians": ratios(middle), "bests": ratios(best)},
        }
    )
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
