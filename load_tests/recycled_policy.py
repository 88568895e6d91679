"""Hit rate of recycled states under a Zipf workload, by value per byte and by least recent use.

    python -m load_tests.recycled_policy --folder /tmp/recycled-policy

A real store on disk with a budget of a tenth of the working set (`--budget-share`): every request reads its
state, and writes it where it was not there. The least-recently-used rival is a list of the states, as many
bytes of payload as the store held at most, without any cost of its own. Two mixes: equal states; SmolLM2's
kinds (blocks of 16 tokens, pooled vectors, activations), each as dear as its text is long. Popularity stays,
or moves on: every so many requests the most popular places belong to the next states. Prints a table over
seeds, then one JSON line with each seed's figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import accumulate, product
from pathlib import Path
from typing import Protocol

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
    moves_every: int
    skew: float
    seed: int
    policy: str
    hit_rate: float
    byte_hit_rate: float
    saved_seconds_rate: float
    payload_bytes: int
    file_bytes: int
    budget_bytes: int


class Policy(Protocol):
    """Keeps states within some bytes."""

    def ask(self, index: int, state: State) -> bool:
        """Whether the state is held; if not, it is offered."""


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


class ByWorth:
    """The store itself."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._disk = RecycledDisk(folder, budget_bytes, RecycledStats())
        self.payload_bytes = self.file_bytes = 0

    def ask(self, index: int, state: State) -> bool:
        """Raises AssertionError if the store gives wrong bytes."""
        record = _record(index, state)
        found = self._disk.read(record.name, None)
        if found is not None:
            assert found[0].fault(b"") is None
            self._disk.touch({record.name: 1})
            return True
        self._disk.write([(record, Worth.new(state.cost_seconds, record.num_bytes, 0, 0.0))])
        return False

    def note_size(self) -> None:
        """Of what is held by now."""
        held = sum(num_bytes for _, num_bytes in self._disk.usage().values())
        self.payload_bytes = max(self.payload_bytes, held)
        self.file_bytes = max(self.file_bytes, self._disk.file_bytes)

    def close(self) -> None:
        self._disk.close()
        shutil.rmtree(self._folder)


class LeastRecentlyUsed:
    """Only which states are held."""

    def __init__(self, payload_bytes: int) -> None:
        self._free_bytes = payload_bytes
        self._held: OrderedDict[int, int] = OrderedDict()

    def ask(self, index: int, state: State) -> bool:
        if index in self._held:
            self._held.move_to_end(index)
            return True
        self._held[index] = state.num_bytes
        self._free_bytes -= state.num_bytes
        while self._free_bytes < 0:
            self._free_bytes += self._held.popitem(last=False)[1]
        return False


def compare(
    folder: Path,
    mix: str,
    states: Sequence[State],
    skew: float,
    moves_every: int,
    seed: int,
    requests: int,
    budget_share: float = BUDGET_SHARE,
) -> tuple[Outcome, Outcome]:
    """The least-recently-used and the store's own policy under one workload."""
    budget = max(LEAST_BUDGET_BYTES, int(sum(state.num_bytes for state in states) * budget_share))
    asked = list(_workload(len(states), skew, moves_every, seed, requests))
    worth = ByWorth(folder, budget)
    rates = {"worth": _rates(worth, states, asked, worth.note_size)}
    worth.close()
    rates["lru"] = _rates(LeastRecentlyUsed(worth.payload_bytes), states, asked)
    lru, own = (
        Outcome(
            mix,
            moves_every,
            skew,
            seed,
            policy,
            *rates[policy],
            worth.payload_bytes,
            worth.file_bytes,
            budget,
        )
        for policy in ("lru", "worth")
    )
    return lru, own


def _workload(num_states: int, skew: float, moves_every: int, seed: int, requests: int) -> Iterator[int]:
    """Which state each request asks for; `moves_every` 0: popularity stays."""
    rng = random.Random(seed)
    order = list(range(num_states))
    rng.shuffle(order)
    weights = list(accumulate((rank + 1) ** -skew for rank in range(num_states)))
    for request in range(requests):
        rank = rng.choices(range(num_states), cum_weights=weights)[0]
        yield order[(rank + (request // moves_every if moves_every else 0)) % num_states]


def _rates(
    policy: Policy, states: Sequence[State], asked: Sequence[int], look: Callable[[], None] | None = None
) -> tuple[float, float, float]:
    """Shares of requests, bytes and seconds found; `look` is called now and then."""
    total, found = np.zeros(3), np.zeros(3)
    for number, index in enumerate(asked):
        state = states[index]
        is_held = policy.ask(index, state)
        if number >= len(asked) * WARM_UP:
            what = np.array((1, state.num_bytes, state.cost_seconds))
            total += what
            found += what * is_held
        if look is not None and number % 100 == 99:
            look()
    hits, num_bytes, seconds = (found / total).tolist()
    return hits, num_bytes, seconds


MIXES = {"equal": equal_states, "mixed": mixed_states}


def _record(index: int, state: State) -> Record:
    begin = index * 7919 % (1 << 16)
    name = state_key(state.kind, index.to_bytes(4, "big") * 8)
    return Record.make(name, b"", _PAYLOADS[begin : begin + state.num_bytes])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed")
    parser.add_argument("--working-set-bytes", type=int, default=700_000_000)
    parser.add_argument("--budget-share", type=float, default=BUDGET_SHARE, help="of the working set")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--skews", type=float, nargs="+", default=[0.7, 1.0, 1.3])
    parser.add_argument("--moves-every", type=int, nargs="+", default=[0, 100, 20])
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    print(
        f"{'mix':6} {'moves':>5} {'skew':>4} {'policy':>6}   hits, bytes, seconds found: mean ± half of range"
    )
    for mix, moves_every in product(options.mixes, options.moves_every):
        for skew in options.skews:
            both: list[tuple[Outcome, Outcome]] = []
            for seed in range(options.seeds):
                states = MIXES[mix](options.working_set_bytes, random.Random(seed))
                sizes = options.requests, options.budget_share
                both.append(compare(options.folder, mix, states, skew, moves_every, seed, *sizes))
            for part in zip(*both, strict=True):
                outcomes += part
                print(f"{mix:6} {moves_every:5} {skew:4} {part[0].policy:>6}   {_spread(part)}", flush=True)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "command": "python -m load_tests.recycled_policy",
        "budget_share": options.budget_share,
        "requests": options.requests,
        "working_set_bytes": options.working_set_bytes,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _spread(outcomes: Sequence[Outcome]) -> str:
    """Mean and half of the range of each rate."""
    parts = []
    for name in ("hit_rate", "byte_hit_rate", "saved_seconds_rate"):
        values = [getattr(outcome, name) for outcome in outcomes]
        parts.append(f"{sum(values) / len(values):.3f} ± {(max(values) - min(values)) / 2:.3f}")
    return " ".join(parts)


if __name__ == "__main__":
    main()
