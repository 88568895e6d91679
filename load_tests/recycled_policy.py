"""Hit rate of recycled states under a Zipf workload, by value per byte and by least recent use.

    python -m load_tests.recycled_policy --folder /tmp/recycled-policy

A real store on disk with a budget of 10 % of the working set: every request reads its state, and writes it
where it was not there. The least-recently-used rival is the same store: if time runs so fast that each use
outweighs all before it, and every state has the same cost and size, the state used longest ago goes first.
Prints a table, then one JSON line. Three mixes: equal states; SmolLM2's kinds (blocks of 16 tokens, pooled
vectors, activations), each as dear as its text is long; and the same with popularity that moves on.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import numpy as np

from scone.cache.recycled_disk import RecycledDisk
from scone.cache.recycled_record import Record, state_key
from scone.cache.recycled_stats import Kind, RecycledStats
from scone.cache.state_worth import Worth

BUDGET_SHARE = 0.1
LEAST_BUDGET_BYTES = 64 << 20
WARM_UP = 0.3
"""Requests of a run that are not counted."""
SECONDS_PER_TOKEN = 0.002
"""What a prompt token takes in these mixes, about as SmolLM2 on two cores."""
_LRU_SPEED = 1e6
_PAYLOADS = np.random.default_rng(0).integers(0, 256, 2 << 20, np.uint8)


@dataclass(frozen=True, slots=True)
class State:
    kind: Kind
    num_bytes: int
    cost_seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run, its warm-up left out; shares of requests, bytes asked for and seconds of computing."""

    mix: str
    skew: float
    policy: str
    hit_rate: float
    byte_hit_rate: float
    saved_seconds_rate: float
    written_bytes: int
    file_bytes: int
    budget_bytes: int


def equal_states(working_set_bytes: int, rng: random.Random) -> list[State]:
    return [State("blocks", 300_000, 0.03)] * (working_set_bytes // 300_000)


def mixed_states(working_set_bytes: int, rng: random.Random) -> list[State]:
    """By bytes mostly blocks, by number mostly results."""
    states: list[State] = []
    total = 0
    while total < working_set_bytes:
        num_tokens = int(rng.lognormvariate(5, 1)) + 8
        kind: Kind = rng.choices(("blocks", "results", "layer_k"), (5, 4, 1))[0]
        if kind == "blocks":
            state = State(kind, 16 * 30 * 2 * 3 * 64 * 4, 16 * SECONDS_PER_TOKEN)
        elif kind == "results":
            state = State(kind, 576 * 4, num_tokens * SECONDS_PER_TOKEN)
        else:
            state = State(kind, min(num_tokens, 800) * 576 * 4, num_tokens * SECONDS_PER_TOKEN / 2)
        states.append(state)
        total += state.num_bytes
    return states


def run(
    folder: Path,
    mix: str,
    states: Sequence[State],
    skew: float,
    policy: str,
    num_requests: int,
    moves_on: bool = False,
) -> Outcome:
    """One policy under one workload; raises AssertionError if the store gives wrong bytes."""
    budget = max(LEAST_BUDGET_BYTES, int(sum(state.num_bytes for state in states) * BUDGET_SHARE))
    shutil.rmtree(folder, ignore_errors=True)
    stats = RecycledStats()
    disk = RecycledDisk(folder, budget, stats)
    rng = random.Random(0)
    order = list(range(len(states)))
    rng.shuffle(order)
    weights = list(accumulate((rank + 1) ** -skew for rank in range(len(states))))
    asked, found, written = np.zeros(3), np.zeros(3), 0
    for request in range(num_requests):
        rank = rng.choices(range(len(states)), cum_weights=weights)[0]
        # Moving on: every request, the most popular places belong to other states a little later.
        index = order[(rank + (request // 20 if moves_on else 0)) % len(states)]
        state = states[index]
        record = _record(index, state)
        now = 1e9 + request * (_LRU_SPEED if policy == "lru" else 1.0)
        what = np.array((1, state.num_bytes, state.cost_seconds))
        hit = disk.read(record.name, None)
        assert hit is None or hit[0].fault(b"") is None
        if hit is not None:
            disk.touch({record.name: [now]})
        else:
            worth = (
                Worth.new(1.0, 1, 0, now)
                if policy == "lru"
                else Worth.new(state.cost_seconds, record.num_bytes, 0, now)
            )
            written += record.num_bytes if disk.write([(record, worth)])[record.name] == "stored" else 0
        if request >= num_requests * WARM_UP:
            asked += what
            found += what * (hit is not None)
    file_bytes = disk.file_bytes
    disk.close()
    shutil.rmtree(folder)
    hit_rate, byte_rate, saved = (found / asked).tolist()
    return Outcome(mix, skew, policy, hit_rate, byte_rate, saved, written, file_bytes, budget)


def _record(index: int, state: State) -> Record:
    begin = index * 7919 % (1 << 16)
    name = state_key(state.kind, index.to_bytes(4, "big") * 8)
    return Record.make(name, b"", _PAYLOADS[begin : begin + state.num_bytes])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed")
    parser.add_argument("--working-set-bytes", type=int, default=700_000_000)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--skews", type=float, nargs="+", default=[0.7, 1.0, 1.3])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    mixes = {
        "equal": (equal_states(options.working_set_bytes, random.Random(1)), False),
        "mixed": (mixed_states(options.working_set_bytes, random.Random(1)), False),
        "mixed, moving on": (mixed_states(options.working_set_bytes, random.Random(1)), True),
    }
    outcomes = []
    print(f"{'mix':18} {'skew':>4} {'policy':>6} {'hits':>6} {'bytes':>6} {'seconds':>7}  of those asked for")
    for mix, (states, moves_on) in mixes.items():
        for skew in options.skews:
            for policy in ("lru", "worth"):
                outcome = run(options.folder, mix, states, skew, policy, options.requests, moves_on)
                outcomes.append(outcome)
                print(
                    f"{mix:18} {skew:4} {policy:>6} {outcome.hit_rate:6.3f} {outcome.byte_hit_rate:6.3f}"
                    f" {outcome.saved_seconds_rate:7.3f}",
                    flush=True,
                )
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "command": "python -m load_tests.recycled_policy",
        "requests": options.requests,
        "working_set_bytes": options.working_set_bytes,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
