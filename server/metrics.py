"""All metrics of the server, on a registry of its own. Names are promises: dashboards hang on them.

Suffixes are vLLM's, so that its dashboards carry over with another prefix. Every label set is made at
start: a series that first appears with its first event cannot be alerted on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from scone.server.process_metrics import ProcessMemoryCollector
from scone.server.sequence import FinishReason, GenerationRequest, RequestUsage
from scone.server.weighted_histogram import WeightedHistogram

if TYPE_CHECKING:
    from scone.server.engine.observer import StepStats
    from scone.server.engine_door import EngineStats

FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "model_loading", "shutting_down", "queue_timeout")
RELOAD_RESULTS = ("switched", "unchanged", "refused")
# From below a millisecond: small models are that fast.
TOKEN_SECONDS = (
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2.5,
    10,
)
FIRST_TOKEN_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    20,
    40,
    80,
    160,
    640,
)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 240, 480, 960, 1920)
WAIT_SECONDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServerMetrics:
    """Implements the engine's observer; other parts hold a reference and move their own metrics."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asked for
        self.registry = CollectorRegistry()
        self._make_request_metrics()
        self._make_engine_metrics()
        ProcessCollector(registry=self.registry)
        self.registry.register(ProcessMemoryCollector())

    def exposition(self) -> tuple[bytes, str]:
        """The page for Prometheus and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Asks `stats` at every scrape for what is running, waiting and used."""
        self._num_running.set_function(lambda: stats().num_running)
        self._num_waiting.set_function(lambda: stats().num_waiting)
        self._kv_cache_usage.set_function(lambda: stats().kv_cache_usage)

    def watch(self, collector: Collector) -> None:
        """Exports what a table, a store of recycled states or a device counts as well."""
        self.registry.register(collector)

    def _make_request_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens computed or found in the prefix cache.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.request_success = counter("request_success", "Sequences that ended.", "finished_reason")
        for reason in FINISH_REASONS:
            self.request_success.labels(reason)
        self.admission_rejections = counter("admission_rejections", "Requests not admitted.", "reason")
        for rejection in REJECTIONS:
            self.admission_rejections.labels(rejection)
        self.unknown_parameters = counter("unknown_parameters", "Unknown fields in requests, ignored.")
        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From submission to the first token.", FIRST_TOKEN_SECONDS
        )
        self._inter_token_latency = WeightedHistogram(
            "scone_inter_token_latency_seconds", "Between a sequence's tokens.", TOKEN_SECONDS
        )
        self.registry.register(self._inter_token_latency)
        self._e2e_request_latency = histogram(
            "e2e_request_latency_seconds", "From submission to a sequence's end.", REQUEST_SECONDS
        )
        self._request_queue_time = histogram(
            "request_queue_time_seconds", "From submission to the first step.", REQUEST_SECONDS
        )

    def _make_engine_metrics(self) -> None:
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._num_running = gauge("num_requests_running", "Sequences in the running batch.")
        self._num_waiting = gauge("num_requests_waiting", "Requests waiting for their first step.")
        self._kv_cache_usage = gauge("kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.")
        self.kv_cache_bytes = gauge(
            "kv_cache_bytes",
            "Memory set aside for keys and values, by the type that they are held in.",
            "dtype",
        )
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = counter("num_preemptions", "Sequences put back for want of KV blocks.")
        self._step_tokens = histogram("iteration_tokens_total", "Tokens computed by a step.", STEP_TOKENS)
        self._step_seconds = histogram("step_seconds", "Duration of a step.", TOKEN_SECONDS)
        self._fgram_wait = histogram(
            "fgram_wait_seconds", "How long a sequence could have run but for its rows.", WAIT_SECONDS
        )
        self._restored_tokens = counter(
            "recycled_restored_tokens", "Prompt tokens whose state was fetched instead of computed."
        )
        self._restore_seconds = histogram(
            "recycled_restore_seconds", "From asking for a prompt's stored blocks to their use.", WAIT_SECONDS
        )
        self.table_reloads = counter("table_reloads", "Reloads of the table, by result.", "result")
        for result in RELOAD_RESULTS:
            self.table_reloads.labels(result)
        self.startup_seconds = gauge("startup_seconds", "Duration of each phase of the start.", "phase")

    # -- the engine's observer; called on the engine thread --------------------------------------

    def on_step(self, stats: StepStats) -> None:
        self._step_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
        self._step_seconds.observe(stats.seconds)
        self._prefix_queries.inc(stats.num_prefix_queries)
        self._prefix_hits.inc(stats.num_prefix_hits)
        self._preemptions.inc(stats.num_preempted)

    def on_prompt_tokens(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def on_first_token(self, request: GenerationRequest, seconds: float) -> None:
        self._generation_tokens.inc()
        self._time_to_first_token.observe(seconds)

    def on_tokens(self, seconds: float, num_tokens: int) -> None:
        self._generation_tokens.inc(num_tokens)
        self._inter_token_latency.observe(seconds, num_tokens)

    def on_rows_waited(self, seconds: float) -> None:
        self._fgram_wait.observe(seconds)

    def on_restored(self, num_tokens: int, seconds: float) -> None:
        self._restored_tokens.inc(num_tokens)
        self._restore_seconds.observe(seconds)

    def on_sequence_finished(
        self, request: GenerationRequest, reason: FinishReason, usage: RequestUsage, seconds: float
    ) -> None:
        self.request_success.labels(reason).inc()
        self._e2e_request_latency.observe(seconds)
        self._request_queue_time.observe(usage.queue_seconds)

    # -- making ----------------------------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter("scone_" + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge("scone_" + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram("scone_" + name, text, buckets=buckets, registry=self.registry)
