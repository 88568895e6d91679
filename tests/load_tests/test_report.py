"""Percentiles, summaries and thresholds of the load driver, against hand-made numbers and NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.client import RequestRecord
from load_tests.report import counters, growth, percentile, summarise, violations


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_equals_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def record(start: float, token_times: list[float], error: str | None = None) -> RequestRecord:
    return RequestRecord(
        start=start,
        end=token_times[-1] if token_times else start + 1,
        token_times=token_times,
        num_prompt_tokens=10,
        num_generated_tokens=len(token_times),
        error=error,
    )


def test_summary_of_known_times() -> None:
    step = summarise(
        [record(0.0, [0.1, 0.2, 0.3]), record(1.0, [1.3, 1.5, 2.0]), record(0.5, [], "HTTP 503")]
    )
    assert step["wall_seconds"] == 2.0
    assert step["generated_tokens_per_second"] == 3.0
    assert step["prompt_tokens_per_second"] == 10.0
    assert step["time_to_first_token_ms"]["p50"] == 200.0
    assert step["inter_token_ms"]["p50"] == 150.0  # of 100, 100, 200, 500
    assert (step["num_requests"], step["num_errors"], step["errors"]) == (3, 1, {"HTTP 503": 1})


def test_summary_of_errors_only_has_no_latencies() -> None:
    step = summarise([record(0.0, [], "refused")])
    assert step["time_to_first_token_ms"] == {"p50": None, "p90": None, "p99": None}


def test_thresholds() -> None:
    step = {"load": "concurrency 1", **summarise([record(0.0, [0.1, 0.2, 0.3])])}
    bounds = {"max_num_errors": 0, "min_generated_tokens_per_second": 5, "max_inter_token_ms.p99": 200}
    assert violations(step, bounds) == []
    assert violations(step, {"max_inter_token_ms.p99": 50}) == [
        "concurrency 1: inter_token_ms.p99 is 100.0, wanted maximum 50"
    ]
    with pytest.raises(ValueError, match="max_latency names nothing"):
        violations(step, {"max_latency": 1})


def test_a_step_of_errors_misses_every_latency_bound() -> None:
    step = {"load": "rate 2", **summarise([record(0.0, [], "refused")])}
    assert len(violations(step, {"max_num_errors": 0, "max_inter_token_ms.p99": 200})) == 2


def test_lookup_counters_of_a_metrics_page() -> None:
    page = """# HELP scone_fgram_lookups_total Look-ups
# TYPE scone_fgram_lookups_total counter
scone_fgram_lookups_total{n="1"} 4.0
scone_fgram_lookups_total{n="2"} 6.0
scone_fgram_wait_seconds_sum 0.5
python_info{version="3.11"} 1.0
"""
    before = counters(page)
    assert before == {'lookups_total{n="1"}': 4.0, 'lookups_total{n="2"}': 6.0}
    assert growth({'lookups_total{n="1"}': 4.0}, before) == {'lookups_total{n="2"}': 6.0}
