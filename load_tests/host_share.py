"""What a server's host adds to its device's steps, over HTTP: `python -m load_tests.host_share --help`.

Without `--url` it starts `paced_server.py`, whose model takes a set time a step, so that no GPU is needed.
For each number of streams, all at once: tokens a second; per step, by phase, the time that passed (which
phases there are, `server/engine/step_clock.py` says), and what of those that compute the engine's thread
waited for Python's lock or a processor; the processor time of the server's threads, and the client's, which
shares the machine. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load_tests.client import complete, get_text
from load_tests.contestants import Contestant, RunningServer

FIRST_TOKEN_ID, NUM_TOKEN_IDS = 3, 1000
WAITING_PHASES = ("device", "rows")
"""In which the engine's thread waits for something else than the lock."""

Counters = dict[str, float]


async def read_counters(url: str) -> Counters:
    """The server's counters that matter here, by name and label as exported."""
    wanted = re.compile(r"^(scone_step_\S+|process_cpu_seconds_total) (\S+)$", re.MULTILINE)
    return {name: float(value) for name, value in wanted.findall(await get_text(url, "/metrics"))}


async def load(url: str, num_streams: int, options: argparse.Namespace) -> dict[str, float]:
    """One round: so many streams at once."""
    draw = random.Random(num_streams)
    bodies = [
        {
            "prompt": [FIRST_TOKEN_ID + draw.randrange(NUM_TOKEN_IDS) for _ in range(options.prompt_tokens)],
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(num_streams)
    ]
    before, cpu_before, began = await read_counters(url), time.process_time(), time.monotonic()
    records = await asyncio.gather(*(complete(url, body) for body in bodies))
    client_seconds = time.process_time() - cpu_before
    after = await read_counters(url)
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    seconds = max(record.end for record in records) - began
    num_tokens = sum(record.num_generated_tokens for record in records)
    growth = {name: value - before.get(name, 0.0) for name, value in after.items()}
    first = statistics.median(r.token_times[0] - r.start for r in records)
    return {
        "tokens_per_second": round(num_tokens / seconds),
        "first_token_ms": round(1e3 * first, 2),
        **per_step(growth, client_seconds),
    }


def per_step(growth: Counters, client_seconds: float) -> dict[str, float]:
    """Milliseconds of a step, from what the counters grew by."""
    num_steps = growth["scone_step_seconds_count"]
    passed = phases(growth, "scone_step_phase_seconds_total")
    used = phases(growth, "scone_step_phase_cpu_seconds_total")
    waited = sum(passed[p] - used[p] for p in passed if p not in WAITING_PHASES)
    others = growth["process_cpu_seconds_total"] - sum(used.values())
    times = {"step": sum(passed.values()), **passed, "of_it_for_the_lock": waited}
    times |= {"engine_cpu": sum(used.values()), "other_threads_cpu": others, "client_cpu": client_seconds}
    return {name + "_ms": round(1e3 * seconds / num_steps, 3) for name, seconds in times.items()}


def phases(growth: Counters, name: str) -> dict[str, float]:
    return {key[len(name) + len('{phase="') : -2]: v for key, v in growth.items() if key.startswith(name)}


async def measure(url: str, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Medians of the rounds, by number of streams."""
    await load(url, 2, options)  # both sides are warm
    results = {}
    for num_streams in options.streams:
        rounds = [await load(url, num_streams, options) for _ in range(options.rounds)]
        results[num_streams] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        print(num_streams, json.dumps(results[num_streams]), flush=True)
    return results


async def measure_paced(options: argparse.Namespace) -> dict[int, dict[str, float]]:
    command = [sys.executable, "-m", "load_tests.paced_server", "--port", "{port}", "--rows", options.rows]
    command += ["--step-ms", str(options.step_ms), "--max-num-seqs", str(max(options.streams))]
    if options.in_order:
        command.append("--in-order")
    if options.work is not None:
        command += ["--work", str(options.work)]
    with tempfile.NamedTemporaryFile(prefix="paced-server-", suffix=".log") as log:
        server = RunningServer(
            Contestant("paced server", tuple(command), "/ready", {}), options.port, Path(log.name)
        )
        try:
            await server.wait_until_ready()
            return await measure(server.url, options)
        finally:
            server.end()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.host_share", description="Measure what a host adds to a device's steps."
    )
    parser.add_argument("--url", help="a server that runs already (default: one at a GPU's pace is started)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=256, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=0.85, help="of the device (default: %(default)s)")
    parser.add_argument(
        "--rows", choices=("none", "ram", "device"), default="none", help="where a table's rows lie"
    )
    parser.add_argument(
        "--in-order", action="store_true", help="each step is delivered before the next one, as on a CPU"
    )
    parser.add_argument("--work", type=Path, help="folder for the table, kept for other runs")
    parser.add_argument("--port", type=int, default=8460)
    parser.add_argument("--out", type=Path, help="also append the JSON object to this file")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    results = asyncio.run(measure(options.url, options) if options.url else measure_paced(options))
    document: dict[str, Any] = {
        "benchmark": "host_share",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}",
        "command": "python -m load_tests.host_share " + " ".join(sys.argv[1:]),
        "step_ms": None if options.url else options.step_ms,
        "rows": None if options.url else options.rows,
        "by_streams": results,
    }
    line = json.dumps(document)
    if options.out is not None:
        with options.out.open("a") as out:
            out.write(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
