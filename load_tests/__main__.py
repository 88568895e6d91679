"""Drives a running server: `python -m load_tests --concurrency 1 4 16` (see README.md beside this file).

The last line of output is one JSON object. Exit code 1 if a threshold is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load_tests import report, workload
from load_tests.client import RequestRecord, complete, get_text
from load_tests.http_response import ResponseError


async def closed_loop(requests: list[dict[str, Any]], concurrency: int, **kwargs: Any) -> list[RequestRecord]:
    """`concurrency` clients, each of which sends its next request when the last one has ended."""
    remaining = iter(requests)

    async def client() -> list[RequestRecord]:
        return [await complete(body=body, **kwargs) for body in remaining]

    return [
        record
        for records in await asyncio.gather(*(client() for _ in range(concurrency)))
        for record in records
    ]


async def open_loop(
    requests: list[dict[str, Any]], rate: float, seed: int, **kwargs: Any
) -> list[RequestRecord]:
    """Requests at Poisson arrivals, `rate` per second, however slowly the server answers."""
    draw = random.Random(seed)
    tasks = []
    due = time.monotonic()
    for body in requests:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(complete(body=body, **kwargs)))
        due += draw.expovariate(rate)
    return await asyncio.gather(*tasks)


async def lookup_counters(url: str, api_key: str | None) -> dict[str, float]:
    """The server's look-up counters; empty if it has none."""
    try:
        return report.counters(await get_text(url, "/metrics", api_key))
    except (ResponseError, OSError):
        return {}


async def run_steps(options: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    """One summary for each concurrency, then for each rate; prompts never repeat between steps."""
    min_chars, max_chars = options.prompt_chars
    prompts = workload.prompts(workload.read_library(), min_chars, max_chars, options.seed)
    kwargs = {"url": options.url, "api_key": options.api_key, "timeout_seconds": options.timeout}
    loads: list[tuple[str, float]] = [("concurrency", c) for c in options.concurrency]
    loads += [("rate", r) for r in options.rate]
    for kind, amount in loads:
        requests = request_bodies(prompts, options)
        before = await lookup_counters(options.url, options.api_key)
        if kind == "concurrency":
            records = await closed_loop(requests, int(amount), **kwargs)
        else:
            records = await open_loop(requests, amount, options.seed, **kwargs)
        after = await lookup_counters(options.url, options.api_key)
        yield {
            "load": f"{kind} {amount:g}",
            **report.summarise(records),
            "lookups": report.growth(before, after),
        }


def request_bodies(prompts: Iterator[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """`--requests` bodies; `ignore_eos` makes every answer as long as asked, so that runs compare."""
    fixed = {"max_tokens": options.max_tokens, "temperature": options.temperature, "ignore_eos": True}
    if options.model:
        fixed["model"] = options.model
    return [{"prompt": next(prompts), "seed": i, **fixed} for i in range(options.requests)]


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests", description="Load a running server and measure it."
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server's root (default: %(default)s)"
    )
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--model", help="model name in the requests (default: the server's own)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[], help="closed loop: clients at a time"
    )
    parser.add_argument("--rate", type=float, nargs="+", default=[], help="open loop: requests per second")
    parser.add_argument("--requests", type=int, default=32, help="requests per step (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: greedy")
    parser.add_argument("--prompt-chars", type=int, nargs=2, default=[200, 2000], metavar=("MIN", "MAX"))
    parser.add_argument("--seed", type=int, default=0, help="same seed, same prompts and arrivals")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds per request (default: %(default)s)"
    )
    parser.add_argument("--thresholds", type=Path, help="TOML file of bounds that every step must keep")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(argv)
    if not options.concurrency and not options.rate:
        options.concurrency = [1, 4]
    for name, values in (
        ("concurrency", options.concurrency),
        ("rate", options.rate),
        ("requests", [options.requests]),
    ):
        if any(value <= 0 for value in values):
            parser.error(f"--{name} is {values}, wanted numbers above 0")
    return options


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All steps with what they were measured on."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    steps = []
    async for step in run_steps(options):
        steps.append(step)
        print(report.table([step]) if len(steps) == 1 else report.table([step]).splitlines()[1], flush=True)
    return {
        "benchmark": "load",
        "date": started,
        "machine": f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}",
        "command": "python -m load_tests " + " ".join(sys.argv[1:]),
        "requests_per_step": options.requests,
        "max_tokens": options.max_tokens,
        "prompt_chars": options.prompt_chars,
        "seed": options.seed,
        "steps": steps,
    }


def main() -> int:
    options = parse_options()
    thresholds = tomllib.loads(options.thresholds.read_text()) if options.thresholds else {}
    result = asyncio.run(measure(options))
    missed = [line for step in result["steps"] for line in report.violations(step, thresholds)]
    for error, count in ((e, n) for step in result["steps"] for e, n in step["errors"].items()):
        print(f"{count} x {error}", file=sys.stderr)
    for line in missed:
        print(f"threshold missed: {line}", file=sys.stderr)
    line = json.dumps(result)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
