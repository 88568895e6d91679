"""From request records to percentiles, a table for people, one JSON object for machines, and a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from load_tests.client import RequestRecord

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed (linear between neighbours)."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Throughput over the wall time of all records; latencies of those that succeeded, in milliseconds.

    A latency that no request gave is None.
    """
    good = [record for record in records if record.error is None]
    wall_seconds = max(r.end for r in records) - min(r.start for r in records)
    gaps = [later - earlier for r in good for earlier, later in pairwise(r.token_times)]
    return {
        "num_requests": len(records),
        "num_errors": len(records) - len(good),
        "errors": dict(Counter(r.error for r in records if r.error is not None)),
        "wall_seconds": round(wall_seconds, 3),
        "requests_per_second": round(len(good) / wall_seconds, 3),
        "prompt_tokens_per_second": round(sum(r.num_prompt_tokens for r in good) / wall_seconds, 2),
        "generated_tokens_per_second": round(sum(r.num_generated_tokens for r in good) / wall_seconds, 2),
        "time_to_first_token_ms": _percentiles([r.token_times[0] - r.start for r in good if r.token_times]),
        "inter_token_ms": _percentiles(gaps),
        "end_to_end_ms": _percentiles([r.end - r.start for r in good]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{p}": round(percentile(seconds, p) * 1e3, 2) if seconds else None for p in PERCENTILES}


def counters(metrics_text: str, prefix: str = "scone_fgram_") -> dict[str, float]:
    """The look-up counters of a Prometheus text page by sample name; empty for another server's page."""
    found = {}
    for line in metrics_text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith(prefix) and "_total" in name:
            found[name.removeprefix(prefix)] = float(value)
    return found


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How far each counter rose; those that did not are left out."""
    risen = {name: value - before.get(name, 0) for name, value in after.items()}
    return {name: value for name, value in risen.items() if value}


def table(steps: Sequence[Mapping[str, Any]]) -> str:
    """One line per load step: load, requests, errors, throughput, and p50/p90/p99 of the latencies."""
    lines = [
        f"{'load':>14} {'requests':>8} {'errors':>6} {'tok/s out':>9} "
        f"{'TTFT ms p50/p90/p99':>26} {'inter-token ms':>23}"
    ]
    for step in steps:
        lines.append(
            f"{step['load']:>14} {step['num_requests']:>8} {step['num_errors']:>6} "
            f"{step['generated_tokens_per_second']:>9.1f} {_slashed(step['time_to_first_token_ms']):>26} "
            f"{_slashed(step['inter_token_ms']):>23}"
        )
    return "\n".join(lines)


def _slashed(latencies: Mapping[str, float | None]) -> str:
    return " / ".join("-" if ms is None else f"{ms:.1f}" for ms in latencies.values())


def violations(step: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[str]:
    """One sentence for each threshold that the step misses.

    A key is a path into the step with a bound: `max_num_errors`, `min_generated_tokens_per_second`,
    `max_time_to_first_token_ms.p99`. Raises ValueError for a key that names nothing.
    """
    missed = []
    for key, bound in thresholds.items():
        side, _, path = key.partition("_")
        value: Any = step
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if side not in {"min", "max"} or (value is None and not step["num_errors"]):
            raise ValueError(
                f"threshold {key} names nothing that is measured; wanted min_ or max_ and a field"
            )
        if value is None or (value > bound if side == "max" else value < bound):
            missed.append(f"{step['load']}: {path} is {value}, wanted {side}imum {bound:g}")
    return missed
