"""Mixed load for a long time: `python -m load_tests.soak --minutes 30` against a running server.

Streams, batches, scoring, embeddings, malformed and abandoned requests, reloads of the table. Fails (exit
code 1) if the server's anonymous memory grew by more than `--max-growth-mib` after the first fifth of the
time, if a request failed that should not have, or if a gauge is not back at 0 in the end. The last line of
output is one JSON object.
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
from collections import Counter
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load_tests.client import RequestRecord, complete, get_text, post_json, stream_events
from load_tests.http_response import ResponseError

ANONYMOUS = 'scone_process_resident_bytes{kind="anon"}'
GAUGES = ("scone_num_requests_running", "scone_num_requests_waiting", "scone_kv_cache_usage_perc")
NUM_SAMPLES = 30
MAX_TICK_SECONDS = 5.0
"""Longer silence of the clock means that the process did not run at all."""
REQUEST_SECONDS = 3600.0
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.2, "top_k": 40, "min_p": 0.02, "seed": 7},
    {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"28": -5}},
    {"temperature": 0.6, "logprobs": 3, "min_tokens": 1},
)
WORDS = ("the", "of", "and", "to", "in", "is", "for", "that", "with", "as", "on", "by", "this", "be", "from")


class RunningTime:
    """Seconds that the process has run: those that it was stopped, or the machine slept, do not count."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def count(self) -> None:
        """Never returns."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            self.seconds += min(now - last, MAX_TICK_SECONDS)
            last = now

    async def wait_until(self, seconds: float) -> None:
        while self.seconds < seconds:
            await asyncio.sleep(0.5)


class Soak:
    """Clients that do one thing after another until the time is over."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.time = RunningTime()
        self.outcomes: Counter[str] = Counter()
        self._draw = random.Random(seed)

    async def client(self, seconds: float) -> None:
        """One client; each request is of a kind drawn anew."""
        kinds = (
            self._answered,
            self._answered,
            self._scored,
            self._embedded,
            self._abandoned,
            self._abandoned_unread,
            self._malformed,
            self._reloaded,
        )
        while self.time.seconds < seconds:
            await self._draw.choice(kinds)()

    async def anonymous_bytes(self) -> float:
        return await self._metric(ANONYMOUS)

    async def busy_gauges(self) -> list[str]:
        """Gauges that are not 0."""
        return [name for name in GAUGES if await self._metric(name) != 0]

    def _body(self, **fields: Any) -> dict[str, Any]:
        words = self._draw.choices(WORDS, k=self._draw.randint(1, 200))
        length = self._draw.randint(1, 64)
        sampling = self._draw.choice(SAMPLING)
        return {"prompt": " ".join(words), "max_tokens": length, "ignore_eos": True, **sampling, **fields}

    async def _complete(self, **fields: Any) -> RequestRecord:
        return await complete(self.url, self._body(**fields), timeout_seconds=REQUEST_SECONDS)

    async def _answered(self) -> None:
        prompts = [self._body()["prompt"] for _ in range(self._draw.choice((1, 1, 4)))]
        record = await self._complete(prompt=prompts, n=self._draw.choice((1, 2)))
        self._note("answered", record.error)

    async def _scored(self) -> None:
        record = await self._complete(echo=True, logprobs=5, max_tokens=1)
        self._note("scored", record.error)

    async def _abandoned(self) -> None:
        body = self._body(max_tokens=256, stream=True)
        async with aclosing(stream_events(self.url, "/v1/completions", body, None)) as events:
            for _ in range(self._draw.randint(0, 5)):
                await anext(events, None)
        self._note("abandoned", None)

    async def _abandoned_unread(self) -> None:
        """Not streamed, and gone before the answer."""
        post = post_json(self.url, "/v1/completions", self._body(max_tokens=256))
        try:
            await asyncio.wait_for(post, self._draw.uniform(0.05, 1))
        except TimeoutError:
            self._note("abandoned", None)
        except (OSError, ResponseError) as error:
            self._note("abandoned", str(error))

    async def _embedded(self) -> None:
        inputs = [self._body()["prompt"] for _ in range(self._draw.choice((1, 4)))]
        layer = self._draw.choice((None, None, 1))
        await self._posted("embedded", "/v1/embeddings", {"input": inputs, "layer": layer})

    async def _reloaded(self) -> None:
        await self._posted("reloaded", "/admin/tables/reload", {})

    async def _posted(self, kind: str, path: str, body: dict[str, Any]) -> None:
        try:
            await post_json(self.url, path, body)
            self._note(kind, None)
        except (OSError, ResponseError) as error:
            self._note(kind, str(error))

    async def _malformed(self) -> None:
        body = self._body(logit_bias={"999999999": 1}, stream=True)
        error: str | None = "was accepted"
        try:
            async with aclosing(stream_events(self.url, "/v1/completions", body, None)) as events:
                await anext(events, None)
        except ResponseError as refused:
            error = None if "HTTP 400" in str(refused) else str(refused)
        self._note("refused", error)

    def _note(self, kind: str, error: str | None) -> None:
        self.outcomes[kind if error is None else "failed"] += 1
        if error is not None:
            print(f"{kind}: {error}", file=sys.stderr)

    async def _metric(self, name: str) -> float:
        for line in (await get_text(self.url, "/metrics")).splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise ResponseError(f"/metrics does not have {name}")


async def run(options: argparse.Namespace) -> int:
    """The whole soak; returns the exit code."""
    soak = Soak(options.url, options.seed)
    seconds = options.minutes * 60
    started = datetime.now(UTC).isoformat(timespec="seconds")
    counting = asyncio.create_task(soak.time.count())
    clients = [asyncio.create_task(soak.client(seconds)) for _ in range(options.concurrency)]
    samples = []
    for i in range(NUM_SAMPLES):
        await soak.time.wait_until(seconds * (i + 1) / NUM_SAMPLES)
        samples.append(await soak.anonymous_bytes() / 2**20)
    await asyncio.gather(*clients)
    counting.cancel()
    await asyncio.sleep(5)
    baseline = samples[NUM_SAMPLES // 5 - 1]
    growth_mib = await soak.anonymous_bytes() / 2**20 - baseline
    busy = await soak.busy_gauges()
    passed = growth_mib <= options.max_growth_mib and not busy and not soak.outcomes["failed"]
    result = {
        "benchmark": "soak",
        "date": started,
        "machine": f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}",
        "command": "python -m load_tests.soak " + " ".join(sys.argv[1:]),
        "minutes": options.minutes,
        "concurrency": options.concurrency,
        "outcomes": dict(soak.outcomes),
        "anonymous_mib": [round(sample, 1) for sample in samples],
        "baseline_mib": round(baseline, 1),
        "growth_mib": round(growth_mib, 1),
        "gauges_not_at_0": busy,
        "passed": passed,
    }
    line = json.dumps(result)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 0 if passed else 1


def main() -> int:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.soak", description="Mixed load, long.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-growth-mib", type=float, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
